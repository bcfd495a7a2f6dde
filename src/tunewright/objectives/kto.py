"""KTO: from single answers that were judged good or bad, as a gain or a loss (Ethayarajh et al. 2024)."""

from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from tunewright.core.config import Config as BaseConfig
from tunewright.core.errors import Problem
from tunewright.core.words import Words
from tunewright.data.rows import Row
from tunewright.data.template import ChatCodec
from tunewright.models.announce import announced
from tunewright.objectives import Batch, Facts, Sample
from tunewright.objectives._pairs import Answers, half, said
from tunewright.objectives._reference import Referred

_LIKED = "liked"


class Config(BaseConfig):
    """How much good and bad answers count."""

    loss: Literal["kto", "apo_zero"] = "kto"
    """kto (eqs. 7, 8), or apo_zero without the divergence as its point of reference (D'Oosterlinck et al. 2024)."""
    beta: float = Field(0.1, gt=0)
    """How strongly the model is held to where it began."""
    good: float = Field(1.0, ge=0)
    """Weight of a good answer; where good ones are few, raise it until both sides weigh alike."""
    bad: float = Field(1.0, ge=0)
    """Weight of a bad answer."""


class Kto(Referred):
    """Makes good answers likelier and bad ones less likely, against how far the model has moved altogether.

    That distance is the divergence of answers to other questions: each prompt with the answer of the row before it.
    """

    wants = "verdicts"
    sides = ("own", "other row's")
    facts = Facts(
        idea=Words(
            "Good answers become likelier and bad ones less likely, measured from how far the model has moved at all.",
            "提高好回答的概率，降低坏回答的概率，以模型整体移动的距离为参照点。",
        ),
        formula="w · (1 − σ(±β·(log π(y|x)/π₀(y|x) − z))), z = max(0, mean of log π(y'|x)/π₀(y'|x)), y' another row's answer",
        dials=Words(
            "good and bad so that good x (number of good rows) is 1 to 1.33 times bad x (number of bad ones); beta as in dpo.",
            "调节 good 与 bad，使 good×好样本数 为 bad×坏样本数 的 1 到 1.33 倍；beta 同 dpo。",
        ),
        watch=Words(
            "margin and accuracy rise; divergence stays small (a few nats).",
            "margin 与 accuracy 上升；divergence 保持在几个 nat 以内。",
        ),
        when=Words(
            "Answers come with a thumb up or down and not in pairs.",
            "反馈只有单个回答的赞或踩，没有成对比较时。",
        ),
        paper="Ethayarajh et al. 2024, arXiv:2402.01306",
    )

    def __init__(self, config: Any, codec: ChatCodec) -> None:
        super().__init__(config, codec)
        self._divergence = 0.0

    def both(self, rows: list[Row]) -> list[tuple[Row, Row] | Problem]:
        """The row, and its question with the answer of the one before; the first is after the last."""
        judged = [row for row in rows if row.liked is not None and row.answered]
        others = iter([*judged[-1:], *judged[:-1]])
        return [
            (row, row.answering(next(others).messages[-1].content)) if row.liked is not None and row.answered
            else Problem(row.where, "no verdict on one answer", "give it kto_tag or label, true or false")
            for row in rows
        ]  # fmt: skip

    def fields(self, row: Row) -> Sample:
        """Whether the answer is good."""
        return {_LIKED: np.array([bool(row.liked)], np.uint8)}

    def collate(self, samples: list[Sample]) -> Batch:  # type: ignore[override]
        """Also ``liked`` [B]."""
        liked_B = torch.tensor([bool(sample[_LIKED][0]) for sample in samples])
        return {_LIKED: liked_B, **super().collate(samples)}

    def look(self, model: Any, batches: list[Batch]) -> None:  # type: ignore[override]
        """How far the model is from where it began: the mean over all answers to other questions, at least 0."""
        if self.config.loss == "apo_zero":
            return
        total, count = 0.0, 0
        with torch.no_grad():
            for batch in batches:
                found = self._answers(model, batch, second=True)
                total += float((found.second_B - self.reference(found, batch)[1]).sum())
                count += len(found.second_B)
        self._divergence = max(0.0, total / count)

    def _answers(self, model: Any, batch: Batch, second: bool) -> Answers:
        """Of one side; the other's numbers are the same."""
        rows = half(batch, second)
        with announced(model, rows):
            said_B, tokens_B = said(model, rows)
        return Answers(said_B, said_B, tokens_B, tokens_B)

    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """1 - sigmoid(+- (beta * how much likelier the answer became - beta * divergence)), a row's mean."""
        found = self._answers(model, batch, second=False)
        rewards_B = self.config.beta * (found.first_B - self.reference(found, batch)[0])
        lead_B = rewards_B - self.config.beta * self._divergence
        liked_B = batch[_LIKED]
        losses_B = torch.where(
            liked_B, self.config.good * (1 - lead_B.sigmoid()), self.config.bad * (1 - (-lead_B).sigmoid())
        )
        right_B = ((lead_B > 0) == liked_B).float()
        signed_B = torch.where(liked_B, rewards_B, -rewards_B).detach()
        return losses_B.mean(), {
            "accuracy": float(right_B.mean()), "margin": float(signed_B.mean()), "divergence": self._divergence,
        }  # fmt: skip
