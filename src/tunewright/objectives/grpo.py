"""GRPO and its variants: answers of one question are judged against one another (Shao et al. 2024)."""

from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from tunewright.core.words import Words
from tunewright.objectives import Batch, Facts
from tunewright.objectives._policy import DrawConfig, Grouped


class Config(DrawConfig):
    """What an advantage is, and how tokens count."""

    scale: Literal["group", "none"] = "group"
    """group divides advantages by the spread of their group; none does not (Dr. GRPO, Liu et al. 2025)."""
    average: Literal["sequence", "token", "constant"] = "sequence"
    """sequence is each answer's mean (GRPO), token that of all tokens (DAPO, Yu et al. 2025), constant divides by the
    longest that an answer may be (Dr. GRPO)."""
    ratio: Literal["token", "sequence"] = "token"
    """Whether each token's likelihood is compared with what it was, or the answer's mean (GSPO, Zheng et al. 2025)."""
    clip_low: float = Field(0.2, ge=0, lt=1)
    """How far below 1 a ratio may go and still be learned from."""
    clip_high: float = Field(0.2, ge=0)
    """How far above; DAPO takes 0.28."""


class Grpo(Grouped):
    """Makes answers likelier that were worth more than others to the same question, and the others less likely."""

    facts = Facts(
        idea=Words(
            "The model answers each question several times; answers better than their group's mean become likelier.",
            "模型对每个问题作答多次；好于本组平均的回答变得更可能。",
        ),
        formula="−min(ρ·A, clip(ρ, 1 − ε, 1 + ε′)·A), A = (r − mean of group)/spread of group, ρ = π/π when drawn",
        dials=Words(
            "group 8 to 16; a reward that some answers of a group earn and others do not; lr a tenth of sft's. scale: none with "
            "average: constant is Dr. GRPO, average: token with clip_high 0.28 is DAPO, ratio: sequence is GSPO.",
            "group 取 8 到 16；奖励应使同组回答有高有低；学习率取 sft 的十分之一。scale: none 加 average: constant 即 Dr. GRPO，"
            "average: token 加 clip_high 0.28 即 DAPO，ratio: sequence 即 GSPO。",
        ),
        watch=Words(
            "reward rises; reward_spread above 0 (else nothing is learned); ended near 1 (answers come to an end).",
            "reward 上升；reward_spread 大于 0（否则学不到东西）；ended 接近 1（回答能正常结束）。",
        ),
        when=Words("Answers can be checked by a program.", "回答可以用程序检验时。"),
        paper="Shao et al. 2024, arXiv:2402.03300; Liu et al. 2025, arXiv:2503.20783; Yu et al. 2025, arXiv:2503.14476; "
        "Zheng et al. 2025, arXiv:2507.18071",
    )

    def advantages(self, rewards_PG: np.ndarray) -> np.ndarray:
        """Less the group's mean, over its standard deviation (with 1e-4, as in TRL)."""
        found: np.ndarray = rewards_PG - rewards_PG.mean(1, keepdims=True)
        return (
            found / (rewards_PG.std(1, ddof=1, keepdims=True) + 1e-4)
            if self.config.scale == "group"
            else found
        )

    def weight(self, batch: Batch) -> float:
        """Answers, or tokens where all count alike."""
        rows = len(batch["input_ids"])
        return float((batch["labels"] != -100).sum()) if self.config.average == "token" else float(rows)

    def improved(
        self, now_N: Tensor, before_N: Tensor, rows_N: Tensor, advantages_B: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """The clipped objective, eq. 3 without its KL term."""
        count_B = torch.bincount(rows_N, minlength=len(advantages_B)).clamp(min=1).to(now_N.dtype)
        change_N = now_N - before_N
        if self.config.ratio == "sequence":
            change_B = torch.zeros_like(count_B).index_add(0, rows_N, change_N) / count_B
            change_N = now_N - now_N.detach() + change_B.detach()[rows_N]
        ratio_N, advantages_N = change_N.exp(), advantages_B[rows_N]
        low, high = 1 - self.config.clip_low, 1 + self.config.clip_high
        gain_N = torch.minimum(ratio_N * advantages_N, ratio_N.clamp(low, high) * advantages_N)
        clipped_N = ((ratio_N < low) & (advantages_N < 0)) | ((ratio_N > high) & (advantages_N > 0))
        return -self._averaged(gain_N, rows_N, count_B), {"clipped": float(clipped_N.float().mean())}

    def _averaged(self, gain_N: Tensor, rows_N: Tensor, count_B: Tensor) -> Tensor:
        if self.config.average == "token":
            return gain_N.mean()
        divisor_B = (
            count_B if self.config.average == "sequence" else torch.full_like(count_B, self.config.longest)
        )
        return (gain_N / divisor_B[rows_N]).sum() / len(count_B)
