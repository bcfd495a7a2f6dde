"""LwF: what the model said before of the new data, it shall go on saying (Li & Hoiem 2016)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import kl_div
from torch.utils.checkpoint import checkpoint

from tunewright.core.config import Config as BaseConfig
from tunewright.core.words import Words
from tunewright.models import likelihood
from tunewright.models.announce import announced
from tunewright.objectives import Batch
from tunewright.regularizers import Facts, Old, Regularizer, Start

_ROWS = 256
"""Tokens whose distributions are held at a time."""


class Config(BaseConfig):
    """How strongly, and how softly."""

    weight: float = Field(1.0, gt=0)
    """Of the divergence, in nats a token."""
    temperature: float = Field(2.0, gt=0)
    """Above 1 unlikely words count more."""


class Lwf(Regularizer):
    """Adds the divergence of the model's words from those that it would have said before, over the new data."""

    facts = Facts(
        idea=Words(
            "On the new data, the model's distribution of words is held near what it was before training.",
            "在新数据上，使模型的词分布接近训练前的分布。",
        ),
        formula="λ·T²·KL(softmax(z₀/T) ‖ softmax(z/T)), a token's mean",
        when=Words(
            "No old data, and outputs matter more than weights.", "没有旧数据，且更看重输出而非权重时。"
        ),
        paper="Li & Hoiem 2016, arXiv:1606.09282",
    )

    def begin(self, start: Start, old: Old | None) -> None:
        """Keep the start."""
        self._start = start
        self._before: dict[int, Tensor] = {}

    def look(self, model: Any, batches: Sequence[Batch], progress: float) -> None:
        """What the output layer would be given of all that will be learned, as it was before training."""
        self._before = {}  # of a step that was cut smaller, some were never asked for
        with torch.no_grad(), self._start.standing_in(model):
            for batch in batches:
                with announced(model, batch):
                    self._before[id(batch)] = likelihood.words(model, batch)[0]

    def loss(self, model: Any, batch: Batch) -> Tensor | None:
        """Where the batch has labels; the model is passed once more."""
        before_ND = self._before.pop(id(batch))
        states_ND, words = likelihood.words(model, batch)
        with torch.no_grad(), self._start.standing_in(model):  # the output layer alone
            before = [self._logs(words, rows).clone() for rows in torch.split(before_ND, _ROWS)]
        parts = zip(torch.split(states_ND, _ROWS), before, strict=True)
        sums = [checkpoint(self._divergence, words, rows, logs, use_reentrant=False) for rows, logs in parts]
        weight: float = self.config.weight * self.config.temperature**2
        return weight * torch.stack(sums).sum() / len(before_ND)

    def _logs(self, words: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        logs_NV: Tensor = (words(rows).float() / self.config.temperature).log_softmax(-1)
        return logs_NV

    def _divergence(self, words: Callable[[Tensor], Tensor], rows: Tensor, before_NV: Tensor) -> Tensor:
        return kl_div(self._logs(words, rows), before_NV, reduction="sum", log_target=True)
