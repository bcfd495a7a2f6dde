"""Training from random weights: the base gives its architecture and tokenizer only."""

from tunewright.core.words import Words
from tunewright.methods import Facts
from tunewright.methods.full import Config, Full

__all__ = ["Config", "Scratch"]


class Scratch(Full):
    """Trains the whole model, beginning from its initialisation."""

    default_lr = 1e-3
    needs_weights = False
    facts = Facts(
        idea=Words(
            "A new model of the base's shape is trained from nothing.", "按基座的结构从零训练一个新模型。"
        ),
        formula="θ₀ ~ initialisation, then θ ← θ − η·∇L(θ)",
        count="all parameters N",
        inference=Words("none: it is a plain model", "无：得到的就是普通模型"),
        when=Words(
            "Pretraining a small model of one's own; never to adapt an existing one.",
            "预训练自己的小模型；不用于改造已有模型。",
        ),
        paper="Radford et al. 2018 (GPT)",
    )
