"""Read a recipe: YAML, dotted overrides, one shorthand; every problem at once."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from tunewright.core import plugins
from tunewright.core.config import Config, problems
from tunewright.core.errors import Problem, RecipeError, nearest
from tunewright.recipes import reading
from tunewright.recipes.schema import AUTO, CHOSEN, EARLIER, Auto, Eval, Recipe, Stage, as_choice, as_list

Tree = dict[str, Any]
Schema = TypeVar("Schema", bound=BaseModel)
Decide = Callable[[Sequence[Tree], int, Auto, str], Tree]
"""All stages as they are written, which of them asks, with what options, and the run folder -> that stage, decided."""
_RUN_KEYS = ("output", "logs", "stages", "eval")
EVAL = "eval"
"""What the measurement after the last stage is called."""
_DEEPEST_KEY = 20
_CHOICES = tuple((f"{key}s", key) for key in CHOSEN)
_KEYS = (*(key for key in Stage.model_fields if key != "name"), *_RUN_KEYS)


def load(
    source: str | Path | Mapping[str, Any],
    overrides: Iterable[str] | Mapping[str, Any] = (),
    decide: Decide | None = None,
) -> Recipe:
    """The recipe in a YAML file or a mapping, with ``key.sub=value`` overrides applied.

    ``decide`` is asked for stages with ``method: auto``, once nothing else is wrong. Raises RecipeError with every
    problem of every stage.
    """
    tree = _tree(source, overrides)
    name = "run" if isinstance(source, Mapping) else Path(source).stem
    found: list[Problem] = []
    trees = _stage_trees(tree, found)
    open_ = _open(trees, decide, found)
    stages = [_stage(_settled(raw), where, found) for raw, where in trees]
    run = {"output": tree.get("output", f"runs/{name}"), "logs": tree.get("logs") or ()}
    recipe = _validated(Recipe, {**run, "stages": ()}, "", found)
    good = [stage for stage in stages if stage]
    wrong = {raw.get("name") for (raw, _), stage in zip(trees, stages, strict=True) if stage is None}
    _check_names(good, wrong, found)
    last = _eval(tree, [stage.name for stage in good], wrong, found) if tree.get(EVAL) else None
    if found or recipe is None:
        raise RecipeError(found, (raw for raw, _ in trees))
    if decide:
        for place, options in open_.items():
            decided = decide([raw for raw, _ in trees], place, options, recipe.output)
            good[place] = _decided(decided, trees[place][1])
    return recipe.model_copy(update={"stages": tuple(good), "eval": last})


def _open(trees: list[tuple[Tree, str]], decide: Decide | None, found: list[Problem]) -> dict[int, Auto]:
    """The options of every stage whose method is yet to be chosen."""
    asked: dict[int, Auto] = {}
    for place, (raw, where) in enumerate(trees):
        choice = as_choice(raw.get("method"), "method")
        if not isinstance(choice, dict) or choice.get("name") != AUTO:
            continue
        at = f"{where}.method" if where else "method"
        if decide is None:
            found.append(Problem(at, "auto is chosen when a run begins, here a method is needed", "name one"))
        options = _validated(Auto, {key: value for key, value in choice.items() if key != "name"}, at, found)
        if options:
            asked[place] = options
    return asked


def _settled(raw: Tree) -> Tree:
    """With some method in place of ``auto``, so that all else can be checked."""
    choice = as_choice(raw.get("method"), "method")
    is_open = isinstance(choice, dict) and choice.get("name") == AUTO
    return {**raw, "method": CHOSEN["method"]} if is_open else raw


def _decided(raw: Tree, where: str) -> Stage:
    found: list[Problem] = []
    stage = _stage(raw, where, found)
    if stage is None or found:
        raise RecipeError(found, [raw])
    return stage


def _tree(source: str | Path | Mapping[str, Any], overrides: Iterable[str] | Mapping[str, Any]) -> Tree:
    """What is written, with overrides applied and shorthands spelled out."""
    tree = dict(source) if isinstance(source, Mapping) else reading.read_file(Path(source))
    return _override(_spelled_out(tree), _pairs(overrides))


def stage_trees(source: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> list[Tree]:
    """Each stage as it is written, over what the recipe says for all; no plugin is imported, nothing validated.

    RecipeError if the file cannot be read, or has keys that no recipe has.
    """
    found: list[Problem] = []
    trees = [tree for tree, _ in _stage_trees(_tree(source, overrides), found)]
    if found:
        raise RecipeError(found)
    return trees


def _eval(tree: Tree, names: list[str], wrong: set[Any], found: list[Problem]) -> Eval | None:
    """The measurement that ends a run, with what the file says for all stages."""
    own = {} if tree[EVAL] is True else tree[EVAL]
    if not isinstance(own, dict):
        found.append(Problem(EVAL, "expected a mapping, or true for every stage", ""))
        return None
    data = tree["data"] if isinstance(tree.get("data"), dict) else {}
    shared = {
        "data": data.get("valid"),
        "template": data.get("template"),
        "precision": tree.get("precision"),
        "trust_remote_code": tree.get("trust_remote_code"),
        "evaluate": tree.get("evaluate"),
    }
    raw = _merge({key: value for key, value in shared.items() if value is not None}, own)
    last = _validated(Eval, raw, EVAL, found)
    if last is None:
        return None
    if not last.data:
        found.append(
            Problem(f"{EVAL}.data", "there are no held-out files", "name some here or as data.valid")
        )
    for place, model in enumerate(last.models):
        name = model.removeprefix(EARLIER)
        if name != model and name not in {*names, *wrong}:
            fix = nearest(name, names)
            found.append(Problem(f"{EVAL}.models.{place}", f"there is no stage {name!r}", fix))
    return last


def _pairs(overrides: Iterable[str] | Mapping[str, Any]) -> list[tuple[str, Any]]:
    if isinstance(overrides, Mapping):
        return [pair for key, value in overrides.items() for pair in _flat(key, value)]
    pairs = []
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise RecipeError(Problem(text, "an override is written key=value", "for example train.lr=1e-4"))
        if key.count(".") > _DEEPEST_KEY:
            raise RecipeError(Problem(text[:80], "no option lies that deep", "for example train.lr=1e-4"))
        pairs.append((key, reading.parse(value, text[:80]) if value else ""))
    return pairs


def _flat(key: str, value: Any) -> list[tuple[str, Any]]:
    """A nested mapping as dotted pairs, so that it changes what it names and nothing else."""
    if isinstance(value, Mapping):
        return [pair for inner, v in value.items() for pair in _flat(f"{key}.{inner}", v)]
    return [(key, value)]


def _override(tree: Tree, pairs: list[tuple[str, Any]]) -> Tree:
    for key, value in pairs:
        tree = _spelled_out(_set(tree, key.split("."), value, key))
    return tree


def _spelled_out(tree: Tree) -> Tree:
    """The tree and its stages without shorthands, so that one can go inside or lay them over one another."""
    long = dict(tree)
    if isinstance(long.get("data"), (str, list)):
        long["data"] = {"train": long["data"]}
    for key in CHOSEN:
        if isinstance(long.get(key), str):
            long[key] = {"name": long[key]}
    if isinstance(long.get("stages"), list):
        long["stages"] = [_spelled_out(s) if isinstance(s, dict) else s for s in long["stages"]]
    return long


def _set(node: Any, path: list[str], value: Any, key: str) -> Any:
    """A copy of ``node`` with the value at ``path`` replaced; stages are found by number or name."""
    if not path:
        return value
    head, rest = path[0], path[1:]
    if isinstance(node, list):
        index = _index(node, head, key)
        return [_set(item, rest, value, key) if i == index else item for i, item in enumerate(node)]
    if not isinstance(node, dict):
        node = {}
    return {**node, head: _set(node.get(head), rest, value, key)}


def _index(stages: list[Any], head: str, key: str) -> int:
    known = [str(s.get("name", i)) if isinstance(s, dict) else str(i) for i, s in enumerate(stages)]
    if head.isdigit() and int(head) < len(stages):
        return int(head)
    if head in known:
        return known.index(head)
    raise RecipeError(Problem(key, f"there is no stage {head!r}", nearest(head, known)))


def _stage_trees(tree: Tree, found: list[Problem]) -> list[tuple[Tree, str]]:
    """Each stage's own tree laid over what the recipe says for all, with its place for messages."""
    unknown = [str(key) for key in tree if key not in _KEYS]
    found += [Problem(key, "there is no such option", nearest(key, _KEYS)) for key in unknown]
    shared = {k: v for k, v in tree.items() if k in _KEYS and k not in _RUN_KEYS}
    stages = tree.get("stages")
    if stages is None:
        return [(shared, "")]
    if not isinstance(stages, list) or not stages or not all(isinstance(s, dict) for s in stages):
        found.append(Problem("stages", "expected a list of stages, each a mapping"))
        return []
    return [(_merge(shared, stage), f"stages.{i}") for i, stage in enumerate(stages)]


def _merge(under: Tree, over: Tree) -> Tree:
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        mergeable = isinstance(below, dict) and isinstance(value, dict) and not _renames(below, value)
        merged[key] = _merge(below, value) if mergeable else value  # type: ignore[arg-type]
    return merged


def _renames(under: Tree, over: Tree) -> bool:
    """Whether a choice names another plugin: the options below are not that one's then."""
    return "name" in over and over["name"] != under.get("name")


def _validated(schema: type[Schema], tree: Tree, where: str, found: list[Problem]) -> Schema | None:
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        found += problems(error, schema, where)
        return None


def _stage(tree: Tree, where: str, found: list[Problem]) -> Stage | None:
    """One validated stage, its plugin options checked too and its defaults written out."""
    stage = _validated(Stage, tree, where, found)
    update: Tree = {}
    for room, key in _CHOICES:
        choice = as_choice(tree.get(key, {}), key)
        if not isinstance(choice, dict) or not isinstance(choice.get("name"), str):
            continue  # already a problem of the stage itself
        config = _plugin(room, choice, f"{where}.{key}" if where else key, found)
        if config is not None:
            update[key] = {"name": choice["name"], **config.model_dump(mode="json")}
    if "regularizers" in tree:
        at = f"{where}.regularizers" if where else "regularizers"
        update["regularizers"] = _listed(as_list(tree["regularizers"]), at, found)
    if isinstance(tree.get("fast"), dict):
        known, at = plugins.names("fast"), f"{where}.fast" if where else "fast"
        strange = [str(name) for name in tree["fast"] if name not in known]
        found += [
            Problem(f"{at}.{name}", "there is no such technique", nearest(name, known)) for name in strange
        ]
    if stage is None:
        return None
    if stage.advised and stage.advised.method != stage.method["name"]:
        update["advised"] = None
    return stage.model_copy(update={"name": stage.name or stage.objective["name"], **update})


def _listed(choices: Iterable[Any], where: str, found: list[Problem]) -> tuple[Tree, ...]:
    """Regularizers with their defaults written out."""
    told = []
    for number, choice in enumerate(choices):
        if isinstance(choice, dict) and isinstance(choice.get("name"), str):
            config = _plugin("regularizers", choice, f"{where}.{number}", found)
            if config is not None:
                told.append({"name": choice["name"], **config.model_dump(mode="json")})
    return tuple(told)


def _plugin(room: str, choice: Tree, where: str, found: list[Problem]) -> Config | None:
    try:
        return plugin_config(room, choice, where)
    except RecipeError as error:
        found += error.problems
        return None


def plugin_config(room: str, choice: Mapping[str, Any], where: str = "") -> Config:
    """The plugin's own ``Config`` from ``{name: ..., options}``; RecipeError names each wrong option."""
    try:
        module = plugins.load(room, choice["name"])
    except RecipeError as error:
        raise RecipeError([Problem(f"{where}.name", p.what, p.fix) for p in error.problems]) from None
    schema = getattr(module, "Config", None)
    if not (isinstance(schema, type) and issubclass(schema, Config)):
        raise RecipeError(Problem(str(module.__file__), "a plugin has a Config beside its class, found none"))
    try:
        return schema.model_validate({k: v for k, v in choice.items() if k != "name"})
    except ValidationError as error:
        raise RecipeError(problems(error, schema, where)) from None


def _check_names(stages: list[Stage], wrong: set[Any], found: list[Problem]) -> None:
    seen: list[str] = []
    for stage in stages:
        if stage.name == EVAL:
            found.append(
                Problem("stages", f"no stage can be called {EVAL!r}", "that is the last measurement's name")
            )
        if stage.name in seen:
            found.append(Problem("stages", f"two stages are called {stage.name!r}", "give each a `name`"))
        name = stage.model.removeprefix(EARLIER)
        if name != stage.model and name not in {*seen, *wrong}:
            what = f"stage {stage.name!r} starts from {stage.model!r}, which is not an earlier stage"
            found.append(Problem("model", what, nearest(name, seen) if seen else ""))
        seen.append(stage.name)


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe, every default written out; loading it gives the same recipe."""
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return str(text)


def schema_json() -> Tree:
    """JSON schema of a recipe file, with the options of every method and objective, for editors."""
    stage = Stage.model_json_schema()
    definitions = stage.pop("$defs", {})
    for room, key in _CHOICES:
        stage["properties"][key] = {"anyOf": [{"enum": plugins.names(room)}, *_choices(room, definitions)]}
    asks = Auto.model_json_schema()
    asks["properties"] |= {"name": {"const": AUTO}}
    by_name, *with_options = stage["properties"]["method"]["anyOf"]
    by_name = {"enum": [*by_name["enum"], AUTO]}
    stage["properties"]["method"]["anyOf"] = [by_name, *with_options, {**asks, "required": ["name"]}]
    held = {"anyOf": [{"enum": plugins.names("regularizers")}, *_choices("regularizers", definitions)]}
    stage["properties"]["regularizers"] = {"anyOf": [held, {"type": "array", "items": held}]}
    whole = Recipe.model_json_schema()
    run, definitions["Eval"] = whole["properties"], {**whole["$defs"]["Eval"], "required": []}
    partial = {**stage, "required": [], "title": "Stage"}
    properties = {**stage["properties"], "output": run["output"], "logs": run["logs"],
                  "stages": {"type": "array", "items": partial},
                  EVAL: {"anyOf": [{"const": True}, {"$ref": "#/$defs/Eval"}]}}  # fmt: skip
    properties.pop("name")
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Tunewright recipe"}
    return {**head, "type": "object", "additionalProperties": False, "properties": properties,
            "$defs": definitions}  # fmt: skip


def _choices(room: str, definitions: Tree) -> list[Tree]:
    choices = []
    for name in plugins.names(room):
        module = plugins.load(room, name)
        config = module.Config.model_json_schema()
        definitions.update(config.pop("$defs", {}))
        config["properties"] = {"name": {"const": name}, **config.get("properties", {})}
        choices.append({**config, "required": ["name"], "description": plugins.summary(room, name)})
    return choices
