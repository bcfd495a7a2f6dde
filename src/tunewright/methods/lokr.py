"""LoKr: the change of a weight is a Kronecker product of two small matrices (Yeh et al. 2023), through PEFT."""

from math import isqrt
from typing import Any

from pydantic import Field

from tunewright.core.words import Words
from tunewright.methods import Facts
from tunewright.methods._peft import PeftMethod, TargetConfig


class Config(TargetConfig):
    """The shape of the adapter."""

    rank: int = Field(16, ge=1)
    """Rank r of the larger factor, where that is smaller than the factor itself."""
    alpha: float = Field(32, gt=0)
    """Scale; the change is multiplied by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the change's rows left out in training."""


class Lokr(PeftMethod):
    """Trains a small matrix, and a larger one in two factors, for each adapted weight."""

    default_lr = 1e-3
    saves = "LOKR"
    reads = ("LOKR",)
    takes_conv1d = False
    facts = Facts(
        idea=Words(
            "The change is a small matrix of blocks, each a multiple of one larger matrix of low rank.",
            "改变量由一个小矩阵与一个较大的低秩矩阵作克罗内克积得到。",
        ),
        formula="W' = W + (α/r)·C ⊗ (B·A)",
        count="Σ (a·c + r·(b + d)) with out = a·b, in = c·d, a and c next below the square root",
        inference=Words("none once merged", "合并后无额外开销"),
        when=Words(
            "Adapters of tens of kilobytes, many of them; a weaker change than LoRA's.",
            "需要大量几十 KB 的小适配器时；改变能力弱于 LoRA。",
        ),
        paper="Yeh et al. 2023, arXiv:2309.14859",
    )

    def peft_config(self, model: Any) -> Any:
        """PEFT's LoKrConfig."""
        from peft import LoKrConfig

        own = self.config
        return LoKrConfig(r=own.rank, alpha=own.alpha, rank_dropout=own.dropout, **self.targets(model))

    def count(self, model: Any) -> int:
        """The small factor whole, the larger one in two of rank r unless it is that small itself."""
        return sum(self._of(layer.inputs, layer.outputs) for layer in self.adapted(model))

    def _of(self, inputs: int, outputs: int) -> int:
        (c, d), (a, b) = _near_square(inputs), _near_square(outputs)
        rank = self.config.rank
        return a * c + (rank * (b + d) if rank < max(b, d) / 2 else b * d)


def _near_square(number: int) -> tuple[int, int]:
    """The two factors of a number that are closest to its square root, the smaller first."""
    small = next(n for n in range(isqrt(number), 0, -1) if number % n == 0)
    return small, number // small
