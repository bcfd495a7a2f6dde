"""DANN: what the model makes of two domains shall not tell them apart (Ganin et al. 2016)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from tunewright.core.config import Config as BaseConfig
from tunewright.core.words import Words
from tunewright.models import likelihood
from tunewright.models.announce import announced
from tunewright.models.likelihood import IGNORED
from tunewright.objectives import Batch
from tunewright.recipes.schema import DataFiles
from tunewright.regularizers import Facts, Old, Regularizer, Start

_JUDGE = "tunewright_domain"
_STEEPNESS = 10.0
"""Of the rise of the weight over training (Ganin et al. 2016, section 5.2.2)."""


class Config(BaseConfig):
    """The other domain, and how strongly both are made alike."""

    data: DataFiles = ()
    """The other domain: files as in ``data.train``; its answers are not learned."""
    weight: float = Field(0.1, gt=0)
    """Of the reversed gradient, at the end of training; it rises from 0."""
    width: int = Field(64, ge=1)
    """Hidden units of the classifier that tells the domains apart."""


class Dann(Regularizer):
    """A classifier learns to tell domains by a sample's mean hidden state; the model learns that it cannot.

    The classifier is trained with the model, but is no part of what is saved.
    """

    facts = Facts(
        idea=Words(
            "A classifier tells the domains apart by hidden states; its gradient, reversed, makes them alike.",
            "分类器根据隐藏状态区分两个领域；其梯度反转后使两个领域的表示趋同。",
        ),
        formula="cross-entropy of the domain by the mean state h; ∂/∂h times −λ·(2/(1 + e^(−10p)) − 1), p the share of steps done",
        when=Words(
            "Answers are at hand in one domain only, and the model shall serve another; watch domain_accuracy fall to 0.5.",
            "只有一个领域有答案，而模型要用于另一领域时；关注 domain_accuracy 降到 0.5。",
        ),
        paper="Ganin et al. 2016, arXiv:1505.07818",
    )

    wants_old = True

    @property
    def old(self) -> DataFiles:
        """The other domain's."""
        files: DataFiles = self.config.data
        return files

    def attach(self, model: Any) -> None:
        """The classifier."""
        weight, config = next(model.parameters()), model.config.get_text_config()
        judge = nn.Sequential(
            nn.Linear(config.hidden_size, self.config.width), nn.GELU(), nn.Linear(self.config.width, 1)
        )
        setattr(model, _JUDGE, judge.to(weight.device, weight.dtype))

    def release(self, model: Any) -> None:
        """The model is a language model again."""
        delattr(model, _JUDGE)

    def begin(self, start: Start, old: Old | None) -> None:
        """Keep the other domain."""
        self._old, self._drawn, self._figures = old, dict[int, Batch](), dict[str, float]()

    def look(self, model: Any, batches: Sequence[Batch], progress: float) -> None:
        """For each batch, as many samples of the other domain."""
        assert self._old  # noqa: S101 our own bug
        self._strength = self.config.weight * (2 / (1 + math.exp(-_STEEPNESS * progress)) - 1)
        self._drawn = {}
        for batch in batches:
            picked = torch.randint(self._old.count, (len(batch["labels"]),))
            self._drawn[id(batch)] = self._old.batch(picked.tolist())

    def loss(self, model: Any, batch: Batch) -> Tensor | None:
        """The classifier's mean cross-entropy over both domains; the model is passed twice more."""
        other = self._drawn.pop(id(batch))
        with announced(model, other):
            theirs_BD = _pooled(model, other)
        states_BD = torch.cat([_pooled(model, batch), theirs_BD])
        domains_B = torch.arange(len(states_BD), device=states_BD.device) >= len(states_BD) - len(theirs_BD)
        reversed_BD: Tensor = _Reversed.apply(states_BD, self._strength)  # type: ignore[no-untyped-call]
        found_B = getattr(model, _JUDGE)(reversed_BD)[:, 0].float()
        self._figures = {"domain_accuracy": float(((found_B > 0) == domains_B).float().mean())}
        return F.binary_cross_entropy_with_logits(found_B, domains_B.float())

    def figures(self) -> dict[str, float]:
        """How often the classifier was right about the last batch."""
        return self._figures


def _pooled(model: Any, batch: Batch) -> Tensor:
    """The mean [B, D] of the last hidden states of what is learned of each row."""
    labels_BT = batch["labels"]
    rows_N = (labels_BT != IGNORED).nonzero()[:, 0]
    states_ND = likelihood.states(model, batch)
    sums_BD = states_ND.new_zeros(len(labels_BT), states_ND.shape[1]).index_add(0, rows_N, states_ND)
    counts_B = torch.bincount(rows_N, minlength=len(labels_BT)).clamp_min(1)
    return sums_BD / counts_B[:, None].to(sums_BD.dtype)


class _Reversed(torch.autograd.Function):
    """Nothing forwards; backwards the gradient is turned round, and weighed."""

    @staticmethod
    def forward(ctx: Any, states_BD: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return states_BD.view_as(states_BD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * grads[0], None
