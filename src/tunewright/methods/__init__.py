"""What is trained: one file per method, each a subclass of :class:`Method` beside its ``Config``."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from tunewright.core import plugins
from tunewright.core.config import Config
from tunewright.core.errors import DamagedError
from tunewright.models.load import ModelSource, find, load_model


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


def load_adapter(folder: Path, manifest: Mapping[str, Any], precision: str) -> tuple[Any, type[Method]]:
    """An exported adapter on its base, with the method that knows it."""
    if "base" not in manifest or "method" not in manifest:
        raise DamagedError(f"{folder}: the manifest does not name base and method")
    base = load_model(base_of(manifest), precision)
    method = kind(manifest["method"])
    return method.load(base, folder), method


def base_of(manifest: Mapping[str, Any]) -> ModelSource:
    """The base model that an adapter was trained on."""
    return find(manifest["base"], bool(manifest.get("trust_remote_code")))


def stored_dtype(base: str) -> Any:
    """The dtype in which the base model's own files hold its weights, as a torch dtype."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(find(base).path).dtype
