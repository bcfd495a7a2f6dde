"""RLOO: REINFORCE, each answer against the mean of the others to its question (Ahmadian et al. 2024)."""

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from tunewright.core.words import Words
from tunewright.objectives import Batch, Facts
from tunewright.objectives._policy import DrawConfig, Grouped


class Config(DrawConfig):
    """How far an answer's likelihood may have moved."""

    clip: float = Field(0.2, ge=0, lt=1)
    """How far from 1 an answer's ratio may go and still be learned from."""


class Rloo(Grouped):
    """An answer is one action: its whole likelihood moves by how much better it was than the others."""

    facts = Facts(
        idea=Words(
            "Several answers to each question; each is judged against the mean of the others.",
            "对每个问题作答多次，每个回答与其余回答的平均相比较。",
        ),
        formula="−min(ρ·A, clip(ρ, 1 − ε, 1 + ε)·A), A = r − mean of the others' r, ρ = π(y|x)/π(y|x) when drawn",
        dials=Words(
            "group 4 to 8; lr a tenth of sft's or less.", "group 取 4 到 8；学习率不超过 sft 的十分之一。"
        ),
        watch=Words("reward rises; reward_spread above 0.", "reward 上升；reward_spread 大于 0。"),
        when=Words("As grpo, where rewards are already of one size.", "同 grpo，且奖励本身尺度一致时。"),
        paper="Ahmadian et al. 2024, arXiv:2402.14740",
    )

    def advantages(self, rewards_PG: np.ndarray) -> np.ndarray:
        """Less the mean of the group's others."""
        others: np.ndarray = (rewards_PG.sum(1, keepdims=True) - rewards_PG) / (rewards_PG.shape[1] - 1)
        found: np.ndarray = rewards_PG - others
        return found

    def weight(self, batch: Batch) -> float:
        """Answers."""
        return float(len(batch["input_ids"]))

    def improved(
        self, now_N: Tensor, before_N: Tensor, rows_N: Tensor, advantages_B: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """The clipped objective over whole answers."""
        change_B = torch.zeros_like(advantages_B).index_add(0, rows_N, now_N - before_N)
        ratio_B, bound = change_B.exp(), self.config.clip
        gain_B = torch.minimum(ratio_B * advantages_B, ratio_B.clamp(1 - bound, 1 + bound) * advantages_B)
        return -gain_B.mean(), {"clipped": float(((ratio_B - 1).abs() > bound).float().mean())}
