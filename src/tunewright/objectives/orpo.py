"""ORPO: fine-tuning and preference in one, by the odds of both answers (Hong, Lee & Thorne 2024)."""

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from tunewright.core.config import Config as BaseConfig
from tunewright.core.words import Words
from tunewright.objectives import Batch, Facts
from tunewright.objectives._pairs import Answers, Preference

_LEAST = 1e-7
"""Nats that an answer is held below certainty, where odds have no end."""


class Config(BaseConfig):
    """How much the preference counts beside the fine-tuning."""

    beta: float = Field(0.1, gt=0)
    """Weight of the odds ratio; lambda in the paper."""


class Orpo(Preference):
    """Learns the chosen answer, and that its odds shall be above the rejected one's (eqs. 6, 7)."""

    facts = Facts(
        idea=Words(
            "Fine-tuning on the chosen answer, and a term that holds its odds above the rejected one's.",
            "对被选回答做监督微调，并加一项使其几率高于被拒回答。",
        ),
        formula="−log π(y₁|x)/|y₁| − β·log σ(log odds(y₁|x) − log odds(y₂|x)), odds(y) = p/(1 − p), p = π(y|x)^(1/|y|)",
        dials=Words(
            "beta weighs the preference; lr as in sft, or somewhat lower.",
            "beta 是偏好项的权重；学习率与 sft 相同或略低。",
        ),
        watch=Words(
            "loss falls as in fine-tuning; accuracy rises.", "loss 像监督微调一样下降；accuracy 上升。"
        ),
        when=Words("Pairs, and no fine-tuning stage before.", "有成对数据，且之前没有监督微调阶段时。"),
        paper="Hong, Lee & Thorne 2024, arXiv:2403.07691",
    )

    def losses(self, found: Answers, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy of the chosen answer's tokens, a pair's mean, and beta times the log-sigmoid of the odds ratio."""
        chosen_B, rejected_B = found.per_token()
        ratio_B = _log_odds(chosen_B) - _log_odds(rejected_B)
        losses_B = -chosen_B - self.config.beta * logsigmoid(ratio_B)
        return losses_B, (self.config.beta * chosen_B).detach(), (self.config.beta * rejected_B).detach()


def _log_odds(log_probability_B: Tensor) -> Tensor:
    below_B = log_probability_B.clamp(max=-_LEAST)
    return below_B - torch.log(-torch.expm1(below_B))
