"""Full fine-tuning: every weight is trained."""

from pathlib import Path
from typing import Any

from tunewright.core.config import Config as BaseConfig
from tunewright.methods import Method


class Config(BaseConfig):
    """Full fine-tuning has no options of its own."""


class Full(Method):
    """Trains the whole model and saves a plain Hugging Face folder."""

    default_lr = 5e-5
    folder = "model"

    def apply(self, model: Any) -> Any:
        """All parameters require gradients."""
        return model.requires_grad_(True)

    def export(self, model: Any, folder: Path) -> None:
        """config.json, model.safetensors, generation_config.json."""
        model.save_pretrained(folder)

    @classmethod
    def load(cls, base: Any, folder: Path) -> Any:
        """The folder is the model; the base is not used."""
        return type(base).from_pretrained(folder, dtype=base.dtype).to(base.device)

    @classmethod
    def merge(cls, model: Any) -> Any:
        """Already plain."""
        return model
