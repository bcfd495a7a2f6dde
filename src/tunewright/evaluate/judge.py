"""Other models that are asked: what answers are worth, and what they would say themselves."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from tunewright import objectives
from tunewright.core.errors import Problem, UserError
from tunewright.core.units import chunks
from tunewright.data.rows import Message, Row
from tunewright.objectives._rewards import Asked
from tunewright.recipes import plugin_config

_AT_ONCE = 32
"""Answers that go through the model together."""


class Teacher:
    """A model that is asked for its words; ``sha256`` tells it from others."""

    def __init__(self, speaker: Any, sha256: str) -> None:
        self.model, self.codec, self.sha256 = speaker.model.eval(), speaker.codec, sha256


class Judge:
    """Rewards of answers, as objective ``reward`` taught a model to give them; ``load`` gives it with its codec."""

    def __init__(self, load: Callable[[], Any], choice: Mapping[str, Any]) -> None:
        self._load, self._choice = load, choice
        self._loaded: tuple[Any, Any] | None = None

    def __call__(self, asked: Sequence[Asked], answers: Sequence[str]) -> list[float]:
        """One reward for each answer to its question.

        Raises:
            UserError: the model's template refuses a conversation, or an answer is cut off.
        """
        model, objective = self._ready()
        turns = (
            (Message("user", a.question), Message("assistant", said))
            for a, said in zip(asked, answers, strict=True)
        )
        tokens = objective.codec.encode_many([Row("answer", both) for both in turns])
        if problems := [item for item in tokens if isinstance(item, Problem)]:
            raise UserError(dict.fromkeys(problems))
        found: list[float] = []
        with torch.no_grad():
            for some in chunks(tokens, _AT_ONCE):
                batch = objective.conversations([t.ids for t in some])
                found += objective.rewards(model, {n: x.to(model.device) for n, x in batch.items()}).tolist()
        return found

    def _ready(self) -> tuple[Any, Any]:
        if self._loaded is None:
            speaker = self._load()
            objective = objectives.create(
                self._choice, plugin_config("objectives", self._choice), speaker.codec
            )
            self._loaded = speaker.model.eval(), objective
        return self._loaded
