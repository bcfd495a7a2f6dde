"""OFT: a weight is turned by a block-diagonal rotation, which keeps angles between its neurons (Qiu et al. 2023)."""

from typing import Any

from pydantic import Field

from tunewright.core.words import Words
from tunewright.methods import Facts
from tunewright.methods._peft import PeftMethod, TargetConfig


class Config(TargetConfig):
    """The shape of the rotation."""

    block_size: int = Field(32, ge=2)
    """Side b of the rotation's blocks; must divide every adapted layer's inputs."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of blocks left out in training."""


class Oft(PeftMethod):
    """Trains b·(b − 1)/2 parameters for each of the in/b blocks of an adapted weight."""

    default_lr = 5e-4
    saves = "OFT"
    reads = ("OFT",)
    takes_conv1d = False
    in_blocks = True
    facts = Facts(
        idea=Words(
            "A weight is not added to but rotated: what its neurons have to do with one another stays.",
            "不是给权重加项，而是旋转它：神经元之间的相对关系保持不变。",
        ),
        formula="W' = W·R, R = diag(R₁ … R_k), each Rᵢ a rotation by its Cayley transform",
        count="Σ in·(b − 1)/2 over adapted layers",
        inference=Words("none once merged", "合并后无额外开销"),
        when=Words(
            "When little of what the base knows may be lost; training is gentle, steps are slower.",
            "最怕丢失基座能力时；训练温和，每步较慢。",
        ),
        paper="Qiu et al. 2023, arXiv:2306.07280",
    )

    def peft_config(self, model: Any) -> Any:
        """PEFT's OFTConfig."""
        from peft import OFTConfig

        return OFTConfig(
            oft_block_size=self.config.block_size, module_dropout=self.config.dropout,
            fan_in_fan_out=self.stored_transposed(model), **self.targets(model),
        )  # fmt: skip

    def count(self, model: Any) -> int:
        """The upper triangles of each adapted layer's blocks."""
        return sum(layer.inputs * (self.config.block_size - 1) // 2 for layer in self.adapted(model))
