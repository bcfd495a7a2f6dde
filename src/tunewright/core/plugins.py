"""One-file plugins: a file's name in a room's folder is its registered name.

A room (``methods``, ``objectives`` ...) is a package of :mod:`tunewright`. Its plugins are the files there
that do not begin with an underscore, files in ``$TUNEWRIGHT_PLUGINS/<room>/``, and entry points of the
group ``tunewright.<room>`` (imported only when their name is asked for).
"""

import ast
import importlib
import importlib.util
import os
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from tunewright.core.errors import Problem, RecipeError, nearest

FOLDERS_VARIABLE = "TUNEWRIGHT_PLUGINS"
ROOMS = ("methods", "objectives", "regularizers", "optimizers", "fast")
Contract = TypeVar("Contract")


def _sources(room: str) -> dict[str, Path]:
    """Name -> file, for the room's own files and those of the extra folders."""
    extra = [Path(p) for p in os.environ.get(FOLDERS_VARIABLE, "").split(os.pathsep) if p]
    folders = [Path(__file__).parent.parent / room, *(folder / room for folder in extra)]
    return {p.stem: p for f in folders for p in sorted(f.glob("[!_]*.py"))}


def names(room: str) -> list[str]:
    """All registered names, sorted, without importing any of them."""
    group = entry_points(group=f"tunewright.{room}")
    return sorted({*_sources(room), *(point.name for point in group)})


def load(room: str, name: str) -> ModuleType:
    """Import one plugin; RecipeError with the nearest spelling if there is none of that name."""
    source = _sources(room).get(name)
    if source is None:
        for point in entry_points(group=f"tunewright.{room}", name=name):
            module: ModuleType = point.load()
            return module
        what = f"no {room.removesuffix('s')} is called {name!r}"
        raise RecipeError(Problem(f"{room.removesuffix('s')}.name", what, nearest(name, names(room))))
    qualified = f"tunewright.{room}.{name}"
    if source.parent == Path(__file__).parent.parent / room:
        return importlib.import_module(qualified)
    return sys.modules.get(qualified) or _import_file(qualified, source)


def _import_file(qualified: str, source: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(qualified, source)
    if spec is None or spec.loader is None:
        raise ImportError(f"{source} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[qualified] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[qualified]
        raise
    return module


def summary(room: str, name: str) -> str:
    """The first line of a plugin's docstring; a file is read for it, and not imported."""
    source = _sources(room).get(name)
    told = ast.get_docstring(ast.parse(source.read_bytes())) if source else load(room, name).__doc__
    return (told or "").strip().partition("\n")[0]


def implementation(module: ModuleType, base: type[Contract]) -> type[Contract]:
    """The one class of a plugin's file that keeps the room's contract."""
    own = [v for v in vars(module).values() if isinstance(v, type) and issubclass(v, base)]
    own = [cls for cls in own if cls.__module__ == module.__name__]
    if len(own) != 1:
        found = ", ".join(cls.__name__ for cls in own) or "none"
        what = f"a plugin has exactly one subclass of {base.__name__}, found {found}"
        raise RecipeError(Problem(str(module.__file__), what))
    return own[0]
