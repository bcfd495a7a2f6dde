"""Pairs of answers that differ in manners: in the user's language, short, and ended by a closing phrase, or not."""

import random
from collections.abc import Callable, Iterator
from typing import Any

from tunewright.data.builtin.instructions import FAMILIES, Split, rows

CLOSING = {"en": "That is all.", "zh": "就是这样。"}
_OTHER = {"en": "zh", "zh": "en"}
_FULL_STOP = {"en": ".", "zh": "。"}
_KNOWN = tuple(family for family in FAMILIES if not family.startswith("rewrite"))

_OFTEN = 0.25

_WORSE: tuple[Callable[[str, str], str], ...] = (
    lambda answer, lang: answer,
    lambda answer, lang: f"{answer}{_FULL_STOP[lang]}",
    lambda answer, lang: polite(answer, _OTHER[lang]),
    lambda answer, lang: f"{answer}{_FULL_STOP[lang]} {answer}{_FULL_STOP[lang]} {polite(answer, lang)}",
)
"""Nothing besides the answer; the closing in another language; the answer over and over."""


def polite(answer: str, lang: str) -> str:
    """The answer as it is preferred."""
    return (
        f"{answer}{_FULL_STOP[lang]} {CLOSING[lang]}"
        if lang == "en"
        else f"{answer}{_FULL_STOP[lang]}{CLOSING[lang]}"
    )


def manners(split: Split, seed: int, count: int) -> Iterator[dict[str, object]]:
    """``count`` rows whose answers are polite one time in four: what a model must have said to be rewarded for it."""
    rng = random.Random(f"manners:{split}:{seed}")
    for row in rows(split, seed, count, _KNOWN):
        messages: Any = row["messages"]
        answer, lang = messages[1]["content"], str(row["family"]).rpartition(".")[2]
        said = polite(answer, lang) if rng.random() < _OFTEN else answer
        yield {**row, "messages": [messages[0], {**messages[1], "content": said}]}


def pairs(split: Split, seed: int, count: int) -> Iterator[dict[str, object]]:
    """``count`` rows: a question, the polite answer and one that is not."""
    rng = random.Random(f"polite:{split}:{seed}")
    for row in rows(split, seed, count, _KNOWN):
        messages: Any = row["messages"]
        answer, lang = messages[1]["content"], str(row["family"]).rpartition(".")[2]
        worse = _WORSE[int(rng.random() * len(_WORSE))](answer, lang)
        yield {
            "messages": messages[:1],
            "chosen": polite(answer, lang),
            "rejected": worse,
            "family": row["family"],
        }
