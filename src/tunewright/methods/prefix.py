"""Prefix tuning: trained keys and values stand before those of every layer (Li & Liang 2021), through PEFT."""

from tunewright.core.words import Words
from tunewright.methods import Facts
from tunewright.methods._prefixes import PrefixConfig, PrefixMethod
from tunewright.methods._prompts import KEEPS_APART


class Config(PrefixConfig):
    """How long the prefix is and what makes it."""

    length: int = 10
    """Virtual tokens; each takes a position of the model's context."""
    projection: bool = True
    """Train a small network that makes the prefix, as the paper does, and not the prefix itself. Then it starts at
    random, else from the keys and values of real tokens."""


class Prefix(PrefixMethod):
    """Trains the network that makes the prefix; only the prefix is saved."""

    default_lr = 1e-3
    reads = ("PREFIX_TUNING",)
    facts = Facts(
        idea=Words(
            "Every layer attends to a few trained keys and values before those of the input.",
            "每一层都先关注几个训练出来的键和值，然后才是输入自己的。",
        ),
        formula="h = attention(q, [Pk; k], [Pv; v]), (Pk, Pv) = MLP(P)",
        count="length·w + (w+1)·H + (H+1)·2·L·w, w the width of a layer's keys; without projection length·2·L·w",
        inference=Words(
            "length more keys and values in every layer; no position is computed for them",
            "每层多 length 组键值，但不必为它们做前向计算",
        ),
        when=Words(
            "As prompt tuning, and stronger on small models. P-tuning v2 is the same without the network.",
            "用途同 prompt tuning，小模型上更强。去掉网络就是 P-tuning v2。",
        ),
        paper="Li & Liang 2021, arXiv:2101.00190",
        keeps_apart=KEEPS_APART,
    )
