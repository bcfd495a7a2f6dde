"""LISA: full fine-tuning of a few blocks at a time, drawn anew every so many steps (Pan et al. 2024)."""

from typing import Any

from pydantic import Field

from tunewright.core.config import Config as BaseConfig
from tunewright.core.errors import Problem
from tunewright.core.rng import permutation
from tunewright.core.words import Words
from tunewright.methods import Clock, Facts
from tunewright.methods.full import Full
from tunewright.models import anatomy

__all__ = ["Config", "Lisa"]


class Config(BaseConfig):
    """How many blocks at a time, and for how long."""

    active: int = Field(2, ge=1)
    """Blocks trained at a time."""
    period: int = Field(20, ge=1)
    """Steps until others are drawn."""


class Lisa(Full):
    """Trains the whole model in the end; embeddings, head and final normalisation all the time."""

    default_lr = 5e-5
    facts = Facts(
        idea=Words(
            "All weights may move, but only a few blocks at a time, drawn by chance; embeddings and head always do.",
            "全部权重都可以动，但每段时间只随机训练几层；嵌入层和输出头一直训练。",
        ),
        formula="θ_t ← θ_t − η·∇L for embeddings, head and γ blocks drawn anew every K steps",
        count="all parameters N may be trained; in memory at a time only those outside the blocks and γ of L blocks",
        inference=Words("none: it is a plain model", "无：得到的就是普通模型"),
        when=Words(
            "Full fine-tuning with memory for a part of it: gradients, masters and optimizer state exist for the "
            "active blocks only.",
            "想全量微调但显存只够一部分：梯度、fp32 主副本和优化器状态只为当前活跃的层保留。",
        ),
        paper="Pan et al. 2024, arXiv:2403.17919",
    )

    def problems(self, model: Any) -> list[Problem]:
        """More active blocks than there are."""
        active, count = self.config.active, len(anatomy.blocks(model))
        if active <= count:
            return []
        what = f"{active} blocks at a time, but the model has {count}"
        return [Problem("method.active", what, f"give at most {count}" if count else "use method: full")]

    def at_once(self, model: Any) -> int:
        """What lies outside of the blocks, and the largest blocks that can be drawn together."""
        sizes = [sum(p.numel() for p in block.parameters()) for _, block in anatomy.blocks(model)]
        return self.count(model) - sum(sorted(sizes)[: -self.config.active])

    def before_step(self, model: Any, clock: Clock) -> None:
        """Only what is active requires gradients."""
        stack = [block for _, block in anatomy.blocks(model)]
        drawn = self.drawn(clock, len(stack))
        for i, block in enumerate(stack):
            block.requires_grad_(i in drawn)

    def drawn(self, clock: Clock, count: int) -> set[int]:
        """The numbers of the active ones of ``count`` blocks."""
        period = clock.step // self.config.period
        return set(permutation(clock.seed, "lisa", period, count)[: self.config.active].tolist())
