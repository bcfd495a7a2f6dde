"""Training from random weights: the base gives its architecture and tokenizer only."""

from tunewright.methods.full import Config, Full

__all__ = ["Config", "Scratch"]


class Scratch(Full):
    """Trains the whole model, beginning from its initialisation."""

    default_lr = 1e-3
    needs_weights = False
