"""What torch.compile tries of a processor's vectors is tried once on a machine."""

from pathlib import Path
from typing import Any

import pytest
from torch._inductor.cpu_vec_isa import VecISA

from tunewright.fast import _probes


def test_a_library_that_was_loaded_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried, good = list[str](), str(tmp_path / "good.so")

    def probe(vectors: Any, library: str) -> bool:
        tried.append(library)
        return library == good

    monkeypatch.setattr(VecISA, "_probe_load", probe)
    _probes.keep()
    _probes.keep()
    vectors, bad = VecISA(), str(tmp_path / "bad.so")
    assert vectors._probe_load(good)
    assert vectors._probe_load(good)
    assert not vectors._probe_load(bad)
    assert not vectors._probe_load(bad)  # what went wrong may be mended
    assert tried == [good, bad, bad]


def test_what_cannot_be_put_down_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = list[str]()
    monkeypatch.setattr(VecISA, "_probe_load", lambda vectors, library: not tried.append(library))
    _probes.keep()
    library = str(tmp_path / "no such folder" / "good.so")
    assert VecISA()._probe_load(library)
    assert VecISA()._probe_load(library)
    assert tried == [library, library]


def test_pytorch_still_tries_by_that_name() -> None:
    """Else each start takes a second more, and nothing else tells of it."""
    assert callable(VecISA._probe_load)


def test_where_pytorch_tries_in_another_way_nothing_is_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(VecISA, "_probe_load")
    _probes.keep()
    assert not hasattr(VecISA, "_probe_load")
