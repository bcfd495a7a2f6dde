"""Two answers to one question, or one that was judged, in the shapes that files hold them in.

Answers are a text, one turn, a whole conversation, or a transcript as hh-rlhf writes it: paragraphs that begin with
``Human:`` and ``Assistant:``.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from tunewright.data.rows import Message

SIDES = {
    "chosen": ("chosen", "response_chosen", "chosen_response", "chosen_messages"),
    "rejected": ("rejected", "response_rejected", "rejected_response", "rejected_messages"),
}
"""The keys of each side, in the order in which they are looked for."""
VERDICTS = ("kto_tag", "label")
"""The keys of a verdict on one answer: true or false."""

_SPEAKER = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}
Turns = list[Message]


def transcript(text: str) -> Turns:
    """The turns of an hh-rlhf transcript; none if it is not one."""
    if not text.startswith("\n\nHuman:"):
        return []
    speakers = list(_SPEAKER.finditer(text))
    ends = [found.start() for found in speakers[1:]] + [len(text)]
    return [
        Message(_ROLES[found[1]], text[found.end() : end].strip())
        for found, end in zip(speakers, ends, strict=True)
    ]


def turns(value: Any, turn: Callable[[Any], Message]) -> Turns:
    """What one side says: a whole conversation, or the answer alone. ``turn`` reads an object."""
    if isinstance(value, str):
        return transcript(value) or [Message("assistant", value)]
    return [turn(item) for item in value] if isinstance(value, list) else [turn(value)]


def asked(chosen: Turns, rejected: Turns, prompt: Turns) -> tuple[Turns, str]:
    """The question both sides answer, and what is wrong with it; nothing if all is well.

    Sides that are whole conversations must be the same up to their last turn; else ``prompt`` is what was asked.
    """
    if len(chosen) == len(rejected) == 1:
        return prompt, "" if prompt else "the answers have no question"
    if chosen[:-1] != rejected[:-1]:
        return prompt, _where_they_part(chosen[:-1], rejected[:-1])
    return chosen[:-1], ""


def _where_they_part(one: Sequence[Message], other: Sequence[Message]) -> str:
    alike = next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
    return f"chosen and rejected answer different conversations: they part at turn {alike + 1}"
