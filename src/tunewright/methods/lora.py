"""LoRA: a frozen weight W gains a trained low-rank term, W + (alpha/r)·B·A (Hu et al. 2021), through PEFT."""

import warnings
from pathlib import Path
from typing import Any

from pydantic import Field

from tunewright.core.config import Config as BaseConfig
from tunewright.core.errors import ModelError, Problem
from tunewright.methods import Method, _adapter


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
        """The base with the adapter on it; ModelError if the two do not fit."""
        from peft import LoraConfig, PeftModel

        _adapter.check(folder)
        try:
            config = LoraConfig.from_pretrained(str(folder))
            if isinstance(config.target_modules, str) or isinstance(config.exclude_modules, str):
                config.target_modules, config.exclude_modules = set(_adapter.modules(folder)), None
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Found missing adapter keys")  # an error below
                model = PeftModel.from_pretrained(
                    base, str(folder), config=config, autocast_adapter_dtype=False
                )
        except Exception as error:  # whatever PEFT makes of a config that is not as it expects it
            what = f"cannot be loaded: {type(error).__name__}: {' '.join(str(error).split())}"[:400]
            raise ModelError(Problem(str(folder), what)) from error
        _check_fit(model, folder)
        return model

    @classmethod
    def merge(cls, model: Any) -> Any:
        """W + (alpha/r)·B·A written into W."""
        return model.merge_and_unload()


def _check_fit(model: Any, folder: Path) -> None:
    """PEFT leaves out what does not fit and begins anew with what is missing; ModelError for both."""
    from peft import get_peft_model_state_dict

    expected, there = (
        set(get_peft_model_state_dict(model, save_embedding_layers=False)),
        set(_adapter.header(folder)),
    )
    missing = sorted(expected - there)
    strange = sorted(name for name in there - expected if ".lora_" in name)
    found = [f"lacks {len(missing)} of {len(expected)} weights: {missing[0]}"] if missing else []
    found += [f"{len(strange)} weights are for modules that the base lacks: {strange[0]}"] if strange else []
    if found:
        where = str(folder / _adapter.WEIGHTS)
        raise ModelError(Problem(where, what, "download it again, and name its own base") for what in found)
