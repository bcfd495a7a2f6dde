"""The training loop when it is stopped, and when its files are damaged: it ends as if nothing had been."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from training import LORA, OTHERS, MakeTrainer, learned, logged, losses, same, weights

from tunewright.core import events, store
from tunewright.core.disk import Disk
from tunewright.core.errors import DamagedError, InterruptedRunError
from tunewright.train.guard import Preemption
from tunewright.train.loop import Trainer
from tunewright.train.state import TrainState

# Signals


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """No test leaves a handler."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def sends(number: int, kind: str, step: int) -> Callable[[events.Event], None]:
    """A reader that sends this process a signal at an event."""

    def reader(event: events.Event) -> None:
        if (event["kind"], event.get("step")) == (kind, step):
            os.kill(os.getpid(), number)

    return reader


SIGNALS = {"method": LORA, "lr": 0.01, "max_steps": 8, "micro_tokens": 32, "valid": OTHERS, "eval_every": 3,
           "save_every": 4}  # fmt: skip


def preempted(trainer: Trainer) -> InterruptedRunError:
    with Preemption() as preemption:
        trainer.preemption = preemption
        with pytest.raises(InterruptedRunError) as caught:
            trainer.run()
    return caught.value


@pytest.mark.parametrize(
    ("number", "kind", "at", "saved"),
    [(signal.SIGTERM, "train", 0, 0), (signal.SIGINT, "step", 1, 1), (signal.SIGTERM, "step", 5, 5),
     (signal.SIGTERM, "checkpoint", 4, 4), (signal.SIGINT, "eval", 6, 6), (signal.SIGTERM, "step", 8, 8)],
)  # fmt: skip
def test_a_signal_ends_the_run_with_a_checkpoint_of_that_very_step(
    make_trainer: MakeTrainer, tmp_path: Path, number: int, kind: str, at: int, saved: int
) -> None:
    stopped = make_trainer(folder="stopped", readers=[sends(number, kind, at)], **SIGNALS)
    error = preempted(stopped)
    assert error.exit_code == 128 + number
    assert len(losses(tmp_path, "stopped")) == saved
    assert [e["step"] for e in logged(tmp_path, "checkpoint", "stopped")][-1:] == ([saved] if saved else [])

    whole, resumed = make_trainer(folder="whole", **SIGNALS), make_trainer(folder="stopped", **SIGNALS)
    state, resumed_state = whole.run(), resumed.run()
    resumed_state.seconds = state.seconds
    assert resumed_state == state
    assert same(weights(resumed), weights(whole))
    assert losses(tmp_path, "stopped") == losses(tmp_path, "whole")
    assert learned(tmp_path, "stopped") == learned(tmp_path, "whole")


@pytest.mark.parametrize("operation", ["make_folder", "settle", "rename"])
def test_a_second_signal_inside_the_save_spoils_nothing(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    class Interrupted(Disk):
        def __getattribute__(self, name: str) -> Any:
            if name == operation:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__getattribute__(name)

    def arm(event: events.Event) -> None:
        if event["kind"] == "step" and event["step"] == 5:
            os.kill(os.getpid(), signal.SIGTERM)
            monkeypatch.setattr(store, "disk", Interrupted())

    trainer = make_trainer(readers=[arm], **SIGNALS)
    assert preempted(trainer).exit_code == 143
    monkeypatch.undo()
    assert store.verify(tmp_path / "run" / "checkpoints" / "step-00000005")["step"] == 5
    assert store.leftovers(tmp_path / "run") == []


# Damaged files


def spoil(path: Path) -> None:
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


def test_a_damaged_checkpoint_is_told_and_the_run_ends_as_if_it_were_not(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    whole = make_trainer(folder="whole", **SIGNALS)
    state = whole.run()
    stopped = make_trainer(folder="stopped", readers=[sends(signal.SIGTERM, "step", 7)], **SIGNALS)
    preempted(stopped)
    spoil(tmp_path / "stopped" / "checkpoints" / "step-00000007" / "optimizer.safetensors")
    resumed = make_trainer(folder="stopped", **SIGNALS)
    resumed_state = resumed.run()
    (event,) = logged(tmp_path, "damaged", "stopped")
    assert "step-00000007/optimizer.safetensors" in event["what"]
    assert [event["step"] for event in logged(tmp_path, "resume", "stopped")] == [4]
    resumed_state.seconds = state.seconds
    assert resumed_state == state
    assert same(weights(resumed), weights(whole))
    assert learned(tmp_path, "stopped") == learned(tmp_path, "whole")


FORGETS = {
    "valid": OTHERS,
    "lr": 0.03,
    "eval_every": 1,
    "max_steps": 12,
    "schedule": "constant",
    "save_every": 2,
}


@pytest.mark.parametrize("restart_at", ["an older checkpoint", "the start"])
def test_damaged_best_weights_are_made_again(
    make_trainer: MakeTrainer, tmp_path: Path, restart_at: str
) -> None:
    settings = {**FORGETS, "keep": 9 if restart_at == "an older checkpoint" else 1}
    whole = make_trainer(folder="whole", **settings)
    state = whole.run()
    assert 2 < state.best_step < state.step
    make_trainer(folder="spoilt", **settings).run()
    spoil(tmp_path / "spoilt" / "checkpoints" / f"best-{state.best_step:08d}" / "trainable.safetensors")
    again = make_trainer(folder="spoilt", **settings)
    again_state = again.run()
    resumed = [event["step"] for event in logged(tmp_path, "resume", "spoilt")]
    assert all(0 < step < state.best_step for step in resumed)
    assert len(resumed) == (1 if restart_at == "an older checkpoint" else 0)
    assert f"best-{state.best_step:08d}" in logged(tmp_path, "damaged", "spoilt")[0]["what"]
    again_state.seconds = state.seconds
    assert again_state == state
    assert same(weights(again), weights(whole))


def test_best_weights_damaged_while_training_goes_on_are_not_the_result(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    trainer = make_trainer(**FORGETS)

    def damage(event: events.Event) -> None:
        if event["kind"] == "checkpoint" and event["step"] == 12:
            for path in (tmp_path / "run" / "checkpoints").glob("best-*/trainable.safetensors"):
                spoil(path)

    trainer.log.readers.append(damage)
    with pytest.raises(DamagedError, match="its bytes differ"):
        trainer.run()


@pytest.mark.parametrize("how", ["missing", "cut", "flipped"])
def test_a_damaged_ledger_is_written_again_and_told(
    make_trainer: MakeTrainer, tmp_path: Path, how: str
) -> None:
    make_trainer(folder="whole", max_steps=8).run()
    make_trainer(max_steps=5).run()
    path = tmp_path / "run" / "samples.jsonl"
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    else:
        spoil(path)
    make_trainer(max_steps=8).run()
    assert learned(tmp_path) == learned(tmp_path, "whole")
    (event,) = logged(tmp_path, "damaged")
    assert event["what"].startswith(f"{path}: ")


def test_an_undamaged_ledger_is_left_alone(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    make_trainer(max_steps=4, save_every=2).run()
    written = (tmp_path / "run" / "samples.jsonl").read_bytes()
    state: TrainState = make_trainer(max_steps=4, save_every=2).run()
    assert state.step == 4
    assert (tmp_path / "run" / "samples.jsonl").read_bytes() == written
    assert logged(tmp_path, "damaged") == []
