"""Houlsby adapters: two small bottleneck networks in every block (Houlsby et al. 2019)."""

from tunewright.core.words import Words
from tunewright.methods import Facts
from tunewright.methods._bottleneck import COST, NOT_MERGED, Bottleneck, NormOptions
from tunewright.models import anatomy


class Config(NormOptions):
    """The shape of the adapters, and whether the normalisation layers learn with them."""


class Houlsby(Bottleneck):
    """One adapter after attention and one after the feed-forward sub-layer, each before the residual addition."""

    default_lr = 1e-3
    places = (anatomy.attention, anatomy.feed_forward)
    facts = Facts(
        idea=Words(
            "Every block gains two small networks that squeeze a sub-layer's output through m numbers and add "
            "the result to it.",
            "每层加入两个小网络，把子层的输出压缩到 m 维，再加回到输出上。",
        ),
        formula="h ← h + W_up·f(W_down·h + b_down) + b_up, after attention and after the feed-forward",
        count="2·L·(2·d·m + d + m) for L blocks, and the normalisation layers",
        inference=COST,
        when=Words(
            "Many tasks on one base, each with its own adapter, where a non-linear change is worth its time.",
            "一个基座配多个任务，每个任务一个适配器，且非线性的改变值得多花的时间。",
        ),
        paper="Houlsby et al. 2019, arXiv:1902.00751",
        keeps_apart=NOT_MERGED,
    )
