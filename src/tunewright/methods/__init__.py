"""What is trained: one file per method, each a subclass of :class:`Method` beside its ``Config``."""

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from tunewright.core import plugins
from tunewright.core.config import Config
from tunewright.core.errors import DamagedError, ModelError, Problem
from tunewright.methods import _adapter
from tunewright.models.load import DTYPES, ModelSource, find, load_model

_TRUST = "TUNEWRIGHT_TRUST_REMOTE_CODE"


class Method(ABC):
    """The contract. ``config`` is the file's own ``Config``."""

    default_lr: ClassVar[float]
    """The peak learning rate when the recipe gives none."""
    folder: ClassVar[str]
    """``adapter`` if what is saved needs its base, ``model`` if it stands alone."""

    needs_weights: ClassVar[bool] = True
    """False if training begins from the architecture alone, with random weights."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def apply(self, model: Any) -> Any:
        """The model with everything frozen but what this method trains."""

    @abstractmethod
    def export(self, model: Any, folder: Path) -> None:
        """Save what was trained into an existing folder."""

    @classmethod
    @abstractmethod
    def load(cls, base: Any, folder: Path) -> Any:
        """The trained model again, from its base and an exported folder."""

    @classmethod
    @abstractmethod
    def merge(cls, model: Any) -> Any:
        """A plain transformers model with the same outputs; UserError if the method has none."""


def create(choice: Mapping[str, Any], config: Config) -> Method:
    """The method a stage names."""
    return kind(choice["name"])(config)


def kind(name: str) -> type[Method]:
    """The class in the method's file."""
    return plugins.implementation(plugins.load("methods", name), Method)  # type: ignore[type-abstract]


def foreign_manifest(folder: Path) -> dict[str, Any]:
    """What our manifest would say of another tool's adapter; ModelError if it cannot be loaded."""
    return {"base": _adapter.base(folder), "method": "lora", "precision": "fp32"}


def load_adapter(
    folder: Path, manifest: Mapping[str, Any], precision: str, trusted: bool = False
) -> tuple[Any, type[Method]]:
    """An exported adapter on its base, with the method that knows it.

    ``trusted`` lets Python code run that comes with the base. DamagedError if the manifest does not say what is
    needed, ModelError if the adapter or its base cannot be used.
    """
    if not all(isinstance(manifest.get(key), str) for key in ("base", "method")):
        raise DamagedError(f"{folder}: the manifest does not name base and method")
    if precision not in DTYPES:
        raise DamagedError(f"{folder}: the manifest names no precision that there is, but {precision!r}")
    if (folder / _adapter.CONFIG).exists():
        _adapter.check(folder)
    method = kind(manifest["method"])
    return method.load(load_model(base_of(manifest, trusted), precision), folder), method


def base_of(manifest: Mapping[str, Any], trusted: bool = False) -> ModelSource:
    """The base model that an adapter was trained on.

    An adapter may come from anyone: that its manifest trusts the base's code is not the user's word.
    """
    trusted = trusted or os.environ.get(_TRUST) == "1"
    try:
        return find(manifest["base"], trusted and bool(manifest.get("trust_remote_code")))
    except ModelError as error:
        if not manifest.get("trust_remote_code") or trusted:
            raise
        fix = f"if code is asked for, read it, then set the environment variable {_TRUST}=1"
        raise ModelError(
            [*error.problems, Problem("model", "the adapter was trained with code of its base", fix)]
        ) from None


def stored_dtype(base: str) -> Any:
    """The dtype in which the base model's own files hold its weights, as a torch dtype."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(find(base).path).dtype
