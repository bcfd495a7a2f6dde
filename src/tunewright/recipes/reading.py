"""YAML to plain values: nothing is constructed but text, numbers, dates, lists and mappings, and not many of them."""

from pathlib import Path
from typing import Any, NoReturn

import yaml

from tunewright.core.errors import Problem, RecipeError, nearest

_BYTES = 64_000
_VALUES = 10_000
_DEPTH = 50
_LONGEST_NUMBER = 100
_TAG = "tag:yaml.org,2002:"
_NUMBERS = (_TAG + "int", _TAG + "float")
_PLAIN = {*_NUMBERS, *(_TAG + kind for kind in ("str", "bool", "null", "timestamp", "seq", "map", "merge"))}


class _Odd(yaml.MarkedYAMLError):
    """YAML that is well formed and still no recipe's."""

    def __init__(self, what: str, node: yaml.Node) -> None:
        super().__init__(problem=what, problem_mark=node.start_mark)


def read_file(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; RecipeError with the line if it cannot be read, or is too large to be a recipe."""
    tree = parse(_text(path), str(path), lines=True)
    if not isinstance(tree, dict):
        raise RecipeError(Problem(str(path), f"a recipe is a mapping, found {type(tree).__name__}"))
    return tree


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(_BYTES + 1)
        _check_length(raw, str(path))
        return raw.decode("utf-8-sig")
    except FileNotFoundError:
        near = [p.name for p in sorted(path.parent.glob("*.y*ml"))] if path.parent.is_dir() else []
        fix = nearest(path.name, near) if near else "give the path of a YAML file"
        raise RecipeError(Problem(str(path), "there is no such file", fix)) from None
    except UnicodeDecodeError as error:
        _unreadable(str(path), f"not UTF-8 at byte {error.start}")
    except (OSError, ValueError) as error:
        _unreadable(str(path)[:200], str(error)[:200])


def _check_length(text: str | bytes, where: str) -> None:
    if len(text) > _BYTES:
        raise RecipeError(Problem(where, f"longer than {_BYTES} bytes", "a recipe has a few lines of YAML"))


def parse(text: str, where: str, lines: bool = False) -> Any:
    """The value that the YAML text is. RecipeError at ``where``, and the line if it has ``lines``, if it is none."""
    _check_length(text, where)
    if sum(map(text.count, ",[{\n")) > _VALUES:
        _unreadable(where, f"more than {_VALUES} values")
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _Survey().count(node, ())
        return loader.construct_document(node)
    except RecursionError:
        _unreadable(where, "nested too deeply")
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f":{mark.line + 1}" if mark and lines else ""
        _unreadable(where + line, str(error.problem or error.context))
    except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError) as error:
        _unreadable(
            where, " ".join(str(error).split()) or type(error).__name__
        )  # a tag that its value belies


def _unreadable(where: str, what: str) -> NoReturn:
    raise RecipeError(Problem(where, f"not readable as YAML: {what}")) from None


class _Survey:
    """Looks at all nodes before they are constructed: aliases multiply what a short text becomes."""

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}

    def count(self, node: yaml.Node, above: tuple[int, ...]) -> int:
        """How many values the node becomes with its aliases written out."""
        if id(node) in above:
            raise _Odd("an alias that contains itself", node)
        if len(above) > _DEPTH:
            raise _Odd("nested too deeply", node)
        if id(node) not in self.sizes:
            self._check(node)
            path = (*above, id(node))
            self.sizes[id(node)] = 1 + sum(self.count(inner, path) for inner in _below(node))
        if self.sizes[id(node)] > _VALUES:
            raise _Odd(f"more than {_VALUES} values", node)
        return self.sizes[id(node)]

    def _check(self, node: yaml.Node) -> None:
        if node.tag not in _PLAIN:
            raise _Odd(f"the tag {node.tag[:80]!r} means nothing in a recipe", node)
        if isinstance(node, yaml.ScalarNode):
            _check_scalar(node)
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)


def _check_scalar(node: yaml.ScalarNode) -> None:
    if node.tag in _NUMBERS and len(node.value) > _LONGEST_NUMBER:
        raise _Odd(f"a number of {len(node.value)} digits", node)
    if any("\ud800" <= sign <= "\udfff" for sign in node.value):
        raise _Odd("half of a surrogate pair, which is no text", node)


def _check_keys(node: yaml.MappingNode) -> None:
    seen: set[str] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.value in seen:
            raise _Odd(f"the key {key.value[:80]!r} is there twice", key)
        seen.add(str(key.value))


def _below(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [inner for pair in node.value for inner in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []
