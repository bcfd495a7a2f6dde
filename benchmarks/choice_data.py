"""The rows of choice.yaml's tasks, drawn from the fixtures' files by a seed and kept."""

import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks import rows
from tunewright.core import store
from tunewright.data import formats, lint, prepare
from tunewright.data.rows import Row
from tunewright.recipes.schema import DataFile

Tree = dict[str, Any]


def held(folder: Path, spec: Tree, fixtures: Path) -> Tree:
    """``train`` and ``valid``, files of so many rows of each of the task's files, made if they are not there."""
    at = folder / store.sha256_json(spec)[:12]
    parts = {"train": at / "train.jsonl", "valid": at / "held_out.jsonl"}
    if not all(path.exists() for path in parts.values()):
        train, valid = list[Tree](), list[Tree]()
        for label, name in _files(spec["files"]):
            found = list(_fitting(fixtures / name, label, spec))
            if len(found) < spec["train"] + spec["held_out"]:
                raise ValueError(f"{name} has only {len(found)} rows that fit")
            random.Random(0).shuffle(found)
            train += found[: spec["train"]]
            valid += found[spec["train"] : spec["train"] + spec["held_out"]]
        at.mkdir(parents=True, exist_ok=True)
        for path, part in zip(parts.values(), (train, valid), strict=True):
            rows.write(path, part)
    return {name: str(path) for name, path in parts.items()}


def _files(files: Any) -> Iterator[tuple[str, str]]:
    """Classes with their files, or files of no class."""
    yield from files.items() if isinstance(files, Mapping) else (("", name) for name in files)


def _fitting(path: Path, label: str, spec: Tree) -> Iterator[Tree]:
    """Good rows of the sizes that are asked for, each once, as any reader of JSONL understands them."""
    seen = set[str]()
    for source in prepare.sources([DataFile(path=str(path))]):
        for row in lint.check(formats.read(source)):
            if not isinstance(row, Row):
                continue
            tree = _tree(row, label, spec.get("cut"))
            said = _said(tree)
            size = len(said.encode())
            if spec.get("shortest", 1) <= size <= spec.get("longest", size) and said not in seen:
                seen.add(said)
                yield tree


def _tree(row: Row, label: str, cut: int | None) -> Tree:
    if row.compares:
        asked = [{"role": m.role, "content": m.content} for m in row.prompt]
        return {"prompt": asked, "chosen": row.chosen, "rejected": row.rejected}
    if row.messages:
        return {"messages": [{"role": m.role, "content": m.content} for m in row.messages]}
    text = " ".join(row.text.split())[:cut]
    return {"text": text, "label": label} if label else {"text": text}


def _said(tree: Tree) -> str:
    """All that a row says, the longer of two answers alone."""
    turns = tree.get("messages") or tree.get("prompt") or [{"content": tree.get("text", "")}]
    answer = max(tree.get("chosen", ""), tree.get("rejected", ""), key=len)
    return "\n".join([*(turn["content"] for turn in turns), answer])
