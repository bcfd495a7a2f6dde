"""VeRA: fixed random matrices shared by all layers, scaled by two trained vectors each (Kopiczko et al. 2023)."""

from typing import Any

from pydantic import Field

from tunewright.core.words import Words
from tunewright.methods import Facts
from tunewright.methods._peft import PeftMethod, TargetConfig

_SEED = 0
"""What the shared matrices are drawn from: they are drawn again on loading, not saved."""


class Config(TargetConfig):
    """The shape of the adapter."""

    rank: int = Field(256, ge=1)
    """Rank r of the shared random matrices."""
    d_initial: float = Field(0.1, gt=0)
    """Where the vector d starts; b starts at zero."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""


class Vera(PeftMethod):
    """Trains r + out parameters for each adapted weight."""

    default_lr = 5e-3
    saves = "VERA"
    reads = ("VERA",)
    facts = Facts(
        idea=Words(
            "One pair of random matrices serves every layer; a layer learns only how to scale their rows.",
            "所有层共用一对随机矩阵，每层只学习对它们各行的缩放。",
        ),
        formula="h = W·x + diag(b)·B·diag(d)·A·x, A and B random and frozen",
        count="Σ (r + out) over adapted layers",
        inference=Words("none once merged", "合并后无额外开销"),
        when=Words(
            "Thousands of adapters that must each take kilobytes; a higher learning rate than LoRA's.",
            "要存上千个适配器、每个只占几 KB 时；学习率要比 LoRA 高。",
        ),
        paper="Kopiczko et al. 2023, arXiv:2310.11454",
    )

    def peft_config(self, model: Any) -> Any:
        """PEFT's VeraConfig, without the random matrices in the file."""
        from peft import VeraConfig

        return VeraConfig(
            r=self.config.rank, d_initial=self.config.d_initial, vera_dropout=self.config.dropout,
            projection_prng_key=_SEED, save_projection=False, fan_in_fan_out=self.stored_transposed(model),
            **self.targets(model),
        )  # fmt: skip

    def count(self, model: Any) -> int:
        """The vectors d and b of each adapted layer."""
        return sum(self.config.rank + layer.outputs for layer in self.adapted(model))
