"""Parallel adapters: a bottleneck network beside every feed-forward sub-layer (He et al. 2021)."""

from typing import Literal

from pydantic import Field

from tunewright.core.words import Words
from tunewright.methods import Facts
from tunewright.methods._bottleneck import COST, NOT_MERGED, Bottleneck, Options
from tunewright.models import anatomy


class Config(Options):
    """The shape of the adapters."""

    activation: Literal["relu", "gelu", "silu"] = "relu"
    """The non-linearity f between the two projections."""
    scale: float = Field(4.0, gt=0)
    """What the adapter's output is multiplied by."""


class ParallelAdapter(Bottleneck):
    """The adapter reads the feed-forward's input and its result is added to the feed-forward's output."""

    default_lr = 5e-4
    places = (anatomy.feed_forward,)
    parallel = True
    facts = Facts(
        idea=Words(
            "The feed-forward gains a few trained hidden units: the adapter works beside it instead of after it.",
            "前馈子层旁并联一个小网络，相当于多了几个可训练的隐藏单元，而不是串在其后。",
        ),
        formula="y = FFN(x) + s·(W_up·f(W_down·x + b_down) + b_up)",
        count="L·(2·d·m + d + m) for L blocks",
        inference=COST,
        when=Words(
            "More capacity than LoRA for hard tasks: the paper's best adapter, with m of 512 for d of 1024.",
            "任务难、需要比 LoRA 更大容量时；论文中最好的适配器，d=1024 时用 m=512。",
        ),
        paper="He et al. 2021, arXiv:2110.04366",
        keeps_apart=NOT_MERGED,
    )

    def scale(self) -> float:
        """The formula's s."""
        return float(self.config.scale)
