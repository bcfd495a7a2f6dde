"""BOFT: a rotation of a weight in butterfly factors, with trained scales (Liu et al. 2023), through PEFT."""

from typing import Any

from pydantic import Field

from tunewright.core.words import Words
from tunewright.methods import Facts
from tunewright.methods._peft import PeftMethod, TargetConfig


class Config(TargetConfig):
    """The shape of the rotation."""

    block_size: int = Field(4, ge=2)
    """Side b of the rotation's blocks; must divide every adapted layer's inputs."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of blocks left out in training."""


class Boft(PeftMethod):
    """Trains in·b + out parameters for each adapted weight, at one butterfly factor, as PEFT does on a CPU."""

    default_lr = 5e-4
    saves = "BOFT"
    reads = ("BOFT",)
    in_blocks = True
    takes_conv1d = False
    facts = Facts(
        idea=Words(
            "A rotation of a weight is made of small blocks, and each output gets a scale.",
            "用小块组成对权重的旋转，并给每个输出一个缩放。",
        ),
        formula="W' = diag(s)·W·R, R of b × b blocks by their Cayley transform",
        count="Σ (in·b + out) over adapted layers",
        inference=Words("none once merged", "合并后无额外开销"),
        when=Words(
            "As OFT, where a smaller adapter will do; the slowest of the family.",
            "同 OFT，但适配器更小；同类中最慢。",
        ),
        paper="Liu et al. 2023, arXiv:2311.06243",
    )

    def peft_config(self, model: Any) -> Any:
        """PEFT's BOFTConfig."""
        from peft import BOFTConfig

        own = self.config
        return BOFTConfig(boft_block_size=own.block_size, boft_dropout=own.dropout, **self.targets(model))

    def count(self, model: Any) -> int:
        """The blocks, each of b·b numbers, and a scale for each output."""
        return sum(layer.inputs * self.config.block_size + layer.outputs for layer in self.adapted(model))
