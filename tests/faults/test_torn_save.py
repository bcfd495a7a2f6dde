"""Row 2: a kill inside a save, at every operation of the store and halfway through each; the newest complete
checkpoint is found and the end is exact.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from disks import (
    Operation,
    Tree,
    Whole,
    clear,
    go,
    is_finished,
    lay_out,
    newest_checkpoint,
    recorded,
    spread,
    told,
    whole,
)
from lab import combinations, differences, outcome

FIRST = ("sft", "fp32")
OTHERS = [combination for combination in combinations() if combination != FIRST]


@pytest.fixture(scope="module")
def plain(tmp_path_factory, tiny_model_folder) -> Whole:
    objective, precision = FIRST
    folder = tmp_path_factory.mktemp("torn")
    return whole(folder, tiny_model_folder, objective=objective, precision=precision)


# The states that a kill can leave


def below(tree: Tree, path: str) -> list[str]:
    """The path and all in it."""
    return [name for name in tree if name == path or name.startswith(f"{path}/")]


def after(tree: Tree, done: Operation, half: bool = False) -> Tree:
    """The tree once the operation is done, or half done."""
    made = dict(tree)
    if done.kind == "make_folder":
        made.setdefault(done.path, None)
    elif done.data is not None:
        written = done.data[: len(done.data) // 2] if half else done.data
        made[done.path] = ((tree.get(done.path) or b"") if done.kind == "append" else b"") + written
    elif done.kind == "rename" and not half:
        made |= {done.target + name[len(done.path) :]: made.pop(name) for name in below(tree, done.path)}
    elif done.kind in ("remove", "remove_folder"):
        gone = sorted(below(tree, done.path), reverse=True)  # what is in a folder goes before it
        for name in gone[: len(gone) // 2] if half else gone:
            del made[name]
    return made


def kills(operations: Iterable[Operation], tree: Tree) -> Iterator[tuple[str, Tree]]:
    """Every state that a kill can leave, by name: the operations up to one, and that one half done as well."""
    seen = [tree]
    for count, done in enumerate(operations, 1):
        for half in (True, False):
            left = after(tree, done, half)
            if left not in seen[-2:]:
                yield f"{'half of ' if half else ''}{count}: {done.kind} {done.path}", left
            seen = [*seen[-1:], left]
        tree = left


def power_cuts(operations: Iterable[Operation]) -> Iterator[tuple[str, Tree]]:
    """What a loss of power can leave after each rename: lines that were added and not flushed are gone."""
    tree: Tree = {}
    flushed: Tree = {}
    for count, done in enumerate(operations, 1):
        tree = after(tree, done)
        if done.kind == "append":
            flushed.setdefault(done.path, b"")
        elif done.path in flushed:
            flushed[done.path] = done.data
        elif done.kind == "rename":
            yield f"{count}: {done.kind} {done.path}", tree | flushed


def not_flushed(operations: Iterable[Operation]) -> Iterator[tuple[str, list[str]]]:
    """Each rename, and what would be empty or absent at its target if power went just then."""
    tree: Tree = {}
    unlisted: set[str] = set()
    for done in operations:
        if done.kind == "rename":
            inside = {f"{done.path}/{name}" if name else done.path: data for name, data in done.holds.items()}
            lost = [name for name, data in inside.items() if data is not None and tree.get(name) != data]
            lost += [name for name in below(tree, done.path) if name in unlisted]
            yield f"{done.path} -> {done.target}", lost
        tree = after(tree, done)
        if done.kind == "settle" and done.data is None:
            unlisted.discard(done.path)
        elif done.kind != "settle":
            unlisted |= {str(Path(name).parent) for name in (done.path, done.target) if name}


# Runs from there


def wrong_after(tree: Tree, whole: Whole, workspace: Path) -> list[str]:
    """What is not as it must be when the recipe is run on what a kill left."""
    lay_out(tree, workspace)
    go(whole.recipe, workspace)
    found = differences(whole.outcome, outcome(workspace / "run"))
    since = len(tree.get("run/events.jsonl") or b"")
    resumed = [event["step"] for event in told(workspace, since) if event["kind"] == "resume"]
    newest = None if is_finished(tree) else newest_checkpoint(tree)
    if resumed != ([] if newest is None else [newest]):
        found.append(f"it went on from {resumed}, the newest checkpoint is {newest}")
    found += [str(path) for path in (workspace / "run").rglob(".*") if path.name != ".owner"]
    clear(workspace)
    return found


def try_all(states: Iterable[tuple[str, Tree]], whole: Whole, tmp_path: Path, tally) -> None:
    for what, tree in states:
        wrong = wrong_after(tree, whole, tmp_path / "torn")
        tally.add(not wrong, f"{what}: {wrong}")


@pytest.mark.row(2)
def test_a_kill_at_every_operation_leaves_a_run_that_ends_exactly(plain, tmp_path, tally, times):
    states = list(kills(plain.operations, {}))
    try_all(spread(states, times(7, len(states))), plain, tmp_path, tally)


@pytest.mark.row(2)
@pytest.mark.parametrize(("objective", "precision"), OTHERS)
def test_so_it_does_with_every_objective_and_precision(
    tmp_path, tiny_model_folder, tally, times, objective, precision
):
    other = whole(tmp_path, tiny_model_folder, objective=objective, precision=precision)
    try_all(spread(list(kills(other.operations, {})), times(2, 40)), other, tmp_path, tally)


@pytest.mark.row(2)
def test_so_it_does_while_an_older_result_is_replaced(plain, tmp_path, tally, times):
    saved = "run/stages/sft/adapter/manifest.json"
    begun = next(t for _, t in kills(plain.operations, {}) if saved in t and not is_finished(t))
    again = recorded(plain.recipe, lay_out(begun, tmp_path / "again"))
    states = [
        (what, tree) for what, tree in kills(again, begun) if any("/.adapter." in name for name in tree)
    ]
    assert any(name.endswith(".old") for _, tree in states for name in tree)
    try_all(spread(states, times(4, len(states))), plain, tmp_path, tally)


@pytest.mark.row(2)
def test_lines_that_a_loss_of_power_took_cost_nothing(plain, tmp_path, tally, times):
    states = list(power_cuts(plain.operations))
    try_all(spread(states, times(4, len(states))), plain, tmp_path, tally)


@pytest.mark.row(2)
def test_what_is_renamed_was_flushed_before(plain, tally):
    for what, lost in not_flushed(plain.operations):
        tally.add(not lost, f"{what}: {lost} may be lost")


def test_all_operations_together_give_the_folder_that_the_run_left(plain):
    *_, (_, last) = kills(plain.operations, {})
    real = {name: data for name, data in plain.tree.items() if not name.endswith((".owner", ".lock"))}
    assert {n: d for n, d in last.items() if d is not None} == {
        n: d for n, d in real.items() if d is not None
    }
