"""Row 8: a NaN or infinity in the forward pass, a gradient, the optimizer or a weight stops training before the
update, is named, and reaches no checkpoint.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bounded import LONG
from lab import Lab, passed_once
from safetensors.torch import load_file

from tunewright.core import store
from tunewright.core.errors import DivergedError
from tunewright.core.events import Event
from tunewright.train.loop import Trainer

AT = 8
"""The step that is spoiled."""
KEPT = 6
"""The checkpoint before it."""
VALUES = (math.nan, math.inf, -math.inf)


class Spoiler:
    """Spoils something at step ``AT`` and knows what the weights were before."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.before: dict[str, torch.Tensor] = {}
        self.victim = -1
        trainer.log.readers.append(self._watch)
        trainer.feed.batch = self._batch(trainer.feed.batch)  # type: ignore[method-assign]
        self.spoiled: torch.Tensor | None = None

    def _watch(self, event: Event) -> None:
        if event["kind"] == "step" and event["step"] == AT - 1:
            self.before = {name: tensor.clone() for name, tensor in self.trainer.optimizer.weights().items()}
            self.now()

    def now(self) -> None:
        """What happens between the two steps."""

    def _batch(self, real: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Remember which rows of the coming batch are the victim's: the last sample of the first micro-batch."""

        def batch(indices: Any) -> Any:
            if self.trainer.state.step == AT - 1 and self.before:
                self.victim = int(indices[-1]) if self.victim < 0 else self.victim
            self.rows = [i for i, index in enumerate(indices) if int(index) == self.victim]
            self.pending.append(self.rows)
            return real(indices)

        self.pending: list[list[int]] = []
        return batch

    def at_work(self) -> list[int]:
        """The victim's rows in the micro-batch that is computed now; they come in the order they were made."""
        return self.pending.pop(0) if self.pending else []


def spoil_forward(spoiler: Spoiler, value: float) -> None:
    """One sample's hidden states turn bad."""

    def hook(_: Any, __: Any, hidden: torch.Tensor) -> torch.Tensor:
        rows = spoiler.at_work()
        if not rows:
            return hidden
        mask = torch.zeros(len(hidden), 1, 1, dtype=torch.bool)
        mask[rows] = True
        return torch.where(mask, torch.full_like(hidden, value), hidden)

    spoiler.trainer.model.get_input_embeddings().register_forward_hook(hook)


def spoil_gradient(spoiler: Spoiler, value: float) -> None:
    """One sample's gradient turns bad, its loss does not."""

    def hook(_: Any, __: Any, hidden: torch.Tensor) -> None:
        rows = spoiler.at_work()
        if rows and hidden.requires_grad:
            mask = torch.zeros(len(hidden), 1, 1, dtype=torch.bool)
            mask[rows] = True
            hidden.register_hook(lambda grad: torch.where(mask, torch.full_like(grad, value), grad))

    spoiler.trainer.model.get_submodule(last_norm(spoiler.trainer)).register_forward_hook(hook)


def last_norm(trainer: Trainer) -> str:
    """Where every objective's gradient comes by."""
    return next(
        name for name, _ in trainer.model.named_modules() if name.endswith("model.norm") or name == "norm"
    )


def between_steps(change: Callable[[Trainer, float], None]) -> Callable[[Spoiler, float], None]:
    """Something on its own that turns bad between two steps."""

    def spoil(spoiler: Spoiler, value: float) -> None:
        spoiler.now = lambda: change(spoiler.trainer, value)  # type: ignore[method-assign]

    return spoil


def moment(key: str) -> Callable[[Spoiler, float], None]:
    """One number of the optimizer's state."""

    @torch.no_grad()
    def change(trainer: Trainer, value: float) -> None:
        name = next(name for name in trainer.optimizer.state() if name.endswith(key))
        trainer.optimizer.state()[name].view(-1)[3] = value

    return between_steps(change)


@between_steps
@torch.no_grad()
def spoil_trained(trainer: Trainer, value: float) -> None:
    """One number of a weight that is trained: in the master, which the next update would go out from."""
    next(iter(trainer.optimizer.masters.values())).view(-1)[3] = value


@between_steps
@torch.no_grad()
def spoil_frozen(trainer: Trainer, value: float) -> None:
    """One number of a weight that every token goes through."""
    trainer.model.get_submodule(last_norm(trainer)).weight.view(-1)[3] = value


FAULTS = {
    "forward": (spoil_forward, "jsonl:"),
    "gradient": (spoil_gradient, "jsonl:"),
    "first moment": (moment("exp_avg"), "exp_avg of "),
    "second moment": (moment("exp_avg_sq"), "exp_avg_sq of "),
    "trained weight": (spoil_trained, "weight "),
    "frozen weight": (spoil_frozen, "weight "),
}


def cases() -> list[tuple[str, str, str]]:
    """Every fault with every objective and precision; in the short run each of these with two faults, in turn."""
    apart = len(FAULTS) // 2
    return [
        (fault, objective, precision)
        for number, fault in enumerate(FAULTS)
        for place, (objective, precision) in enumerate(passed_once())
        if LONG or (place - number) % apart == 0
    ]


@pytest.mark.row(8)
@pytest.mark.parametrize(("fault", "objective", "precision"), cases())
def test_a_number_that_is_not_finite_stops_before_the_update(
    lab: Lab, tally, times, objective, precision, fault
):
    spoil, expected = FAULTS[fault]
    for value in VALUES[: times(1, 3)]:
        method = "lora" if fault == "frozen weight" else "full"
        trainer = lab.trainer(
            f"{fault} {value}".replace(" ", "-"), objective=objective, precision=precision, method=method,
            train={"eval_every": 0},
        )  # fmt: skip
        spoiler = Spoiler(trainer)
        spoil(spoiler, value)
        with pytest.raises(DivergedError) as stopped:
            trainer.run()
        told = str(stopped.value)
        where = trainer.data.where(spoiler.victim) if expected == "jsonl:" else expected
        tally.add(where in told and f"step {AT}" in told, f"{fault} {value}: expected {where!r} in {told!r}")
        tally.add(unchanged(trainer, spoiler, fault), f"{fault} {value}: a weight was updated")
        tally.add(kept_is_good(trainer), f"{fault} {value}: a bad checkpoint was kept")


def unchanged(trainer: Trainer, spoiler: Spoiler, fault: str) -> bool:
    """No weight moved, but for the one number that was spoiled."""
    moved = sum(int((now != spoiler.before[name]).sum()) for name, now in trainer.optimizer.weights().items())
    return moved == (1 if fault == "trained weight" else 0)


def kept_is_good(trainer: Trainer) -> bool:
    """The newest checkpoint is that of before, whole, every number finite."""
    newest = trainer.record.checkpoints.steps()[-1]
    store.verify(newest)
    tensors = [t for path in newest.glob("*.safetensors") for t in load_file(path).values()]
    return newest.name.endswith(f"{KEPT:08d}") and all(bool(torch.isfinite(t).all()) for t in tensors)
