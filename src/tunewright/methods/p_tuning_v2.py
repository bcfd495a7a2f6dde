"""P-tuning v2: trained keys and values before every layer's, by themselves (Liu et al. 2021), through PEFT."""

from tunewright.core.words import Words
from tunewright.methods import Facts
from tunewright.methods._prefixes import PrefixConfig, PrefixMethod
from tunewright.methods._prompts import KEEPS_APART


class Config(PrefixConfig):
    """How long the prefix is and what makes it."""


class PTuningV2(PrefixMethod):
    """Trains the prefix itself, unless a projection is asked for."""

    default_lr = 3e-2
    facts = Facts(
        idea=Words(
            "Prefix tuning without the network that makes the prefix: the same model, trained in another way. "
            "Here the prefix also starts from the keys and values of real tokens and is longer.",
            "去掉生成网络的 prefix tuning：模型相同，训练方式不同。这里前缀还从真实词的键值开始，并且更长。",
        ),
        formula="h = attention(q, [Pk; k], [Pv; v])",
        count="length·2·L·w, w the width of a layer's keys; with projection as prefix",
        inference=Words(
            "length more keys and values in every layer; no position is computed for them",
            "每层多 length 组键值，但不必为它们做前向计算",
        ),
        when=Words(
            "As prefix, with fewer numbers to train and a start that already reads like text.",
            "用途同 prefix，训练的参数更少，起点已像一段文字。",
        ),
        paper="Liu et al. 2021, arXiv:2110.07602",
        keeps_apart=KEEPS_APART,
    )
