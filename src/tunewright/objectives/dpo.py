"""Direct preference optimisation and its family: from pairs of answers, without a reward model."""

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from tunewright.core.config import Config as BaseConfig
from tunewright.core.words import Words
from tunewright.objectives import Batch, Facts
from tunewright.objectives._pairs import Answers, Preference
from tunewright.objectives._reference import Referred

Kind = Literal["sigmoid", "ipo", "hinge", "robust", "apo_zero", "apo_down", "sppo"]


class Config(BaseConfig):
    """Which member of the family, and how far the model may go from where it began."""

    loss: Kind = "sigmoid"
    """sigmoid (Rafailov et al. 2023, eq. 7), ipo (Azar et al. 2023, eq. 17; a token's mean), hinge (Zhao et al. 2023),
    robust (Chowdhury et al. 2024), apo_zero and apo_down (D'Oosterlinck et al. 2024, eqs. 7, 8), sppo (Wu et al. 2024).
    """
    beta: float = Field(0.1, gt=0)
    """How strongly the model is held to where it began; for ipo its regularisation."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """The share of pairs taken to be the wrong way round (cDPO, Mitchell 2023; and robust)."""
    length_normalised: bool = False
    """Whether log-probabilities are of a token and not of an answer, so that length gains nothing (sigmoid only)."""

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        if self.label_smoothing and self.loss not in ("sigmoid", "robust"):
            raise ValueError(f"label_smoothing is of sigmoid and robust, found loss {self.loss}")
        if self.loss == "robust" and not self.label_smoothing:
            raise ValueError("robust needs label_smoothing, the share of pairs that are wrong")
        if self.length_normalised and self.loss != "sigmoid":
            raise ValueError(f"length_normalised is of sigmoid, found loss {self.loss}")
        return self


def _sigmoid(config: Config, chosen_B: Tensor, rejected_B: Tensor) -> Tensor:
    lead_B, wrong = config.beta * (chosen_B - rejected_B), config.label_smoothing
    return -(1 - wrong) * logsigmoid(lead_B) - wrong * logsigmoid(-lead_B)


def _robust(config: Config, chosen_B: Tensor, rejected_B: Tensor) -> Tensor:
    lead_B, wrong = config.beta * (chosen_B - rejected_B), config.label_smoothing
    return (-(1 - wrong) * logsigmoid(lead_B) + wrong * logsigmoid(-lead_B)) / (1 - 2 * wrong)


def _hinge(config: Config, chosen_B: Tensor, rejected_B: Tensor) -> Tensor:
    return relu(1 - config.beta * (chosen_B - rejected_B))


def _ipo(config: Config, chosen_B: Tensor, rejected_B: Tensor) -> Tensor:
    return torch.square(chosen_B - rejected_B - 1 / (2 * config.beta))


def _apo_zero(config: Config, chosen_B: Tensor, rejected_B: Tensor) -> Tensor:
    return 1 - (config.beta * chosen_B).sigmoid() + (config.beta * rejected_B).sigmoid()


def _apo_down(config: Config, chosen_B: Tensor, rejected_B: Tensor) -> Tensor:
    return (config.beta * chosen_B).sigmoid() + 1 - (config.beta * (chosen_B - rejected_B)).sigmoid()


def _sppo(config: Config, chosen_B: Tensor, rejected_B: Tensor) -> Tensor:
    return torch.square(chosen_B - 0.5 / config.beta) + torch.square(rejected_B + 0.5 / config.beta)


_LOSSES: dict[str, Callable[[Config, Tensor, Tensor], Tensor]] = {
    "sigmoid": _sigmoid, "robust": _robust, "hinge": _hinge, "ipo": _ipo, "apo_zero": _apo_zero, "apo_down": _apo_down,
    "sppo": _sppo,
}  # fmt: skip
"""Losses [B] of how much likelier the answers became."""


class Dpo(Preference, Referred):
    """Raises the chosen answer over the rejected one, both against the model before training.

    An answer's reward is beta times how much likelier it became, in nats.
    """

    facts = Facts(
        idea=Words(
            "The chosen answer becomes likelier than the rejected one, both against the model before training.",
            "相对训练前的模型，使被选回答比被拒回答更可能。",
        ),
        formula="−log σ(β·(log π(y₁|x)/π₀(y₁|x) − log π(y₂|x)/π₀(y₂|x)))",
        dials=Words(
            "lr 10 to 100 times below that of sft; beta: lower lets the model go further. loss: ipo does not run away on pairs that are easily told apart; robust and label_smoothing where a known share of pairs is wrong.",
            "学习率取 sft 的十分之一到百分之一；beta 越小，模型可偏离得越远。loss：ipo 在容易区分的数据上不会无限增大间隔；已知一部分数据标反时用 robust 或 label_smoothing。",
        ),
        watch=Words(
            "accuracy and margin rise; chosen should not fall far below 0: then the chosen answer, too, becomes unlikely.",
            "accuracy 与 margin 上升；chosen 不应远低于 0，否则连被选回答也变得不可能。",
        ),
        when=Words(
            "Pairs of answers and a model that was fine-tuned before; the usual first choice.",
            "有成对回答，且模型已经过监督微调；通常的首选。",
        ),
        paper="Rafailov et al. 2023, arXiv:2305.18290",
    )

    def losses(self, found: Answers, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """By the recipe's ``loss``."""
        before_chosen_B, before_rejected_B = self.reference(found, batch)
        chosen_B, rejected_B = found.first_B - before_chosen_B, found.second_B - before_rejected_B
        if self.config.length_normalised or self.config.loss == "ipo":
            chosen_B, rejected_B = chosen_B / found.first_tokens_B, rejected_B / found.second_tokens_B
        beta = self.config.beta
        losses_B = _LOSSES[self.config.loss](self.config, chosen_B, rejected_B)
        return losses_B, (beta * chosen_B).detach(), (beta * rejected_B).detach()
