"""The process while it trains: what is set, what it brings, and that it is set back."""

import os
import platform
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from techniques import SHAPE, work
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tunewright.core import cgroups, machine
from tunewright.fast import lora_linear, process
from tunewright.fast.process import Process

MODEL = nn.Linear(2, 2)
LARGE = 40 << 20  # bytes; glibc would give so much back by itself
needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc")


def faults() -> int:
    """Pages that the system gave for the first time, while a large block was made three times."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        torch.ones(LARGE // 4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def denormals_count() -> bool:
    return bool((torch.tensor([1e-40]) * 0.5).item())


@needs_glibc
def test_freed_memory_is_kept_and_given_back_at_the_end() -> None:
    with Process().on(work(MODEL)):
        settled, within = any(faults() < 100 for _ in range(10)), resident()
    assert settled
    assert within - resident() > LARGE // 2


def resident() -> int:
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


@needs_glibc
@pytest.mark.parametrize("broken", [False, True])
def test_threads_and_denormals_are_set_and_set_back(broken: bool) -> None:
    before = torch.get_num_threads()
    assert denormals_count()
    try:
        torch.set_num_threads(machine.cores() + 3)
        with Process().on(work(MODEL)):
            assert torch.get_num_threads() == machine.cores()
            assert not denormals_count()
            assert 1 // (not broken)
    except ZeroDivisionError:
        assert broken
    finally:
        after = torch.get_num_threads()
        torch.set_num_threads(before)
    assert after == machine.cores() + 3
    assert denormals_count()


@needs_glibc
def test_fewer_threads_that_were_asked_for_stay() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with Process().on(work(MODEL)):
            assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("always [madvise] never\n", "madvise"),
        ("[always] madvise never", "always"),
        ("never", ""),
        (None, ""),
    ],
)
def test_what_the_system_says_of_huge_pages(
    content: str | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "enabled"
    if content is not None:
        path.write_text(content)
    monkeypatch.setattr(process, "_PAGES", path)
    assert process.huge_pages() == expected
    assert process.settings()["huge pages"] == (expected or "unknown")


def test_it_is_for_cpus_and_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "own allocator" in Process().why_not(work(nn.Linear(2, 2, device="meta")))
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    assert Process().why_not(work(MODEL)) == ""
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert "not glibc" in Process().why_not(work(MODEL))
    assert not process.settings()["keeps freed memory"]


def test_settings_are_what_a_training_has() -> None:
    found = process.settings()
    with Process().on(work(MODEL)) if found["keeps freed memory"] else torch.no_grad():
        assert found["threads"] == torch.get_num_threads()
    info = Path("/proc/cpuinfo")
    flags = info.read_text().split() if info.exists() else []
    assert [name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if name in flags] == found[
        "matrix units"
    ]


# Cores


@pytest.fixture
def bound() -> Iterator[int]:
    """The process may use one core only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield 1
    os.sched_setaffinity(0, before)


@pytest.fixture
def quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cgroups, "ROOT", tmp_path)
    monkeypatch.setattr(cgroups, "OWN", tmp_path / "own")
    (tmp_path / "own").write_text("0::/\n")
    return tmp_path / "cpu.max"


def test_a_process_that_is_bound_has_fewer_cores(bound: int) -> None:
    assert machine.cores() == machine.hardware()["cores"] == bound


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("50000 100000", 1), ("100000 100000", 1), ("160000 100000", 2), ("max 100000", 64), ("", 64), ("6400000 50000", 64)],
)  # fmt: skip
def test_a_container_may_be_limited(
    quota: Path, limit: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    quota.write_text(limit)
    assert machine.cores() == expected


def test_without_limits_all_cores_are_counted(quota: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not quota.exists()
    monkeypatch.delattr(os, "sched_getaffinity")
    assert machine.cores() == os.cpu_count()


@needs_glibc
def test_a_files_weights_are_let_go_of_unless_they_were_changed(tmp_path: Path) -> None:
    """Only pages that can be read from the file again are dropped."""
    files = [tmp_path / "read.safetensors", tmp_path / "changed.safetensors"]
    for path in files:
        save_file({"x": torch.full((LARGE // 4,), 3.0)}, path)
    read, changed = (load_file(path)["x"] for path in files)
    total = read.sum() + changed.sum()
    changed[:1000] = 5
    process._libc().malloc_trim(0)  # what other tests have left in the heap
    before = resident()
    process.let_go_of_files()
    assert LARGE / 2 < before - resident() < LARGE * 1.5
    assert changed[:1000].eq(5).all()
    assert read.sum() + changed.sum() == total + 2000


@needs_glibc
def test_weights_that_lora_copied_are_let_go_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[bool] = []
    monkeypatch.setattr(lora_linear, "let_go_of_files", lambda: called.append(True))
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**SHAPE)), LoraConfig(target_modules="all-linear"))
    monkeypatch.setattr(lora_linear, "_BESIDE", 1)
    with lora_linear.LoraLinear().on(work(model)):
        assert len(called) > SHAPE["num_hidden_layers"]  # as they are copied, not only at the end
