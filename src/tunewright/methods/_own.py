"""The base of the methods that are ours: what is trained is saved by its name, in the shape of PEFT's folders."""

from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tunewright.core import store
from tunewright.core.errors import ModelError, Problem, RecipeError
from tunewright.methods import Method, _adapter
from tunewright.models import files
from tunewright.recipes import plugin_config

Tensors = dict[str, torch.Tensor]


class OwnMethod(Method):
    """A subclass says what is injected and trained. Loading injects the same again and fills it."""

    folder = "adapter"

    def tensors(self, model: Any) -> Tensors:
        """What is saved, by name: the trained parameters, unless a subclass says otherwise."""
        return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def fill(self, model: Any, tensors: Tensors) -> None:
        """Put saved tensors, whose names and shapes are those of :meth:`tensors`, back."""
        own = self.tensors(model)
        for name, tensor in tensors.items():
            own[name].copy_(tensor)

    def misses(self, base: Any, header: dict[str, dict[str, Any]]) -> list[str]:
        """What is wrong with the size of a file for this base: it holds :meth:`count` numbers."""
        expected = self.count(base)
        found = sum(prod(entry["shape"]) for entry in header.values())
        return [] if found == expected else [f"holds {found:,} numbers, expected {expected:,} for this base"]

    def fits(self, model: Any, header: dict[str, dict[str, Any]]) -> list[str]:
        """What is wrong with the names and shapes in a file, told from its header."""
        return _adapter.misfits(self.tensors(model), header)

    def ready(self, base: Any) -> Any:
        """The base with all that saved tensors are put into; :meth:`load` begins with it."""
        return self.apply(base)

    def export(self, model: Any, folder: Path) -> None:
        """adapter_model.safetensors and an adapter_config.json that names the method and its options."""
        tensors = {name: t.contiguous().cpu() for name, t in self.tensors(model).items()}
        save_file(tensors, folder / _adapter.WEIGHTS, metadata={"format": "pt"})
        self.describe(model, folder)

    def describe(self, model: Any, folder: Path) -> None:
        """The adapter_config.json by which :meth:`load` knows the method and its options."""
        options = self.config.model_dump(mode="json")
        name = type(self).__module__.rpartition(".")[2]
        config = {
            "peft_type": _adapter.OWN, "base_model_name_or_path": str(model.config.name_or_path),
            "tunewright_method": name, "tunewright_options": options,
        }  # fmt: skip
        store.write_json(folder / _adapter.CONFIG, config)

    def header(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Names and shapes of what is saved in a folder, as :meth:`tensors` names it."""
        return _adapter.header(folder)

    def read(self, folder: Path) -> Tensors:
        """What is saved in a folder, by the names of :meth:`tensors`."""
        tensors: Tensors = load_file(folder / _adapter.WEIGHTS)
        return tensors

    @classmethod
    def load(cls, base: Any, folder: Path) -> Any:
        """The base with what was trained; ModelError if the two do not fit."""
        method = cls(_options(folder, cls.__module__.rpartition(".")[2]))
        where, header = str(folder / _adapter.WEIGHTS), method.header(folder)
        if found := method.misses(base, header):  # before memory is taken for it
            raise ModelError(Problem(where, what, "name its own base") for what in found)
        model = method.ready(base)
        if found := method.fits(model, header):
            raise ModelError(Problem(where, what, "name its own base") for what in found)
        method.fill(model, method.read(folder))
        return model


def _options(folder: Path, method: str) -> Any:
    """The method's config as the adapter's folder has it; ModelError if it is another method's or none."""
    config = _adapter.config(folder)
    where, options = str(folder / _adapter.CONFIG), config.get("tunewright_options")
    if config.get("tunewright_method") != method or not isinstance(options, dict):
        what = f"an adapter of the method {str(config.get('tunewright_method'))[:80]!r}, expected {method!r}"
        raise ModelError(Problem(where, what, files.AGAIN))
    try:
        return plugin_config("methods", {**options, "name": method})
    except RecipeError as error:
        raise ModelError(
            Problem(f"{where}: {p.where}", p.what, files.AGAIN) for p in error.problems
        ) from None
