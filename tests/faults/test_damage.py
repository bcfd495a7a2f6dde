"""Row 3: each file of a run folder missing, empty, cut or with a flipped bit. The next run mends it and says so,
or refuses and names the file; never is a damaged byte used without a word.
"""

import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from disks import Tree, Whole, clear, content, go, is_finished, lay_out, spread, told, whole
from lab import differences, ended, outcome

from tunewright import doctor
from tunewright.core.disk import Disk
from tunewright.core.errors import InterruptedRunError, TunewrightError
from tunewright.data import prepare
from tunewright.recipes.schema import DataFile

FLIPS = 4
ALL = 1 << 30
REWRITTEN = {"run/.owner", "run/recipe.yaml", "run/report.html", "run/manifest.json", "run/results.json"}
"""Every run writes these anew, whatever they hold."""


class Stopping(Disk):
    """SIGTERM comes while this step's samples are written down."""

    def __init__(self, step: int) -> None:
        self.start = f'{{"step": {step},'.encode()

    def append(self, path: Path, data: bytes) -> None:
        super().append(path, data)
        if data.startswith(self.start):
            os.kill(os.getpid(), signal.SIGTERM)


@dataclass(frozen=True)
class Damage:
    """What befell one file: its bytes, None if it is missing."""

    path: str
    what: str
    data: bytes | None

    def done_to(self, tree: Tree) -> Tree:
        left = {name: data for name, data in tree.items() if name != self.path}
        return left if self.data is None else {**left, self.path: self.data}

    def is_named(self, text: str) -> bool:
        """Whether a message names the file: its name, and its folder's where that is an artifact's own."""
        folder, name = Path(self.path).parent.name, Path(self.path).name
        return name in text and (folder in text or name.endswith(".jsonl"))


def flipped(data: bytes, rng: random.Random) -> bytes:
    """The bytes with one bit the other way, so that a JSON value is not the same, either."""
    while True:
        place = rng.randrange(len(data) * 8)
        made = bytearray(data)
        made[place // 8] ^= 1 << place % 8
        if not _same_json(data, bytes(made)):
            return bytes(made)


def _same_json(one: bytes, other: bytes) -> bool:
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


def damages(path: str, data: bytes) -> Iterator[Damage]:
    """All that is done to one file; the bits are the same each time."""
    rng = random.Random(path)
    yield Damage(path, "missing", None)
    if data:
        yield Damage(path, "empty", b"")
        yield Damage(path, "cut to half", data[: len(data) // 2])
        for i in range(FLIPS):
            yield Damage(path, f"bit {i} flipped", flipped(data, rng))


def chosen(tree: Tree, wanted: Callable[[str], bool], count: int) -> list[Damage]:
    """That many of all damages to the files that are wanted."""
    files = {name: data for name, data in sorted(tree.items()) if data is not None and wanted(name)}
    every = [damage for name, data in files.items() for damage in damages(name, data)]
    return spread(every, count)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model_folder) -> Whole:
    return whole(tmp_path_factory.mktemp("damage"), tiny_model_folder)


@pytest.fixture(scope="module")
def stopped(finished, tmp_path_factory) -> Tree:
    """A run that SIGTERM stopped one step before its end."""
    workspace = tmp_path_factory.mktemp("stopped")
    with pytest.raises(InterruptedRunError):
        go(finished.recipe, workspace, Stopping(5))
    tree = content(workspace)
    assert "run/stages/sft/checkpoints/step-00000005/manifest.json" in tree
    return tree


def said(workspace: Path, since: int, damage: Damage) -> str:
    """What the run told of damage; of a score that was missing, that it was measured."""
    found = told(workspace, since)
    words = [event["what"] for event in found if event["kind"] == "damaged"]
    if damage.data is None:
        words += [f"{event['stage']}/{event['when']}.json" for event in found if event["kind"] == "measure"]
    return "\n".join(words)


def wrong_after(damage: Damage, tree: Tree, whole: Whole, workspace: Path) -> str:
    """What is not as it must be when the recipe is run on a damaged workspace."""
    lay_out(damage.done_to(tree), workspace)
    log = workspace / "run" / "events.jsonl"
    since = log.stat().st_size if log.exists() else 0
    try:
        go(whole.recipe, workspace)
    except TunewrightError as error:
        words, wrong = str(error), "" if error.exit_code in (1, 2) else f"exit code {error.exit_code}"
    else:
        words = said(workspace, since, damage)
        if is_finished(tree) and "/checkpoints/" in damage.path:  # told, but nothing is made from it any more
            (workspace / damage.path).write_bytes(tree[damage.path] or b"")
        wrong = ", ".join(differences(whole.outcome, outcome(workspace / "run")))
    if not wrong and damage.path.startswith("run/") and damage.path not in REWRITTEN:
        wrong = "" if damage.is_named(words) else f"not told: {words!r}"
    clear(workspace)
    return wrong


def try_all(chosen: list[Damage], tree: Tree, whole: Whole, workspace: Path, tally) -> None:
    for damage in chosen:
        try:
            wrong = wrong_after(damage, tree, whole, workspace)
        except Exception as error:  # a traceback: counted, so that one does not hide the others
            wrong = f"{type(error).__name__}: {error}"
            clear(workspace)
        tally.add(not wrong, f"{damage.path} {damage.what}: {wrong}")


def of_run(name: str) -> bool:
    return name.startswith("run/")


def of_cache(name: str) -> bool:
    return name.startswith("cache/") and not name.endswith(".lock")


@pytest.mark.row(3)
def test_a_stopped_run_ends_exactly_or_refuses(finished, stopped, tmp_path, tally, times):
    try_all(chosen(stopped, of_run, times(9, ALL)), stopped, finished, tmp_path / "damaged", tally)


@pytest.mark.row(3)
def test_a_finished_run_is_mended_or_refused(finished, tmp_path, tally, times):
    every = chosen(finished.tree, of_run, times(9, ALL))
    try_all(every, finished.tree, finished, tmp_path / "damaged", tally)


@pytest.mark.row(3)
def test_token_tables_are_made_anew(finished, stopped, tmp_path, tally, times):
    try_all(chosen(stopped, of_cache, times(4, ALL)), stopped, finished, tmp_path / "damaged", tally)


@pytest.mark.row(3)
def test_built_in_data_is_made_anew(tmp_path, monkeypatch, tally):
    monkeypatch.setenv("TUNEWRIGHT_CACHE", str(tmp_path / "cache"))
    (made,) = prepare.sources([DataFile(path="builtin:demo-valid")])
    tree = content(tmp_path)
    for damage in chosen(tree, of_cache, ALL):
        clear(tmp_path / "cache")
        lay_out(damage.done_to(tree), tmp_path)
        prepare.sources([DataFile(path="builtin:demo-valid")])
        tally.add(
            made.path.read_bytes() == tree[made.path.relative_to(tmp_path).as_posix()], str(damage.what)
        )


def is_known(damage: Damage) -> bool:
    """Whether something tells that a finished run's file is not as it was: a hash, a checksum, another file."""
    name = Path(damage.path).name
    if damage.path in ("run/.owner", "run/recipe.yaml", "run/report.html"):
        return False
    if name in ("metrics.json", "results.json") or damage.path == "run/manifest.json":
        return damage.data is not None  # a kill may have come before it was written
    is_cut_after_a_line = damage.what == "cut to half" and (damage.data or b"").endswith((b"}", b"\n"))
    return name != "events.jsonl" or not is_cut_after_a_line


@pytest.mark.row(3)
def test_doctor_names_each_damaged_file(finished, tmp_path, tally):
    for damage in filter(is_known, chosen(finished.tree, of_run, ALL)):
        workspace = lay_out(damage.done_to(finished.tree), tmp_path / "damaged")
        found = doctor.examine(workspace / "run").damaged
        named = [finding for finding in found if damage.is_named(f"run/{finding.path} {finding.what}")]
        tally.add(bool(named), f"{damage.path} {damage.what}: {found}")
        clear(workspace)


@pytest.mark.row(3)
def test_doctor_exits_with_1_if_a_file_is_damaged(finished, tmp_path, tally):
    run, log = lay_out(finished.tree, tmp_path / "whole") / "run", tmp_path / "doctor.log"
    assert ended(finished.lab.command(["doctor", str(run)], log)) == 0
    weights = run / "stages" / "sft" / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(flipped(weights.read_bytes(), random.Random(0)))
    code = ended(finished.lab.command(["doctor", str(run)], log))
    tally.add(code == 1 and weights.name in log.read_text(), f"exit code {code}: {log.read_text()}")
