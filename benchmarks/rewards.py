"""What answers are worth on workload h, for every system: a number that answers of a random model differ by."""

from typing import Any


def of_text(answer: str) -> float:
    """How many letters are an e."""
    return float(answer.count("e"))


def worth(asked: Any, answer: str) -> float:
    """As Tunewright asks."""
    return of_text(answer)


def of_completions(completions: list[Any], **_: Any) -> list[float]:
    """As TRL asks: each completion is the assistant's message in a list."""
    return [of_text(completion[0]["content"]) for completion in completions]
