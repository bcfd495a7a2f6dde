"""LoHa: the change of a weight is the element-wise product of two low-rank terms (Hyeon-Woo et al. 2021)."""

from typing import Any

from pydantic import Field

from tunewright.core.words import Words
from tunewright.methods import Facts
from tunewright.methods._peft import PeftMethod, TargetConfig


class Config(TargetConfig):
    """The shape of the adapter."""

    rank: int = Field(8, ge=1)
    """Rank r of each of the two terms; their product has rank r² at most."""
    alpha: float = Field(16, gt=0)
    """Scale; the change is multiplied by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the change's rows left out in training."""


class Loha(PeftMethod):
    """Trains 2·r·(in + out) parameters for each adapted weight."""

    default_lr = 5e-4
    saves = "LOHA"
    reads = ("LOHA",)
    takes_conv1d = False
    facts = Facts(
        idea=Words(
            "Two low-rank terms are multiplied element by element, which reaches rank r² with the numbers of 2r.",
            "两个低秩项逐元素相乘，用 2r 的参数量达到 r² 的秩。",
        ),
        formula="W' = W + (α/r)·(B₁·A₁) ⊙ (B₂·A₂)",
        count="Σ 2·r·(in + out) over adapted layers",
        inference=Words("none once merged", "合并后无额外开销"),
        when=Words(
            "A change of high rank from few numbers; steps are slower, since the whole change is formed.",
            "想用少量参数得到高秩改变时；要构造完整改变量，每步较慢。",
        ),
        paper="Hyeon-Woo et al. 2021, arXiv:2108.06098",
    )

    def peft_config(self, model: Any) -> Any:
        """PEFT's LoHaConfig."""
        from peft import LoHaConfig

        own = self.config
        return LoHaConfig(r=own.rank, alpha=own.alpha, rank_dropout=own.dropout, **self.targets(model))

    def count(self, model: Any) -> int:
        """Four factors for each adapted layer."""
        return sum(2 * self.config.rank * (layer.inputs + layer.outputs) for layer in self.adapted(model))
