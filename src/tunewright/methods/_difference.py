"""A difference to a frozen weight: dense under a hard-concrete mask while it is learned, then sparse.

The mask is z = clamp(s·(r − l) + l, 0, 1) with s = sigmoid(logit(u) + α), u uniform, l = −1.5, r = 1.5; without
noise u is a half (Louizos, Welling & Kingma 2017, arXiv:1712.01312; the constants are Guo et al.'s).
"""

from collections.abc import Iterator
from math import log

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

_LOWER, _UPPER = -1.5, 1.5
_OPEN = 5.0
"""α of a mask that lets nearly everything through, where training begins."""
_BOUND = 6.0
"""|α| stays below: a mask beyond it would be as good as decided, and never open again."""
_HELD = 16.0
"""|α| of a mask that is decided: exactly 0 or 1."""
_EDGE = 1e-6


class Difference(nn.Module):
    """Parametrizes a weight W as W + z ∘ ``change``.

    Once learned, ``change`` holds the values that are not zero, at ``indices`` of the flattened weight.
    """

    indices: Tensor | None

    def __init__(self, weight: Tensor, structured: bool = False) -> None:
        super().__init__()
        self.change = nn.Parameter(torch.zeros_like(weight))
        self.alpha = nn.Parameter(torch.full_like(weight, _OPEN))
        self.group = nn.Parameter(weight.new_full((1,), _OPEN)) if structured else None
        self.register_buffer("indices", None, persistent=False)
        self.seed: int | None = None
        """Of the step's noise in training; the mask is the expected one without it."""

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with the difference, in its own shape."""
        if self.indices is None:
            return weight + self.delta()
        return weight.reshape(-1).index_add(0, self.indices, self.change).view_as(weight)

    def delta(self) -> Tensor:
        """The dense difference z ∘ change."""
        mask = self.mask()
        return (mask * self.change).to(self.change.dtype)

    def mask(self) -> Tensor:
        """The mask z in [0, 1], fp32, of the weight's shape; a structured one is the product of two."""
        noise = None
        if self.training and self.seed is not None:
            noise = torch.Generator(self.alpha.device).manual_seed(self.seed)
        mask = _hard_concrete(self.alpha, noise)
        return mask if self.group is None else mask * _hard_concrete(self.group, noise)

    def expected(self) -> Tensor:
        """How many entries of the mask are not 0, in expectation; a number."""
        open_share = _probability(self.alpha)
        return (open_share if self.group is None else open_share * _probability(self.group)).sum()

    def masks(self) -> Iterator[nn.Parameter]:
        """The parameters of the mask."""
        yield self.alpha
        if self.group is not None:
            yield self.group

    def is_held(self) -> bool:
        """Whether the mask is decided."""
        return bool((self.alpha.detach().abs() == _HELD).all())

    @torch.no_grad()
    def bound(self) -> None:
        """Keep the masks undecided."""
        for mask in self.masks():
            mask.clamp_(-_BOUND, _BOUND)

    def size(self) -> Tensor:
        """How large each entry is; those whose mask is closed come after all others, by what they would be."""
        return (self.mask() + _EDGE * _probability(self.alpha)) * self.change.float().abs()

    @torch.no_grad()
    def hold(self, kept: Tensor) -> None:
        """Decide the mask: 1 at these indices of the flattened weight, 0 elsewhere. What is kept keeps its value."""
        closed = torch.full_like(self.alpha, -_HELD).reshape(-1)
        alpha = closed.index_fill(0, kept, _HELD).view_as(self.alpha)
        self.change.copy_(self.delta() * (alpha > 0))
        self.alpha.copy_(alpha)
        if self.group is not None:
            self.group.fill_(_HELD)

    @torch.no_grad()
    def settle(self, indices: Tensor, values: Tensor) -> None:
        """Be the sparse difference of these values [K] at these indices [K]; nothing is trained any more."""
        # All parameters keep their names, for those who look for them afterwards.
        self.change, self.alpha = _frozen(values), _frozen(values[:0])
        self.group = None if self.group is None else _frozen(values[:0])
        self.indices = indices


def _frozen(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.clone(), requires_grad=False)


def _hard_concrete(alpha: Tensor, noise: torch.Generator | None) -> Tensor:
    logits = alpha.float()
    if noise is not None:
        uniform = torch.rand(alpha.shape, generator=noise, device=alpha.device)
        logits = logits + uniform.clamp_(_EDGE, 1 - _EDGE).logit_()
    return (torch.sigmoid(logits) * (_UPPER - _LOWER) + _LOWER).clamp(0, 1)


def _probability(alpha: Tensor) -> Tensor:
    """That a mask is not 0."""
    return torch.sigmoid(alpha.float() - log(-_LOWER / _UPPER))


def attach(module: nn.Module, difference: Difference) -> None:
    """Compute a module with its weight and a difference."""
    # unsafe: no trial run; shape and dtype are the weight's own
    parametrize.register_parametrization(module, "weight", difference, unsafe=True)


def detach(module: nn.Module, difference: Difference) -> None:
    """Write the difference, without noise, into the weight."""
    difference.eval()
    parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)


def attached(model: nn.Module) -> dict[str, tuple[nn.Module, Difference]]:
    """The modules whose weight has a difference, by name, and the difference."""
    found = {}
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            difference = module.parametrizations["weight"][0]
            if isinstance(difference, Difference):
                found[name] = (module, difference)
    return found


def weight(module: nn.Module) -> Tensor:
    """The frozen weight of a module that has a difference."""
    original = module.get_parameter("parametrizations.weight.original")
    return original.detach()


@torch.no_grad()
def largest(differences: list[Difference], count: int) -> list[Tensor]:
    """Where each one's entries lie that are among the ``count`` largest of all: sorted indices."""
    sizes = torch.cat([difference.size().reshape(-1) for difference in differences])
    chosen = sizes.topk(min(count, sizes.numel())).indices.sort().values
    ends = torch.tensor([d.change.numel() for d in differences]).cumsum(0).tolist()
    parts, begin = [], 0
    for end in ends:
        parts.append(chosen[(chosen >= begin) & (chosen < end)] - begin)
        begin = end
    return parts
