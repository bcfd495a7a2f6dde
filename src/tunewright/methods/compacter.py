"""Compacter: Houlsby's adapters with weights that are sums of Kronecker products (Karimi Mahabadi et al. 2021)."""

from collections.abc import Callable
from math import ceil
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from tunewright.core.errors import Problem
from tunewright.core.words import Words
from tunewright.methods import Facts
from tunewright.methods._bottleneck import NOT_MERGED, Bottleneck, NormOptions
from tunewright.models import anatomy


class Config(NormOptions):
    """The shape of the adapters, and whether the normalisation layers learn with them."""

    bottleneck: int | None = Field(None, ge=1)
    """Size m of the bottleneck, a multiple of n; by default the first from hidden size d / 32 on."""
    n: int = Field(4, ge=1)
    """Number of Kronecker products in a sum and side of their shared factors; divides the hidden size."""


class PhmLinear(nn.Module):
    """y = W·x + b with W = Σ_i A_i ⊗ (s_i·t_iᵀ): the rules A [n, n, n] are shared, s and t are its own.

    Section 3 of arXiv:2106.04647; W [outputs, inputs] itself is never made.
    """

    def __init__(self, rules: nn.Parameter, inputs: int, outputs: int, zero: bool) -> None:
        super().__init__()
        n = len(rules)
        self.rules = rules
        self.s = nn.Parameter(rules.new_empty(n, outputs // n))
        self.t = nn.Parameter(rules.new_empty(n, inputs // n))
        self.bias = nn.Parameter(rules.new_zeros(outputs))
        # Outputs as large as inputs. Zero s silences the layer and yet has a gradient itself.
        nn.init.normal_(self.s, std=0.0 if zero else n**-0.5)
        nn.init.normal_(self.t, std=(n / inputs) ** 0.5)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, inputs] to [B, T, outputs]."""
        # (A ⊗ s·tᵀ)·x for an x cut into n pieces: t within each, A across them, then s.
        u_BTNI = x_BTD.reshape(*x_BTD.shape[:-1], len(self.rules), -1) @ self.t.T
        v_BTNI = torch.einsum("...bi,iab->...ai", u_BTNI, self.rules)
        return (v_BTNI @ self.s).flatten(-2) + self.bias


class Compacter(Bottleneck):
    """Adapters after attention and after the feed-forward, of m + d numbers where Houlsby's have m·d."""

    default_lr = 3e-3
    places = (anatomy.attention, anatomy.feed_forward)
    reduction = 32
    facts = Facts(
        idea=Words(
            "Houlsby's adapters whose matrices are built from rules shared by all layers and two thin vectors "
            "of their own.",
            "Houlsby 适配器，但矩阵由全模型共享的规则和各自的两个细长向量拼成。",
        ),
        formula="h ← h + W_up·f(W_down·h + b_down) + b_up with W = Σ_i A_i ⊗ (s_i·t_iᵀ)",
        count="2·L·3·(d + m) + n³ for L blocks, and the normalisation layers",
        inference=Words(
            "few multiplications, 2·n·(d + m) for each adapter and token, but several small kernels",
            "乘法很少，每个适配器每个词元 2·n·(d + m) 次，但要多几个小算子",
        ),
        when=Words(
            "Little data and very many tasks: tens of kilobytes for each.",
            "数据少而任务极多时：每个任务只需几十 KB。",
        ),
        paper="Karimi Mahabadi et al. 2021, arXiv:2106.04647",
        keeps_apart=NOT_MERGED,
    )

    def problems(self, model: Any) -> list[Problem]:
        """Sizes that cannot be cut into n pieces, besides what no adapter can be used on."""
        n, sizes = self.config.n, {"hidden size": anatomy.hidden_size(model), "bottleneck": self.size(model)}
        return super().problems(model) + [
            Problem("method.n", f"{n} does not divide the {name} {size}", "choose an n that divides both")
            for name, size in sizes.items()
            if size % n
        ]

    def size(self, model: Any) -> int:
        """A multiple of n unless the config insists on another."""
        n: int = self.config.n
        least = ceil(anatomy.hidden_size(model) / self.reduction)
        return int(self.config.bottleneck or n * ceil(least / n))

    def linear(self, **at: Any) -> Callable[[int, int, bool], nn.Module]:
        """Projections that share their rules."""
        rules = nn.Parameter(torch.empty((self.config.n,) * 3, **at))
        nn.init.normal_(rules, std=self.config.n**-0.5)
        return lambda inputs, outputs, zero: PhmLinear(rules, inputs, outputs, zero)
