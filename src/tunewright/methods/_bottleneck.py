"""Bottleneck adapters: a small network for each sub-layer of a block; what the methods that train them share."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from tunewright.core.config import Config
from tunewright.core.errors import Problem
from tunewright.core.words import Words
from tunewright.methods._own import OwnMethod
from tunewright.models import anatomy

Place = Callable[[nn.Module], nn.Module | None]
"""A block's sub-layer of one kind."""

_NAME = "adapter"
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
}
_KINDS: dict[Place, str] = {
    anatomy.attention: "an attention sub-layer",
    anatomy.feed_forward: "a feed-forward sub-layer",
}

NOT_MERGED = Words(
    "the non-linearity between its two projections cannot be written into the base's weights",
    "两次投影之间的非线性无法写进基座的权重",
)
COST = Words(
    "two thin products more for each adapter, about m/(6d) of a block's multiplications",
    "每个适配器多两次瘦矩阵乘法，约为一层乘法量的 m/(6d)",
)


class Options(Config):
    """The shape of an adapter."""

    bottleneck: int | None = Field(None, ge=1)
    """Size m of the bottleneck; by default a sixteenth of the hidden size d."""
    activation: Literal["relu", "gelu", "silu"] = "gelu"
    """The non-linearity f between the two projections."""


class NormOptions(Options):
    """The shape of an adapter, and whether the normalisation layers learn with it."""

    layer_norms: bool = True
    """Whether weights and biases of all normalisation layers are trained, too."""


class Adapter(nn.Module):
    """What an adapter adds to the residual stream: scale · up(f(down(x))), [B, T, D] like its input."""

    def __init__(self, down: nn.Module, up: nn.Module, activation: str, scale: float) -> None:
        super().__init__()
        self.down, self.up = down, up
        self.activation, self.scale = _ACTIVATIONS[activation], scale

    def forward(self, x_BTD: Tensor) -> Tensor:
        """The change for each position alone, so that a KV cache stays valid."""
        change_BTD: Tensor = self.up(self.activation(self.down(x_BTD)))
        return change_BTD if self.scale == 1 else self.scale * change_BTD


class Bottleneck(OwnMethod):
    """A subclass says which sub-layers have an adapter and whether it reads their output or their input."""

    places: ClassVar[tuple[Place, ...]]
    parallel: ClassVar[bool] = False
    """Whether the adapter reads the sub-layer's input instead of its output."""
    reduction: ClassVar[int] = 16
    """Hidden size / size of the bottleneck, by default."""

    def problems(self, model: Any) -> list[Problem]:
        """Sub-layers that are not there, that add the residual themselves, or that have an adapter already."""
        fix = "use method: lora"
        found = [
            Problem("method", f"no block of {model.config.model_type} has {_KINDS[place]} of its own", fix)
            for place in self.places
            if not any(place(block) for _, block in anatomy.blocks(model))
        ]
        sublayers = self.sublayers(model)
        if any(hasattr(sublayer, _NAME) for sublayer in sublayers):
            found.append(Problem("method", "the model has such adapters already", "start from its base"))
        if not self.parallel and any(map(_adds_residual, sublayers)):
            what = f"sub-layers of {model.config.model_type} add the residual themselves, no adapter fits between"
            found.append(Problem("method", what, "use method: parallel_adapter"))
        return found

    def sublayers(self, model: Any) -> list[nn.Module]:
        """What will have an adapter, first block first."""
        places = (place(block) for _, block in anatomy.blocks(model) for place in self.places)
        return [sublayer for sublayer in places if sublayer is not None]

    def size(self, model: Any) -> int:
        """The size m of the bottleneck."""
        return self.config.bottleneck or max(1, anatomy.hidden_size(model) // self.reduction)

    def adapters(self, model: Any, **at: Any) -> list[Adapter]:
        """A new adapter for each sub-layer; ``at`` is their device and dtype."""
        width, size, linear = anatomy.hidden_size(model), self.size(model), self.linear(**at)
        return [
            Adapter(
                linear(width, size, False), linear(size, width, True), self.config.activation, self.scale()
            )
            for _ in self.sublayers(model)
        ]

    def scale(self) -> float:
        """What an adapter's output is multiplied by."""
        return 1.0

    def linear(self, **at: Any) -> Callable[[int, int, bool], nn.Module]:
        """What makes a projection from its inputs, its outputs and whether it starts at zero."""
        return lambda inputs, outputs, zero: _linear(nn.Linear(inputs, outputs, **at), zero)

    def norms(self, model: Any) -> Iterator[nn.Parameter]:
        """Weights and biases of the normalisation layers, if they are trained, too."""
        if isinstance(self.config, NormOptions) and self.config.layer_norms:
            named = (m for m in model.modules() if "norm" in type(m).__name__.lower())
            yield from (parameter for norm in named for parameter in norm.parameters(recurse=False))

    def inject(self, model: Any) -> Any:
        """Adapters as submodules of what they adapt, reached by forward hooks."""
        model.requires_grad_(False)
        adapters = self.adapters(model, device=model.device, dtype=model.dtype)
        for sublayer, adapter in zip(self.sublayers(model), adapters, strict=True):
            sublayer.add_module(_NAME, adapter)
            sublayer.register_forward_hook(_beside if self.parallel else _after, with_kwargs=True)
        for parameter in self.norms(model):
            parameter.requires_grad_(True)
        return model

    def count(self, model: Any) -> int:
        """All adapters, what they share once, and the normalisation layers."""
        adapters = nn.ModuleList(self.adapters(model, device="meta"))
        return sum(p.numel() for p in (*adapters.parameters(), *self.norms(model)))


def _linear(layer: nn.Linear, zero: bool) -> nn.Linear:
    # Only one of the two may start at zero: else neither would have a gradient. The other keeps Linear's own
    # uniform ±1/√in, which suits any width; a fixed 1e-2 (Houlsby) is small for narrow models.
    nn.init.zeros_(layer.bias)
    if zero:
        nn.init.zeros_(layer.weight)
    return layer


def _adds_residual(sublayer: nn.Module) -> bool:
    """Whether its output is the residual stream already, as Bloom's is."""
    return "residual" in inspect.signature(type(sublayer).forward).parameters


# Functions of the module they hang on, so that a copied model uses its own adapters.


def _after(sublayer: Any, args: Any, kwargs: Any, output: Any) -> Any:
    h_BTD = output[0] if isinstance(output, tuple) else output
    return _plus(output, sublayer.adapter(h_BTD))


def _beside(sublayer: Any, args: Any, kwargs: Any, output: Any) -> Any:
    x_BTD = args[0] if args else next(iter(kwargs.values()))
    return _plus(output, sublayer.adapter(x_BTD))


def _plus(output: Any, change_BTD: Tensor) -> Any:
    """Attention, and some mixtures of experts, return a tuple whose first part is the hidden state."""
    if isinstance(output, tuple):
        return (output[0] + change_BTD, *output[1:])
    return output + change_BTD
