"""Frozen linear layers whose weights are held in 4 or 8 bits and made whole for each product."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tunewright.models import anatomy
from tunewright.models.quantized import Make, Scheme, Tensors, candidates, dequantize

BEGIN = ("lora_A", "lora_B")
"""What may be held besides a weight: the factors that an adapter of the layer begins with."""
_unread: list[bool] = []


@contextmanager
def unread() -> Iterator[None]:
    """Within, a layer's ``weight`` has its shape, dtype and device but no values: to ask for these makes nothing whole.

    For PEFT, which looks at the weight of a layer some twenty times to put an adapter on it.
    """
    _unread.append(True)
    try:
        yield
    finally:
        _unread.pop()


class _Product(torch.autograd.Function):
    """x·Wᵀ. The weight is made anew for the way back, so that nothing but its codes is kept between the two."""

    @staticmethod
    def forward(
        ctx: Any, x_BTI: Tensor, scheme: Scheme, outputs: int, names: tuple[str, ...], *held: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*held)
        ctx.rest = scheme, outputs, x_BTI.shape[-1], names
        return x_BTI @ _Product.weight(held, ctx.rest, x_BTI.dtype).T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient_BTO, held = gradients[0], ctx.saved_tensors
        weight_OI = _Product.weight(held, ctx.rest, gradient_BTO.dtype)
        return gradient_BTO @ weight_OI, *[None] * (3 + len(held))

    @staticmethod
    def weight(held: Any, rest: Any, dtype: torch.dtype) -> Tensor:
        scheme, outputs, inputs, names = rest
        return dequantize(_floats(dict(zip(names, held, strict=True))), scheme, outputs, inputs, dtype)


class _Layer(nn.Module):
    """What both kinds share."""

    def __init__(self, plain: Any, scheme: Scheme, tensors: Tensors, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        linear = anatomy.linear("", plain)
        self.outputs, self.inputs = linear.outputs, linear.inputs
        self.begin = {name: tensors[name] for name in BEGIN if name in tensors}
        self.names = tuple(name for name in tensors if name not in BEGIN)
        self.scheme, self.bias = scheme, plain.bias
        for name, tensor in _bits({name: tensors[name] for name in self.names}).items():
            self.register_buffer(f"weight_{name}", tensor)
        self.like: Tensor  # its dtype is the model's, whatever that is cast to
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)
        self.train(plain.training)

    @property
    def tensors(self) -> Tensors:
        """What :func:`quantize` gave."""
        return _floats({name: self.get_buffer(f"weight_{name}") for name in self.names})

    def whole(self, dtype: torch.dtype) -> Tensor:
        """The weight [outputs, inputs] that the codes stand for."""
        if _unread:
            return self.like.new_empty(1, dtype=dtype).expand(self.outputs, self.inputs)
        return dequantize(self.tensors, self.scheme, self.outputs, self.inputs, dtype)

    def forward(self, x_BTI: Tensor) -> Tensor:
        """x·Wᵀ + b."""
        device = x_BTI.device.type
        if torch.is_autocast_enabled(device):
            x_BTI = x_BTI.to(torch.get_autocast_dtype(device))
        held = [self.get_buffer(f"weight_{name}") for name in self.names]
        y_BTO: Tensor = _Product.apply(x_BTI, self.scheme, self.outputs, self.names, *held)  # type: ignore[no-untyped-call]
        return y_BTO if self.bias is None else y_BTO + self.bias.to(y_BTO.dtype)


class QuantizedLinear(_Layer, nn.Linear):
    """A linear layer; ``weight`` is made whole each time it is asked for."""

    def __init__(self, plain: nn.Linear, scheme: Scheme, tensors: Tensors, dtype: torch.dtype) -> None:
        super().__init__(plain, scheme, tensors, dtype)
        self.in_features, self.out_features = self.inputs, self.outputs

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """[outputs, inputs], in the dtype that the model is held in."""
        return self.whole(self.like.dtype)

    def plain(self) -> nn.Module:
        """The ordinary layer of the same weight."""
        made = nn.Linear(self.inputs, self.outputs, bias=False, device="meta")
        return _filled(made, self.weight, self.bias)


class QuantizedConv1D(_Layer, Conv1D):  # type: ignore[misc]
    """GPT-2's kind of linear layer."""

    def __init__(self, plain: Any, scheme: Scheme, tensors: Tensors, dtype: torch.dtype) -> None:
        super().__init__(plain, scheme, tensors, dtype)
        self.nx, self.nf = self.inputs, self.outputs

    @property
    def weight(self) -> Tensor:
        """[inputs, outputs], in the dtype that the model is held in."""
        return self.whole(self.like.dtype).T

    def plain(self) -> nn.Module:
        """The ordinary layer of the same weight."""
        with torch.device("meta"):
            made = Conv1D(self.outputs, self.inputs)
        return _filled(made, self.weight, self.bias)


Layer = QuantizedLinear | QuantizedConv1D


def _filled(made: Any, weight: Tensor, bias: nn.Parameter | None) -> nn.Module:
    made.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    made.bias = bias
    return made  # type: ignore[no-any-return]


def _bits(tensors: Tensors) -> Tensors:
    """fp32 as int32: a model's ``.to(bfloat16)`` must not round scales."""
    return {name: t.view(torch.int32) if t.is_floating_point() else t for name, t in tensors.items()}


def _floats(tensors: Tensors) -> Tensors:
    return {name: t.view(torch.float32) if t.dtype == torch.int32 else t for name, t in tensors.items()}


def outputs_first(plain: Any) -> bool:
    """Whether an ordinary layer's weight lies [outputs, inputs]."""
    return not isinstance(plain, Conv1D)


def replace(model: Any, name: str, scheme: Scheme, tensors: Tensors) -> None:
    """Put a quantized layer in the place of an ordinary one, whose bias it takes over."""
    plain = model.get_submodule(name)
    kind = QuantizedLinear if outputs_first(plain) else QuantizedConv1D
    model.set_submodule(name, kind(plain, scheme, tensors, model.dtype))


def quantize_layers(model: Any, scheme: Scheme, make: Make) -> None:
    """Quantize, in place, every layer that is to be and is not yet."""
    for linear in candidates(model):
        plain = model.get_submodule(linear.name)
        if not isinstance(plain, Layer):
            weight_OI = plain.weight.detach() if outputs_first(plain) else plain.weight.detach().T
            replace(model, linear.name, scheme, make(linear.name, weight_OI))


def layers(model: Any) -> Iterator[tuple[str, Layer]]:
    """A model's quantized layers by name."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, Layer))


def parameter_count(model: Any) -> int:
    """All parameters, those of quantized weights among them."""
    held = sum(layer.inputs * layer.outputs for _, layer in layers(model))
    return held + sum(int(parameter.numel()) for parameter in model.parameters())


def restore(model: Any) -> None:
    """Make every quantized layer an ordinary one again, with the weight that its codes stand for."""
    for name, held in list(layers(model)):
        model.set_submodule(name, held.plain())
