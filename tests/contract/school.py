"""All lessons, and the models, data and processes that they share."""

import copy
import os
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from elsewhere import Elsewhere
from lessons import SEED, Lesson

from tunewright import methods
from tunewright.core import plugins
from tunewright.core.config import Config
from tunewright.core.errors import Problem
from tunewright.core.rng import sow
from tunewright.data import tokens
from tunewright.data.rows import Message, Row
from tunewright.data.template import ChatCodec
from tunewright.methods import Method
from tunewright.models.load import find, load_model, load_tokenizer, outline
from tunewright.objectives import Objective, kind
from tunewright.objectives._policy import Policy
from tunewright.recipes import plugin_config

_LONGEST = 64


class School:
    """All lessons, the models and data that they share."""

    def __init__(self, folders: dict[str, Path], folder: Path) -> None:
        self.sources = {name: find(str(at)) for name, at in folders.items()}
        self.folder = folder
        folder.mkdir(parents=True)
        self._elsewhere: tuple[tuple[str, ...], Elsewhere] | None = None
        self.outline = cache(self._outline)
        self._stored = cache(self._load)
        self.objective = cache(self._objective)
        self._method = ""
        self._lessons: dict[tuple[str, str], Lesson | None] = {}
        self._data: dict[Objective, tokens.Mixture] = {}

    def __call__(self, method: str, architecture: str) -> Lesson | None:
        """The lesson; None if the method cannot be used on this architecture.

        Those of one method are kept until another's is asked for: they hold models.
        """
        key = (method, architecture)
        if method != self._method:
            self._method, self._lessons = method, {}
        if key not in self._lessons:
            config = self.options(*key)
            refused = methods.kind(method)(config).problems(self.outline(architecture))
            self._lessons[key] = None if refused else Lesson(self, method, architecture, config)
        return self._lessons[key]

    def elsewhere(self, method: str) -> Elsewhere:
        """A process that has loaded nothing but what this method made."""
        key = (method, os.environ.get(plugins.FOLDERS_VARIABLE, ""))
        if self._elsewhere is None or self._elsewhere[0] != key:
            self.close()
            self._elsewhere = key, Elsewhere()
        return self._elsewhere[1]

    def close(self) -> None:
        """End the process."""
        if self._elsewhere:
            self._elsewhere[1].close()

    def options(self, method: str, architecture: str) -> Config:
        """The defaults, which are for large models: a size that is refused is halved until it fits."""
        config, shape = plugin_config("methods", {"name": method}), self.outline(architecture)
        while sizes := dict(_sizes(config, methods.kind(method)(config).problems(shape))):
            smaller = {field: size // 2 for field, size in sizes.items()}
            config = plugin_config("methods", {**config.model_dump(), **smaller, "name": method})
        return config

    def _outline(self, architecture: str) -> Any:
        return outline(self.sources[architecture], torch.float32)

    def base(self, method: Method, architecture: str, precision: str) -> Any:
        """The architecture's model as the method holds it, a fresh copy."""
        kind = type(method)
        if kind.load_base is Method.load_base and kind.needs_weights:
            return copy.deepcopy(self._stored(architecture, precision))
        sow(SEED, "init")
        return method.load_base(self.sources[architecture], precision)

    def plain_class(self, architecture: str) -> type:
        """The architecture's own class in transformers."""
        return type(self._stored(architecture, "fp32"))

    def _load(self, architecture: str, precision: str) -> Any:
        return load_model(self.sources[architecture], precision)

    def _objective(self, name: str) -> Objective:
        tokenizer = load_tokenizer(next(iter(self.sources.values())))
        module = plugins.load("objectives", name)
        few: dict[str, Any] = {}
        if issubclass(kind(name), Policy):
            few = {"group": 2, "longest": 4, "rewards": [self._worth()]}
        if name == "distill":
            few = {"teacher": "model:teacher"}
        made = kind(name)(module.Config(**few), ChatCodec(tokenizer, max_length=_LONGEST))
        teacher = SimpleNamespace(model=self._stored(next(iter(self.sources)), "fp32"))
        made.asked = {other.name: lambda: teacher for other in made.others()}
        return made

    def _worth(self) -> str:
        """A reward by which answers of one group differ."""
        (self.folder / "worth.py").write_text("def worth(asked, answer):\n    return len(answer) % 7\n")
        return f"{self.folder / 'worth.py'}:worth"

    def data(self, objective: Objective) -> tokens.Mixture:
        """Rows that the objective can learn from, tokenized."""
        if objective not in self._data:
            folder = self.folder / f"data-{len(self._data)}"
            rows = list(_texts() if objective.wants == "texts" else _talks(objective.wants))
            tokens.write(folder, objective.encode(rows), dict)
            self._data[objective] = tokens.Mixture([tokens.TokenTable(folder)], [1.0])
        return self._data[objective]


def _sizes(config: Config, problems: Sequence[Problem]) -> Iterator[tuple[str, int]]:
    """The options that problems name and that are numbers which can be made smaller."""
    for problem in problems:
        field = problem.where.removeprefix("method.")
        value = getattr(config, field, None)
        if type(value) is int and value > 1:
            yield field, value


def _talks(wants: str) -> Iterator[Row]:
    for n in range(24):
        turns = (f"Say {n} and {n + 1}.", f"{n}, then {n + 1}." + " And so on." * (n % 3))
        roles = ("user", "assistant")
        more: dict[str, Any] = {"chosen": turns[1], "rejected": "No idea."} if wants == "pairs" else {}
        liked = n % 3 > 0 if wants == "verdicts" else None
        label = str(n % 2) if wants == "labels" else ""
        yield Row(f"talks:{n + 1}", tuple(map(Message, roles, turns)), liked=liked, label=label, **more)


def _texts() -> Iterator[Row]:
    return (Row(f"texts:{n + 1}", text=f"Chapter {n}. The cat saw {n} birds and slept.") for n in range(40))
