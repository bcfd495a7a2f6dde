"""LoRA: a frozen weight W gains a trained low-rank term, W + (alpha/r)·B·A (Hu et al. 2021), through PEFT."""

from pathlib import Path
from typing import Any

from pydantic import Field

from tunewright.core.config import Config as BaseConfig
from tunewright.methods import Method


class Config(BaseConfig):
    """The shape of the adapter."""

    rank: int = Field(16, ge=1)
    """Rank r of the two factors A [r, in] and B [out, r]."""
    alpha: float = Field(32, gt=0)
    """Scale; the term is multiplied by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """all-linear is every linear layer but the output head; or module names, or a regular expression."""


class Lora(Method):
    """Trains r·(in + out) parameters for each adapted weight and saves PEFT's own format."""

    default_lr = 2e-4
    folder = "adapter"

    def apply(self, model: Any) -> Any:
        """A PEFT model. Adapters have the base's dtype: the optimizer holds fp32 masters of them."""
        from peft import LoraConfig, get_peft_model

        targets = self.config.target_modules
        config = LoraConfig(
            r=self.config.rank,
            lora_alpha=self.config.alpha,
            lora_dropout=self.config.dropout,
            target_modules=targets if isinstance(targets, str) else list(targets),
            task_type="CAUSAL_LM",
        )
        return get_peft_model(model, config, autocast_adapter_dtype=False)

    def export(self, model: Any, folder: Path) -> None:
        """adapter_config.json and adapter_model.safetensors."""
        model.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card; ours is written beside it

    @classmethod
    def load(cls, base: Any, folder: Path) -> Any:
        """The base with the adapter on it."""
        from peft import PeftModel

        return PeftModel.from_pretrained(base, str(folder), autocast_adapter_dtype=False)

    @classmethod
    def merge(cls, model: Any) -> Any:
        """W + (alpha/r)·B·A written into W."""
        return model.merge_and_unload()
