"""The gradient of a linear layer's weight by code for matrix units, which want its operands in another order.

gᵀ·x sums over tokens, along which neither side lies: PyTorch's library makes it at half the rate of x·Wᵀ or less.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tunewright.core.words import Words
from tunewright.fast import Technique, Work, _amx_products


class WeightGradients(Technique):
    """Replaces the forward of linear layers that learn by one with a backward pass of its own."""

    idea = Words(
        "Gradients of weights are computed in the order that the processor's matrix units want.",
        "按处理器矩阵单元所需的次序计算权重的梯度。",
    )

    def why_not(self, work: Work) -> str:
        """Matrix units are needed, and linear layers that learn in bf16."""
        if work.device.type != "cpu":
            return "the device multiplies at one rate in any order"
        if work.autocast:
            return "numbers are cast in each layer"
        if not _layers(work.model):
            return "no linear layer learns in bf16"
        return _amx_products.prepare()

    @contextmanager
    def on(self, work: Work) -> Iterator[None]:
        """Products forwards, and for the gradient of what a layer is given, stay PyTorch's."""
        layers = _layers(work.model)
        for layer in layers:
            layer.forward = _forward(layer)
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward


def _layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if type(module) is nn.Linear and _learns(module)]


def _learns(layer: nn.Linear) -> bool:
    weight = layer.weight
    own = type(weight) is nn.Parameter and "forward" not in vars(layer)
    return own and weight.requires_grad and weight.dtype == torch.bfloat16


def _forward(layer: nn.Linear) -> Any:
    def forward(x: Tensor) -> Tensor:
        y: Tensor = _Linear.apply(x, layer.weight, layer.bias)  # type: ignore[no-untyped-call]
        return y

    return forward


class _Linear(torch.autograd.Function):
    """x [.., I] by a weight [O, I], with or without a bias [O]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        return F.linear(x, weight_OI, bias_O)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_OI = ctx.saved_tensors
        grad_MO = grads[0].reshape(-1, grads[0].shape[-1])
        wanted = ctx.needs_input_grad
        return (
            grads[0] @ weight_OI if wanted[0] else None,
            _weight_gradient(grad_MO, x.reshape(-1, x.shape[-1])) if wanted[1] else None,
            grad_MO.sum(0) if wanted[2] else None,
        )


@torch.library.custom_op("tunewright::weight_gradient", mutates_args=())
def _weight_gradient(grad_MO: Tensor, x_MI: Tensor) -> Tensor:
    return _amx_products.multiply(grad_MO.t(), x_MI)


@_weight_gradient.register_fake
def _(grad_MO: Tensor, x_MI: Tensor) -> Tensor:
    return grad_MO.new_empty(grad_MO.shape[1], x_MI.shape[1])
