"""Rooms import one way: down the list, never up."""

import ast
from pathlib import Path

import tunewright

ROOT = Path(tunewright.__file__).parent
ROOMS = ["core", "recipes", "data", "models", "methods", "objectives", "regularizers", "optimizers", "fast", "train", "compress", "evaluate",
         "advise", "serve", "cluster", "studio"]  # fmt: skip
OUTER = len(ROOMS)
"""Files beside the rooms (pipeline, cli ...) may import any of them."""


def imported(path: Path) -> set[str]:
    """Second parts of what a file imports from tunewright."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "tunewright":
            parts = node.module.split(".")
            names |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            parts = [alias.name.split(".") for alias in node.names]
            names |= {p[1] for p in parts if p[0] == "tunewright" and len(p) > 1}
    return names


def level(name: str) -> int:
    return ROOMS.index(name) if name in ROOMS else OUTER


def test_a_room_imports_only_from_rooms_above_it():
    wrong = []
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            wrong += [
                f"{path.relative_to(ROOT)} imports {n}" for n in imported(path) if level(n) > level(room)
            ]
    assert not wrong, "\n".join(wrong)


def test_every_folder_is_a_room():
    folders = {p.name for p in ROOT.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert folders <= set(ROOMS)
