"""DoRA: LoRA on a weight's direction, with its magnitude trained beside (Liu et al. 2024), through PEFT."""

from typing import Any

from pydantic import Field

from tunewright.core.words import Words
from tunewright.methods import Facts
from tunewright.methods._peft import PeftMethod, TargetConfig


class Config(TargetConfig):
    """The shape of the adapter."""

    rank: int = Field(16, ge=1)
    """Rank r of the two factors of the direction's change."""
    alpha: float = Field(32, gt=0)
    """Scale; the change is multiplied by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""


class Dora(PeftMethod):
    """Trains r·(in + out) + out parameters for each adapted weight."""

    default_lr = 2e-4
    saves = "LORA"
    facts = Facts(
        idea=Words(
            "A weight is split into the length and the direction of its rows: lengths are trained, directions by LoRA.",
            "把权重按行拆成长度和方向：长度直接训练，方向用 LoRA 训练。",
        ),
        formula="W' = m · (W + (α/r)·B·A) / ‖W + (α/r)·B·A‖",
        count="Σ (r·(in + out) + out) over adapted layers",
        inference=Words("none once merged", "合并后无额外开销"),
        when=Words(
            "Where LoRA at a small rank falls short of full fine-tuning and slower steps are no matter.",
            "小秩 LoRA 达不到全量微调、且可以接受每步更慢时。",
        ),
        paper="Liu et al. 2024, arXiv:2402.09353",
    )

    def peft_config(self, model: Any) -> Any:
        """PEFT's LoraConfig with ``use_dora``."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.config.rank, lora_alpha=self.config.alpha, lora_dropout=self.config.dropout, use_dora=True,
            fan_in_fan_out=self.stored_transposed(model), **self.targets(model),
        )  # fmt: skip

    def count(self, model: Any) -> int:
        """Two factors and a magnitude vector for each adapted layer."""
        rank = self.config.rank
        return sum(rank * (layer.inputs + layer.outputs) + layer.outputs for layer in self.adapted(model))
