"""LoRA: a frozen weight W gains a trained low-rank term, W + (alpha/r)·B·A (Hu et al. 2021), through PEFT."""

from typing import Any

from pydantic import Field

from tunewright.core.config import Config as BaseConfig
from tunewright.core.words import Words
from tunewright.methods import Facts
from tunewright.methods._peft import PeftMethod, as_targets


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


class Lora(PeftMethod):
    """Trains r·(in + out) parameters for each adapted weight."""

    default_lr = 2e-4
    saves = "LORA"
    reads = ("LORA",)
    facts = Facts(
        idea=Words(
            "The change of a weight matrix is learned as the product of two thin matrices; the matrix itself stays.",
            "权重矩阵的改变量由两个瘦矩阵的乘积来学习，原矩阵不动。",
        ),
        formula="h = W·x + (α/r)·B·A·x",
        count="Σ r·(in + out) over adapted layers",
        inference=Words("none once merged", "合并后无额外开销"),
        when=Words(
            "The first choice: little memory, good quality, adapters of megabytes that merge without a trace.",
            "首选：显存省、效果好，适配器只有几兆，合并后没有痕迹。",
        ),
        paper="Hu et al. 2021, arXiv:2106.09685",
    )

    def peft_config(self, model: Any) -> Any:
        """PEFT's LoraConfig."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.config.rank, lora_alpha=self.config.alpha, lora_dropout=self.config.dropout,
            target_modules=as_targets(self.config.target_modules), task_type="CAUSAL_LM",
        )  # fmt: skip

    def count(self, model: Any) -> int:
        """Two factors for each adapted layer."""
        return sum(self.config.rank * (layer.inputs + layer.outputs) for layer in self.adapted(model))
