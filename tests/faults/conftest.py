"""Counts of faults survived. ``TUNEWRIGHT_FAULTS=long`` runs the long counts, ``TUNEWRIGHT_FAULTS_JSON=FILE``
keeps what was counted, for docs/faults.md.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from bounded import Bounded, shared
from lab import Lab

LONG = os.environ.get("TUNEWRIGHT_FAULTS") == "long"
_COUNTED = pytest.StashKey[list["Tally"]]()


class Tally:
    """What one test counted for one row of the fault table."""

    def __init__(self, row: int, test: str) -> None:
        self.row, self.test = row, test
        self.held = 0
        self.broken: list[str] = []
        self.notes: dict[str, float] = {}
        self.began, self.seconds = time.monotonic(), 0.0

    def add(self, ok: bool, what: str) -> None:
        """Count one injected fault; ``what`` names it should it not have been survived."""
        if ok:
            self.held += 1
        else:
            self.broken.append(what)

    def note(self, name: str, value: float) -> None:
        """A figure for the document, besides the count."""
        self.notes[name] = value

    def to_json(self) -> dict[str, object]:
        """As a line of the counts' file."""
        return {"row": self.row, "test": self.test, "held": self.held, "of": self.held + len(self.broken),
                "broken": self.broken, "notes": self.notes, "seconds": self.seconds}  # fmt: skip


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Iterator[Tally]:
    """The count of a test marked ``row(N)``; the test fails if one fault was not survived, or none was tried."""
    marker = request.node.get_closest_marker("row")
    counted = Tally(marker.args[0], request.node.nodeid.partition("::")[2])
    request.config.stash.setdefault(_COUNTED, []).append(counted)
    yield counted
    counted.seconds = time.monotonic() - counted.began
    assert counted.held + len(counted.broken) > 0, "nothing was tried"
    assert not counted.broken, "\n".join(counted.broken)


@pytest.fixture(scope="session")
def times() -> Callable[[int, int], int]:
    """``times(20, 200)`` is the short count, or the long one where that is asked for."""
    return lambda short, long: long if LONG else short


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A tiny model is faster on one thread, and its sums are those of the child processes, which have one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def lab(tmp_path: Path, tiny_model_folder: Path) -> Lab:
    """Runs of a tiny model under this test's folder."""
    return Lab(tmp_path, tiny_model_folder)


@pytest.fixture(scope="session")
def bounded() -> Bounded:
    """Calls in a process of their own, their time and memory measured."""
    return shared()


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """What a payload would make if it ran."""
    return tmp_path / "canary"


def pytest_configure(config: pytest.Config) -> None:
    """Know the marker."""
    config.addinivalue_line("markers", "row(number): which row of the fault table a test counts for")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """A test that ends before it has counted everything breaks its row, too."""
    report = yield
    marker = item.get_closest_marker("row")
    if marker and report.failed and report.when != "teardown":
        ended = Tally(marker.args[0], item.nodeid.partition("::")[2])
        ended.add(False, f"{ended.test} ended early: {call.excinfo.exconly() if call.excinfo else ''}")
        item.config.stash.setdefault(_COUNTED, []).append(ended)
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Keep the counts."""
    target = os.environ.get("TUNEWRIGHT_FAULTS_JSON")
    if target:
        lines = [json.dumps(tally.to_json()) for tally in session.config.stash.get(_COUNTED, [])]
        Path(target).write_text("".join(line + "\n" for line in lines))
