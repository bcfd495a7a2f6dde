"""What an objective tells of held-out data besides its loss: rewards, accuracy, and the like."""

from typing import Any

_OTHERS = ("loss", "perplexity", "count", "exact_match", "kl")
_SHARES = ("accuracy", "precision", "recall", "f1", "ended", "clipped")
NAMES = {
    "reward": "mean reward", "accuracy": "accuracy", "f1": "F1", "margin": "margin", "divergence": "divergence",
    "calibration": "calibration",
}  # fmt: skip
"""The figures that are told in a line, most telling first."""


def of(scores: dict[str, Any]) -> dict[str, float]:
    """The objective's own numbers among the scores, most telling first."""
    answered = ("f1",) if "exact_match" in scores else ()  # that of the answers' words
    own = {
        name: value for name, value in scores.items()
        if isinstance(value, (int, float)) and name not in (*_OTHERS, *answered)
    }  # fmt: skip
    return {
        name: own[name] for name in (*(n for n in NAMES if n in own), *(n for n in own if n not in NAMES))
    }


def shown(name: str, value: float) -> str:
    """A share as percent, anything else with three decimals."""
    return f"{value:.1%}" if name in _SHARES else f"{value:.3f}"


def told(scores: dict[str, Any], most: int = 3) -> list[str]:
    """The first few, in words: ``accuracy 91.0%``."""
    return [f"{NAMES[name]} {shown(name, value)}" for name, value in of(scores).items() if name in NAMES][
        :most
    ]
