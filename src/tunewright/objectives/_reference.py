"""The model before training, as far as an objective asks it: what it said of each answer, kept as numbers.

It is asked once, so no second model is held and no pass of it is made twice.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from tunewright.core.errors import DataError, Problem
from tunewright.data.template import ChatCodec
from tunewright.models.announce import announced
from tunewright.objectives import Batch
from tunewright.objectives._pairs import NUMBER, Answers, TwoAnswers, answers

_NUMBERS, _SAID = "reference.numbers", "reference.log_probabilities"


class Referred(TwoAnswers):
    """For a loss that compares the model with what it was."""

    def __init__(self, config: Any, codec: ChatCodec) -> None:
        super().__init__(config, codec)
        self._said: dict[int, tuple[float, float]] = {}

    def begin(self, model: Any, batches: Iterable[Batch]) -> None:
        """Remember what the model says of these samples now."""
        learning, found = model.training, dict(self._said)
        model.eval()
        try:
            with torch.no_grad():
                for batch in batches:
                    if any(int(number) not in found for number in batch[NUMBER]):
                        found |= _all_said(model, batch)
        finally:
            model.train(learning)
        self._said = found  # all or nothing: what is asked again after memory ended is asked in other parts

    def reference(self, found: Answers, batch: Batch) -> tuple[Tensor, Tensor]:
        """Log-probabilities [B] of both answers; before :meth:`begin`, the model's own: it is its own reference.

        Raises:
            DataError: these samples came after the model had begun to learn.
        """
        if not self._said:
            return found.first_B.detach(), found.second_B.detach()
        known = [self._said.get(int(number)) for number in batch[NUMBER]]
        if strangers := known.count(None):
            what = f"the model before training was never asked about {strangers} rows: they are new, or of more steps than it began with"
            raise DataError(Problem("data", what, "begin again with --fresh"))
        both_B2 = found.first_B.new_tensor([said for said in known if said])
        return both_B2[:, 0], both_B2[:, 1]

    def state(self) -> dict[str, Tensor]:
        """What the reference said: numbers int64 [N] and log-probabilities fp64 [N, 2]."""
        if not self._said:
            return {}
        said_N2 = torch.tensor(list(self._said.values()), dtype=torch.float64)
        return {_NUMBERS: torch.tensor(list(self._said)), _SAID: said_N2}

    def set_state(self, state: dict[str, Tensor]) -> None:
        """Take it back."""
        super().set_state({name: x for name, x in state.items() if name not in (_NUMBERS, _SAID)})
        if state:
            both = [(a, b) for a, b in state[_SAID].tolist()]
            self._said = dict(zip(state[_NUMBERS].tolist(), both, strict=True))


def _all_said(model: Any, batch: Batch) -> dict[int, tuple[float, float]]:
    with announced(model, batch):
        found = answers(model, batch)
    both = zip(found.first_B.tolist(), found.second_B.tolist(), strict=True)
    return dict(zip(batch[NUMBER].tolist(), both, strict=True))
