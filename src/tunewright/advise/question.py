"""What a user asks: a recipe, or ``key=value`` pairs; every mistake is told at once."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tunewright.advise import configs, facts, hardware
from tunewright.advise.facts import Facts
from tunewright.advise.situation import GOALS, Given, Situation
from tunewright.core import plugins
from tunewright.core.config import problems
from tunewright.core.errors import Problem, RecipeError, UserError, attempted, nearest
from tunewright.core.units import parse_bytes
from tunewright.recipes import DataConfig, stage_trees
from tunewright.recipes.schema import as_choice, as_data

OWN = ("goal", "memory", "devices", "deadline", "rows", "length", "runs", "stage", "objective")
_KEYS = (*OWN, "model", "data")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([smhd])")
_MOST = 1 << 40
NOTHING = Given()


@dataclass(frozen=True)
class Question:
    """A situation, and where it came from."""

    situation: Situation
    data: DataConfig | None
    runs: Path
    """The folder of runs that may have measured what is asked."""
    written: Mapping[str, Any] = field(default_factory=dict)
    """The stage as the recipe has it."""
    keeps: bool = False
    """Whether all that the recipe says stays, and only what it leaves open is chosen."""
    memory: int = 0
    """Bytes that were given, where devices or this machine have more; 0 if none were."""

    def leaves_open(self, key: str) -> bool:
        """Whether a dial, by its dotted name, may be chosen."""
        node: Any = self.written if self.keeps else {}
        for part in key.split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        return node is None


def ask(recipe: str, pairs: Iterable[str]) -> Question:
    """What is to be decided, from a recipe file (or none) and ``key=value`` pairs.

    Raises:
        UserError: with every problem of recipe, model, data, devices and figures.
    """
    found: list[Problem] = []
    own, others = _split(pairs, found)
    tree = attempted(lambda: _tree(recipe, own.get("stage", ""), others), found) or {}
    return _about(tree, own, found)


def about(stage: Mapping[str, Any], own: Mapping[str, str]) -> Question:
    """What is left open by a stage as a recipe has it, with a goal, memory, a deadline or a folder of ``runs``.

    Raises:
        UserError: as for :func:`ask`.
    """
    return replace(_about(stage, own, [], _given(stage)), keeps=True)


def _given(stage: Mapping[str, Any]) -> Given:
    train, data = stage.get("train") or {}, as_data(stage.get("data")) or {}
    steps = train.get("max_steps") or 0
    batch = train.get("tokens_per_batch") or 0
    return Given(
        0.0 if steps else train.get("epochs") or 0.0,
        steps,
        batch,
        data.get("max_length") or 0,
        stage.get("precision", ""),
    )


def _about(
    tree: Mapping[str, Any], own: Mapping[str, str], found: list[Problem], given: Given = NOTHING
) -> Question:
    model = tree.get("model")
    if not isinstance(model, str) or not model:
        fix = "give a recipe, or model=builtin:pico, a folder, or shape:llama-2-7b"
        found.append(Problem("model", "no model is named", fix))
        model = ""
    shape = attempted(lambda: configs.find(model), found) if model else None
    data = attempted(lambda: _data(tree), found)
    looked = attempted(lambda: _facts(data, model, own), found)
    fleet = attempted(lambda: hardware.parse(own["devices"]) if "devices" in own else hardware.here(), found)
    memory = attempted(lambda: _memory(own.get("memory", "")), found)
    goal = _one_of("goal", own.get("goal", ""), GOALS, found)
    objective = _objective(tree, own, found)
    deadline = attempted(lambda: _deadline(own.get("deadline", "")), found)
    if found or shape is None or looked is None or fleet is None or deadline is None or memory is None:
        raise UserError(dict.fromkeys(found))
    fleet = hardware.limited(fleet, memory) if memory else fleet
    situation = Situation(model, shape, fleet, looked, goal, deadline, objective, given)
    return Question(situation, data, Path(own.get("runs") or "runs"), tree, memory=memory)


def _split(pairs: Iterable[str], found: list[Problem]) -> tuple[dict[str, str], list[str]]:
    """Our own keys, and those that are a recipe's."""
    own: dict[str, str] = {}
    others: list[str] = []
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            found.append(
                Problem(pair[:80], "expected one recipe, then key=value", "for example devices=8xH200")
            )
        elif key in OWN:
            own[key] = value
        elif key.partition(".")[0] in ("model", "data"):
            others.append(pair)
        else:
            found.append(Problem(key[:80], "there is no such option", nearest(key[:80], _KEYS)))
    return own, others


def _tree(recipe: str, stage: str, others: Iterable[str]) -> Mapping[str, Any]:
    """The stage that advice is for: the one that is named, else the first."""
    trees = stage_trees(Path(recipe) if recipe else {}, others)
    if not stage:
        return trees[0]
    named = {
        str(tree.get("name") or as_choice(tree.get("objective", "sft"), "objective")["name"]): tree
        for tree in trees
    }
    if stage not in named:
        raise RecipeError(Problem("stage", f"there is no stage {stage!r}", nearest(stage, named)))
    tree = named[stage]
    if str(tree.get("model", "")).startswith("stage:"):  # its shape is that of the first one's model
        return {**tree, "model": trees[0].get("model")}
    return tree


def _data(tree: Mapping[str, Any]) -> DataConfig | None:
    if tree.get("data") is None:
        return None
    try:
        return DataConfig.model_validate(as_data(tree["data"]))
    except ValidationError as error:
        raise RecipeError(problems(error, DataConfig, "data")) from None


def _facts(data: DataConfig | None, model: str, own: Mapping[str, str]) -> Facts:
    if data is None:
        return facts.assume(_number("rows", own, 10_000), _number("length", own, 1024))
    named = [key for key in ("rows", "length") if key in own]
    if named:
        raise UserError(Problem(key, "is told by the data", "leave it out") for key in named)
    try:
        folder = configs.folder(model) if model else None
    except UserError:  # told already, as a problem of the model
        folder = None
    return facts.look(data.train, folder)


def _number(key: str, own: Mapping[str, str], default: int) -> int:
    text = own.get(key, str(default))
    if not text.isdecimal() or not 0 < int(text[:20]) < _MOST:
        raise UserError(
            Problem(key, f"{text[:40]!r} is no positive whole number", f"for example {key}={default}")
        )
    return int(text)


def _memory(text: str) -> int:
    """Bytes, of which there are some; 0 if none are given."""
    if not text:
        return 0
    try:
        found = parse_bytes(text)
    except (ValueError, OverflowError) as error:
        raise UserError(Problem("memory", str(error)[:80], "for example memory=24GB")) from None
    if not found:
        raise UserError(Problem("memory", "is nothing", "for example memory=24GB"))
    return found


def _one_of(key: str, value: str, known: Iterable[str], found: list[Problem]) -> str:
    if value and value not in known:
        found.append(Problem(key, f"there is no {key} {value[:40]!r}", nearest(value[:40], known)))
    return value


def _objective(tree: Mapping[str, Any], own: Mapping[str, str], found: list[Problem]) -> str:
    written = as_choice(tree.get("objective"), "objective")
    name = own.get("objective") or (str(written.get("name", "")) if isinstance(written, dict) else "")
    return _one_of("objective", name, plugins.names("objectives"), found)


def _deadline(text: str) -> float:
    """Seconds; 0 without one."""
    found = _DURATION.fullmatch(text.strip())
    if text and (not found or not float(found[1])):
        raise UserError(Problem("deadline", f"{text[:40]!r} is no time", "write it like 2h, 90m or 1d"))
    return float(found[1]) * _SECONDS[found[2]] if found else 0.0
