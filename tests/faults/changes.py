"""One change each to what a run was begun with."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tunewright.methods import lora
from tunewright.objectives import pretrain, sft

Overrides = tuple[str, ...]


@dataclass(frozen=True)
class Inputs:
    """A recipe and all that it names, in a folder of its own."""

    folder: Path

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.yaml"

    @property
    def rows(self) -> Path:
        return self.folder / "rows.jsonl"

    @property
    def held_out(self) -> Path:
        return self.folder / "held-out.jsonl"

    @property
    def model(self) -> Path:
        return self.folder / "model"


Edit = Callable[[Inputs, pytest.MonkeyPatch], Overrides]
"""Makes the change; what it returns is laid over the recipe."""


@dataclass(frozen=True)
class Change:
    """A change, the fields that must be told, and the values (old, new) where those are known."""

    name: str
    edit: Edit
    fields: tuple[str, ...]
    values: tuple[str, str] = ("", "")
    fits: bool = True
    """Whether a checkpoint from before it can be gone on from."""


def setting(field: str, old: str, new: str, *more: str, fits: bool = True) -> Change:
    """Another value in the recipe; ``more`` are fields that follow from it."""
    return Change(field, lambda inputs, patch: (f"{field}={new}",), (field, *more), (old, new), fits)


def lines(change: Callable[[list[str]], list[str]], held_out: bool = False) -> Edit:
    """The rows rewritten."""

    def edit(inputs: Inputs, patch: pytest.MonkeyPatch) -> Overrides:
        path = inputs.held_out if held_out else inputs.rows
        path.write_text("".join(change(path.read_text().splitlines(keepends=True))))
        return ()

    return edit


def template(inputs: Inputs, patch: pytest.MonkeyPatch) -> Overrides:
    """The tokenizer's own template says one word more."""
    path = inputs.model / "chat_template.jinja"
    path.write_text("{{- 'Now:' -}}" + path.read_text())
    return ()


def token(inputs: Inputs, patch: pytest.MonkeyPatch) -> Overrides:
    """One token more in tokenizer.json."""
    path = inputs.model / "tokenizer.json"
    tree = json.loads(path.read_text())
    tree["added_tokens"].append({**tree["added_tokens"][-1], "content": "<|more|>", "id": _next_id(tree)})
    path.write_text(json.dumps(tree))
    return ()


def _next_id(tree: dict[str, Any]) -> int:
    added = [entry["id"] for entry in tree["added_tokens"]]
    return int(max([*added, *tree["model"]["vocab"].values()])) + 1


def weight(inputs: Inputs, patch: pytest.MonkeyPatch) -> Overrides:
    """One value of one base weight has another sign."""
    (path,) = inputs.model.glob("*.safetensors")
    tensors = load_file(path)
    name = sorted(tensors)[0]
    flat = tensors[name].view(-1)
    flat[0] = -flat[0] if flat[0] else 1.0
    save_file(tensors, path, metadata={"format": "pt"})
    return ()


def version(inputs: Inputs, patch: pytest.MonkeyPatch) -> Overrides:
    """Another release of a library that computes."""
    known = metadata.version
    patch.setattr(metadata, "version", lambda name: "0.0.1" if name == "peft" else known(name))
    return ()


def first_edited(rows: list[str]) -> list[str]:
    """Another answer in the first row."""
    return [rows[0].replace("then", "and then"), *rows[1:]]


MORE = json.dumps({"prompt": "Say more.", "completion": "More."}) + "\n"
DATA, VALID, BASE = ("data_sha256",), ("valid_sha256",), "base_sha256"
METHOD = tuple(f"method.{name}" for name in ("name", *lora.Config.model_fields))
OBJECTIVE = tuple(
    f"objective.{name}" for name in ("name", *pretrain.Config.model_fields, *sft.Config.model_fields)
)
CHANGES = (
    Change("a row edited", lines(first_edited), DATA),
    Change("a row added", lines(lambda rows: [*rows, MORE]), DATA),
    Change("a row removed", lines(lambda rows: rows[1:]), DATA),
    Change("two rows swapped", lines(lambda rows: [rows[1], rows[0], *rows[2:]]), DATA),
    Change("a held-out row edited", lines(first_edited, held_out=True), VALID),
    setting("train.seed", "0", "1"),
    setting("train.tokens_per_batch", "96", "80"),
    setting("train.micro_tokens", "48", "32"),
    setting("train.lr", "0.01", "0.02"),
    setting("train.schedule", "'cosine'", "linear"),
    setting("data.template", "'auto'", "chatml", "template_sha256"),
    setting("data.max_length", "1024", "20"),
    setting("precision", "'fp32'", "bf16"),
    setting("method.dropout", "0.1", "0.2"),
    setting("method.rank", "16", "8", fits=False),
    Change("method", lambda inputs, patch: ("method=full",), METHOD, ("'lora'", "'full'"), fits=False),
    Change("objective", lambda inputs, patch: ("stages.0.objective=pretrain",), OBJECTIVE, ("'sft'", "'pretrain'")),
    Change("template file", template, ("template_sha256", BASE)),
    Change("tokenizer.json", token, ("tokenizer_sha256", BASE)),
    Change("base weights", weight, (BASE,)),
    Change("a library's version", version, ("versions.peft",), (f"'{metadata.version('peft')}'", "'0.0.1'")),
)  # fmt: skip
HARMLESS = (
    "train.keep=5",
    "evaluate.limit=9",
    "evaluate.max_new_tokens=5",
    "evaluate.samples=3",
    "evaluate.generate=false",
)
