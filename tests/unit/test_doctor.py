"""What a run folder is told to be: whole, damaged, and what can be gone on from."""

import json
import shutil
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tunewright import cli, doctor
from tunewright.core import journal, lock, store
from tunewright.core.errors import UserError
from tunewright.recipes import TrainConfig
from tunewright.train.checkpoint import Checkpoints
from tunewright.train.ledger import Ledger
from tunewright.train.optimizer import Masters
from tunewright.train.state import TrainState

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run that was killed after step 5: checkpoints of steps 2 and 4, the best of step 3."""
    folder, stage = tmp_path / "run", tmp_path / "run" / "stages" / "sft"
    ledger, log = Ledger(stage / "samples.jsonl"), journal.Journal(folder / "events.jsonl")
    checkpoints = Checkpoints(stage / "checkpoints", 2, keep_best=True)
    optimizer = Masters(nn.Linear(3, 2), TrainConfig(), 0.01)
    for step in range(1, 6):
        ledger.learned(step, [step, 7])
        log.append({"kind": "step", "step": step})
        if step == 3:
            checkpoints.save_best(optimizer, TrainState(step=3))
        if step % 2 == 0:
            checkpoints.save(optimizer, TrainState(step=step, best_step=3 if step > 3 else 0))
    store.write_record(folder / "manifest.json", {"status": "running"})
    store.write_record(stage / "inputs.json", {"train": {"lr": 0.1}})
    store.write_record(stage / "before.json", {"loss": 2.0})
    return folder


def finish(run: Path) -> Path:
    stage = run / "stages" / "sft"
    with store.artifact(stage / "adapter") as partial:
        store.write_text(partial / "adapter_model.safetensors", "weights")
    store.write_record(stage / "metrics.json", {"name": "sft"})
    store.write_record(stage / "after.json", {"loss": 1.0})
    store.write_record(run / "results.json", {"stages": []})
    return run


@pytest.fixture
def tunewright(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs the command line in this process: (exit code, stdout, stderr)."""

    def call(*argv: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tunewright", *map(str, argv)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return call


def everything(folder: Path) -> dict[str, tuple[bytes | None, int]]:
    """All files with their bytes and times."""
    return {
        path.relative_to(folder).as_posix(): (
            path.read_bytes() if path.is_file() else None,
            path.stat().st_mtime_ns,
        )
        for path in folder.rglob("*")
    }


def states(run: Path) -> dict[str, str]:
    return {finding.path: finding.state for finding in doctor.examine(run).findings}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


WHOLE = {
    "stages/sft/checkpoints/step-00000002", "stages/sft/checkpoints/step-00000004",
    "stages/sft/checkpoints/best-00000003", "manifest.json", "stages/sft/inputs.json", "stages/sft/before.json",
    "events.jsonl", "stages/sft/samples.jsonl",
}  # fmt: skip


def test_a_run_that_was_killed_is_whole_and_can_be_gone_on_from(run: Path) -> None:
    assert states(run) == dict.fromkeys(WHOLE, "whole")
    found = doctor.examine(run)
    assert found.damaged == []
    assert found.next == ("sft: running the recipe again goes on from step 4 (5 steps in the ledger)",)


def test_a_finished_run_is_reused(run: Path) -> None:
    found = doctor.examine(finish(run))
    assert {finding.state for finding in found.findings} == {"whole"}
    assert {finding.path for finding in found.findings} == WHOLE | {
        "stages/sft/adapter", "stages/sft/metrics.json", "stages/sft/after.json", "results.json",
    }  # fmt: skip
    assert found.next == ("sft: finished; running the recipe again reuses it",)


def test_a_run_without_a_checkpoint_starts_over(run: Path) -> None:
    shutil.rmtree(run / "stages" / "sft" / "checkpoints")
    assert doctor.examine(run).next == ("sft: no whole checkpoint; running the recipe again starts it over",)


def test_nothing_is_changed(run: Path) -> None:
    finish(run)
    flip(run / "results.json")
    flip(run / "stages" / "sft" / "checkpoints" / "step-00000004" / "state.json")
    (run / ".results.json.77.tmp").write_text("half")
    before = everything(run)
    assert doctor.examine(run).damaged
    assert everything(run) == before


FILES = sorted(WHOLE | {"stages/sft/adapter", "stages/sft/metrics.json", "results.json"})


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere_is_found_and_named(run: Path, name: str) -> None:
    path = finish(run) / name
    flip(max(path.rglob("*.safetensors")) if path.is_dir() else path)
    (damaged,) = doctor.examine(run).damaged
    assert damaged.path == name
    assert damaged.what


@pytest.mark.parametrize("file", ["manifest.json", "state.json", "optimizer.safetensors"])
def test_a_missing_file_of_a_checkpoint_is_found_and_the_older_one_gone_on_from(run: Path, file: str) -> None:
    (run / "stages" / "sft" / "checkpoints" / "step-00000004" / file).unlink()
    found = doctor.examine(run)
    (damaged,) = found.damaged
    assert damaged.path == "stages/sft/checkpoints/step-00000004"
    assert file in damaged.what
    assert found.next[0].startswith("sft: running the recipe again goes on from step 2 ")


def test_a_damaged_result_is_made_again(run: Path) -> None:
    for name in ("stages/sft/metrics.json", "stages/sft/adapter/adapter_model.safetensors"):
        flip(finish(run) / name)
        assert doctor.examine(run).next[0].startswith("sft: running the recipe again goes on from step 4 ")
        shutil.rmtree(run / "stages" / "sft" / "adapter")


def test_a_checkpoint_whose_best_weights_are_damaged_is_not_gone_on_from(run: Path) -> None:
    flip(run / "stages" / "sft" / "checkpoints" / "best-00000003" / "trainable.safetensors")
    optimizer = Masters(nn.Linear(3, 2), TrainConfig(), 0.01)
    said = doctor.examine(run).next[0]
    restored = Checkpoints(run / "stages" / "sft" / "checkpoints", 2, keep_best=True).restore(optimizer)
    assert restored.state is not None
    assert said.startswith(f"sft: running the recipe again goes on from step {restored.state.step} ")


def test_what_killed_writers_left_is_told_and_is_no_damage(run: Path) -> None:
    left = ["stages/sft/.metrics.json.77.tmp", "stages/sft/checkpoints/.step-00000006.77.partial"]
    (run / left[0]).write_text("half")
    (run / left[1]).mkdir()
    found = doctor.examine(run)
    assert found.damaged == []
    assert [finding.path for finding in found.findings if finding.state == "leftover"] == left


def test_what_was_put_aside_is_a_note(run: Path) -> None:
    checkpoints = run / "stages" / "sft" / "checkpoints"
    flip(checkpoints / "step-00000004" / "state.json")
    Checkpoints(checkpoints, 2).restore(Masters(nn.Linear(3, 2), TrainConfig(), 0.01))
    found = doctor.examine(run)
    assert found.damaged == []
    notes = [finding.path for finding in found.findings if finding.state == "note"]
    assert notes == ["stages/sft/checkpoints/damaged-step-00000004"]


def test_a_line_that_a_kill_cut_short_is_told(run: Path) -> None:
    path = run / "stages" / "sft" / "samples.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    (damaged,) = doctor.examine(run).damaged
    assert (damaged.path, damaged.what) == (
        "stages/sft/samples.jsonl",
        "1 lines are not as they were written",
    )
    assert "(4 steps in the ledger)" in doctor.examine(run).next[0]


def test_an_owner_is_told(run: Path) -> None:
    with lock.sole_owner(run):
        assert doctor.examine(run).next[-1] == "a process is writing here now"
    assert "a process is writing here now" not in doctor.examine(run).next


@pytest.mark.parametrize("name", ["none", "empty"])
def test_what_is_no_run_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is not a run folder"):
        doctor.examine(tmp_path / name)


# The command


def test_the_command_tells_people(tunewright: Command, run: Path) -> None:
    code, out, err = tunewright("doctor", run)
    assert (code, err) == (0, "")
    *rows, after = out.splitlines()
    assert len(rows) == len(WHOLE)
    assert all(row.startswith("whole ") for row in rows)
    assert after == "sft: running the recipe again goes on from step 4 (5 steps in the ledger)"


def test_the_command_exits_with_1_if_anything_is_damaged(tunewright: Command, run: Path) -> None:
    flip(run / "stages" / "sft" / "before.json")
    code, out, _ = tunewright("doctor", run)
    assert code == 1
    (row,) = [row for row in out.splitlines() if row.startswith("damaged ")]
    assert "stages/sft/before.json" in row
    assert "it differs from what was written" in row or "not readable as JSON" in row


def test_the_command_exits_with_2_where_there_is_no_run(tunewright: Command, tmp_path: Path) -> None:
    code, out, err = tunewright("doctor", tmp_path / "none")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: run: {tmp_path / 'none'} is not a run folder")
    code, out, _ = tunewright("doctor", tmp_path / "none", "--json")
    assert code == 2
    assert json.loads(out)["status"] == "failed"


@pytest.mark.parametrize("damaged", [False, True])
def test_the_command_tells_machines_in_one_line(tunewright: Command, run: Path, damaged: bool) -> None:
    if damaged:
        flip(run / "manifest.json")
    code, out, _ = tunewright("doctor", run, "--json")
    assert code == int(damaged)
    (line,) = out.splitlines()
    found: dict[str, Any] = json.loads(line)
    assert found["run"] == str(run)
    assert found["damaged"] == int(damaged)
    assert {finding["path"] for finding in found["findings"]} == WHOLE
    assert {finding["state"] for finding in found["findings"]} == {"whole"} | (
        {"damaged"} if damaged else set()
    )
    assert found["next"] == ["sft: running the recipe again goes on from step 4 (5 steps in the ledger)"]


def test_without_a_folder_the_command_tells_of_this_machine(tunewright: Command) -> None:
    code, out, _ = tunewright("doctor")
    assert code == 0
    told = {line.split()[0] for line in out.splitlines()}
    assert {"python", "torch", "transformers", "processor", "memory", "accelerators"} <= told
    code, out, _ = tunewright("doctor", "--json")
    assert code == 0
    assert json.loads(out)["versions"]["torch"] == metadata.version("torch")
