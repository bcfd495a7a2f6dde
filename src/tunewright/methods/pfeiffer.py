"""Pfeiffer adapters: one bottleneck network in every block, after the feed-forward (Pfeiffer et al. 2020)."""

from typing import Literal

from tunewright.core.words import Words
from tunewright.methods import Facts
from tunewright.methods._bottleneck import COST, NOT_MERGED, Bottleneck, Options
from tunewright.models import anatomy


class Config(Options):
    """The shape of the adapters."""

    activation: Literal["relu", "gelu", "silu"] = "relu"
    """The non-linearity f between the two projections."""


class Pfeiffer(Bottleneck):
    """The adapter reads the feed-forward's output; in a pre-norm decoder no norm follows it, as one does in BERT."""

    default_lr = 1e-3
    places = (anatomy.feed_forward,)
    facts = Facts(
        idea=Words(
            "Half of Houlsby's adapters, found by search to do as well: only the one after the feed-forward.",
            "只保留 Houlsby 适配器的一半：搜索发现仅在前馈子层之后放一个就同样好。",
        ),
        formula="h ← h + W_up·f(W_down·h + b_down) + b_up, after the feed-forward",
        count="L·(2·d·m + d + m) for L blocks",
        inference=COST,
        when=Words(
            "As Houlsby's, at half the parameters and half the time at inference.",
            "适用场景同 Houlsby，参数和推理开销各减一半。",
        ),
        paper="Pfeiffer et al. 2020, arXiv:2005.00247 and arXiv:2005.00052",
        keeps_apart=NOT_MERGED,
    )
