"""Full fine-tuning: every weight is trained."""

from pathlib import Path
from typing import Any

from tunewright.core.config import Config as BaseConfig
from tunewright.core.words import Words
from tunewright.methods import Facts, Method


class Config(BaseConfig):
    """Full fine-tuning has no options of its own."""


class Full(Method):
    """Trains the whole model and saves a plain Hugging Face folder."""

    default_lr = 5e-5
    folder = "model"
    facts = Facts(
        idea=Words("All weights move.", "全部权重都参与训练。"),
        formula="θ ← θ − η·∇L(θ)",
        count="all parameters N",
        inference=Words("none: it is a plain model", "无：得到的就是普通模型"),
        when=Words(
            "Much data, a new language or domain, and memory for 16 bytes a parameter.",
            "数据多、要学新语言或新领域，且每个参数有 16 字节内存可用。",
        ),
        paper="Howard & Ruder 2018, arXiv:1801.06146",
    )

    def inject(self, model: Any) -> Any:
        """All parameters require gradients."""
        return model.requires_grad_(True)

    def count(self, model: Any) -> int:
        """Every parameter; tied ones once."""
        return sum(parameter.numel() for parameter in model.parameters())

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
