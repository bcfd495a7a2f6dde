"""LoRA layers that read the same input as one matrix product, with a backward pass of their own.

A LoRA layer has seven small products beside its large ones, and each reads or writes a whole activation again. Here the
layers of a block that are given the same tensor (query, key and value; gate and up) are one: y = [x | xA] · [W | sB],
where W, the frozen weights of all of them, and B lie in one matrix. The gradient of W is never formed. A layer alone that
has fewer outputs than inputs keeps its weights where they are: y = xA · sB is added to what they make.

DoRA (Liu et al. 2024, arXiv:2402.09353) besides scales each output by its magnitude over the norm of its row of W + sBA.
That sum is never formed either: |w + sbA|² = |w|² + 2s·b·(Aw) + s²·b(AAᵀ)bᵀ.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tunewright.core.words import Words
from tunewright.fast import Technique, Work, _amx_products, look, through
from tunewright.fast.attention import base_model
from tunewright.fast.process import let_go_of_files, mapped_files
from tunewright.models import hollow
from tunewright.models.announce import stretch

_BESIDE = 128 << 20
"""Bytes of weights that are in their file's pages and in copies at a time."""


class LoraLinear(Technique):
    """Replaces the forward of PEFT's LoRA layers; weights and adapters stay PEFT's own."""

    idea = Words(
        "LoRA layers with the same input are one matrix product each way.",
        "输入相同的 LoRA 层合成一次矩阵乘法。",
    )

    def why_not(self, work: Work) -> str:
        """LoRA or DoRA on linear layers without dropout is needed."""
        if work.autocast:
            return "numbers are cast in each layer"
        return "" if _layers(work.model) else "no plain LoRA layers without dropout"

    @contextmanager
    def on(self, work: Work) -> Iterator[None]:
        """The frozen weights of layers with one input lie in their group's matrix meanwhile."""
        _amx_products.prepare()  # built where it can be
        groups = list(_copied(_together(work)))
        known: list[object] = [None]

        def look_again(*_: Any) -> None:
            now = stretch(work.model)
            if now is None or now is not known[0]:
                _refresh(groups)
            known[0] = now

        hook = base_model(work.model).register_forward_pre_hook(look_again)
        try:
            yield
        finally:
            hook.remove()
            for group in groups:
                group.dissolve()


def _copied(together: list[list[Any]]) -> Iterator["_Group"]:
    """Groups, which hold copies of weights; the weights' file is not kept beside all of them."""
    copied, files = 0, [] if hollow.is_on() else mapped_files()
    for layers in together:
        group = _Group(layers, files)
        copied += group.joint_NK.nbytes
        yield group
        if copied >= _BESIDE:
            let_go_of_files()
            copied = 0
    let_go_of_files()


def _layers(model: Any) -> list[Any]:
    from peft.tuners.lora.layer import Linear

    return [module for module in model.modules() if type(module) is Linear and _is_plain(module)]


def _dora() -> Any:
    from peft.tuners.lora.variants import DoraLinearVariant

    return DoraLinearVariant


def _is_plain(layer: Any) -> bool:
    """One LoRA or DoRA adapter on a frozen linear layer, nothing else done to it, all of one kind of number."""
    active, base = layer.active_adapters, layer.base_layer
    if len(active) != 1 or active[0] not in layer.lora_A or type(base) is not nn.Linear:
        return False
    if layer.merged or layer.disable_adapters:
        return False
    name = active[0]
    down, up = layer.lora_A[name], layer.lora_B[name]
    tensors = [base.weight, down.weight, up.weight]
    return (
        not base.weight.requires_grad
        and type(layer.lora_variant.get(name)) in (type(None), _dora())
        and not (layer.training and getattr(layer.lora_dropout[name], "p", 0.0))
        and up.bias is None
        and all(t.dtype == base.weight.dtype and t.device == base.weight.device for t in tensors)
    )


def _together(work: Work) -> list[list[Any]]:
    """The layers in groups of one input, found by watching one row go through the model."""
    layers, seen = _layers(work.model), list[tuple[Tensor, list[Any]]]()

    def watch(layer: Any, args: tuple[Tensor, ...]) -> None:
        if not seen or seen[-1][0] is not args[0]:
            seen.append((args[0], []))
        seen[-1][1].append(layer)

    hooks = [layer.register_forward_pre_hook(watch) for layer in layers]
    try:
        look(work, partial(through, work.model))
    finally:
        for hook in hooks:
            hook.remove()
    called = [layer for _, group in seen for layer in group]
    once = len(called) == len(set(called))
    return [group for _, group in seen] if once else []


def _refresh(groups: list["_Group"]) -> None:
    """The adapters may have moved, or been switched off, since the last forward pass."""
    with torch.no_grad():
        for group in groups:
            group.refresh()


class _Group:
    """Layers of one input; the first one called computes for all."""

    def __init__(self, layers: list[Any], files: list[range]) -> None:
        self.layers, self._files = layers, files
        self.names = names = [layer.active_adapters[0] for layer in layers]
        self.apart = False
        self.downs = [layer.lora_A[name].weight for layer, name in zip(layers, names, strict=True)]
        self.ups = [layer.lora_B[name].weight for layer, name in zip(layers, names, strict=True)]
        self.scales = [float(layer.scaling[name]) for layer, name in zip(layers, names, strict=True)]
        self.biases = [layer.base_layer.bias for layer in layers]
        self.magnitudes = [_magnitude(layer, name) for layer, name in zip(layers, names, strict=True)]
        self.norms = [None if m is None else torch.ones_like(m, requires_grad=False) for m in self.magnitudes]
        self.sizes = [len(up) for up in self.ups]
        self.inputs = self.downs[0].shape[1]
        self.given: Tensor | None = None
        self.made: list[Tensor] = []
        self._join()
        for place, layer in enumerate(layers):
            layer.forward = self._member(place)

    def _join(self) -> None:
        """All frozen weights, and B times its scale, side by side in one matrix [N, inputs + R]; the layers' own are views
        of it. Of a layer alone it has the latter only.
        """
        rank, first = sum(len(down) for down in self.downs), self.layers[0].base_layer.weight
        self.is_alone = len(self.layers) == 1 and self.inputs >= sum(self.sizes)
        columns = rank if self.is_alone else self.inputs + rank
        self.joint_NK = torch.empty(sum(self.sizes), columns, dtype=first.dtype, device=first.device)
        added_NR = self.joint_NK[:, columns - rank :]
        added_NR[:] = 0
        row = column = 0
        self._slots: list[Tensor] = []
        self._rows: list[Tensor] = []
        self._kept: list[Tensor | None] = []
        for layer, up in zip(self.layers, self.ups, strict=True):
            own, weight = slice(row, row + len(up)), layer.base_layer.weight
            self._slots.append(added_NR[own, column : column + up.shape[1]])
            stays = self.is_alone or any(weight.data_ptr() in file for file in self._files)
            self._kept.append(weight.data if stays else None)
            if not self.is_alone:
                self.joint_NK[own, : self.inputs] = weight.data
                weight.data = self.joint_NK[own, : self.inputs]
            self._rows.append(weight.data)
            row, column = row + len(up), column + up.shape[1]
        self._squares = [
            None if magnitude is None else _exact(weight).square().sum(1)
            for magnitude, weight in zip(self.magnitudes, self._rows, strict=True)
        ]

    def refresh(self) -> None:
        """Put B, times its scale, beside W; what did not change may be needed by a backward pass as it is."""
        self.apart = not all(map(_is_plain, self.layers)) or self.names != [
            layer.active_adapters[0] for layer in self.layers
        ]
        for slot, up, scale in zip(self._slots, self.ups, self.scales, strict=True):
            scaled = up * scale
            if not torch.equal(slot, scaled):
                slot.copy_(scaled)
        for place, (norm, squares_N) in enumerate(zip(self.norms, self._squares, strict=True)):
            if norm is not None and squares_N is not None:
                found = self._norm(place, squares_N)
                if not torch.equal(norm, found):
                    norm.copy_(found)

    def _norm(self, place: int, squares_N: Tensor) -> Tensor:
        """Of each row of W + sBA [N]; ``squares_N`` are those of W."""
        down, up, scale = _exact(self.downs[place]), _exact(self.ups[place]), self.scales[place]
        crossed_N = (_exact(self._rows[place] @ self.downs[place].t()) * up).sum(1)
        added_N = (up @ (down @ down.t()) * up).sum(1)
        return (squares_N + 2 * scale * crossed_N + scale**2 * added_N).sqrt()

    def _member(self, place: int) -> Any:
        plain = self.layers[place].forward

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self.apart:
                return plain(x, *args, **kwargs)  # type: ignore[no-any-return]
            if self.given is not x:
                self.given, self.made = x, self._compute(x)
            own = self.made[place]
            if place == len(self.layers) - 1:
                self.given, self.made = None, []
            return own

        return forward

    def _compute(self, x: Tensor) -> list[Tensor]:
        x_MI = x.reshape(-1, self.inputs)
        weight_NK, added_NR = self.joint_NK, self.joint_NK.new_empty(0)
        if self.is_alone:
            weight_NK, added_NR = self.layers[0].base_layer.weight, self.joint_NK
        y_MN = _lora(x_MI, weight_NK, added_NR, torch.cat(self.downs), self.ups, self.scales)[0]
        parts = y_MN.view(*x.shape[:-1], -1).split(self.sizes, -1)
        return [self._finished(place, y) for place, y in enumerate(parts)]

    def _finished(self, place: int, y: Tensor) -> Tensor:
        magnitude, norm, bias = self.magnitudes[place], self.norms[place], self.biases[place]
        if magnitude is not None and norm is not None:
            y = y * (magnitude / norm)
        return y if bias is None else y + bias

    def dissolve(self) -> None:
        """Every layer has its own weights and forward again; those of a file are its pages, which are read when needed."""
        for layer, kept in zip(self.layers, self._kept, strict=True):
            del layer.forward
            weight = layer.base_layer.weight
            is_changed = kept is None or layer.merged
            weight.data = weight.data.clone(memory_format=torch.contiguous_format) if is_changed else kept
        del self.joint_NK, self._slots, self._rows, self._kept  # the next group's weights may lie there


def _magnitude(layer: Any, name: str) -> Tensor | None:
    if not layer.lora_variant.get(name):
        return None
    weight: Tensor = layer.lora_magnitude_vector[name].weight
    return weight


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@torch.library.custom_op("tunewright::lora", mutates_args=())
def _lora(
    x_MI: Tensor, weight_NK: Tensor, added_NR: Tensor, down_RI: Tensor, ups: list[Tensor], scales: list[float]
) -> list[Tensor]:
    """Y [M, N] and xA [M, R]; ``weight_NK`` is [W | sB], or W alone beside ``added_NR``, sB."""
    inputs = x_MI.shape[1]
    if inputs >= len(weight_NK):  # a pass over y costs less than one over x
        weight_NI, added_NR = _parts(weight_NK, added_NR, inputs)
        inner_MR = x_MI @ down_RI.t()
        y_MN = x_MI @ weight_NI.t()
        return [y_MN.addmm_(inner_MR, added_NR.t()), inner_MR]
    both_MK = x_MI.new_empty(len(x_MI), weight_NK.shape[1])
    both_MK[:, :inputs] = x_MI
    inner_MR = x_MI @ down_RI.t()
    both_MK[:, inputs:] = inner_MR
    return [both_MK @ weight_NK.t(), inner_MR]


def _parts(weight_NK: Tensor, added_NR: Tensor, inputs: int) -> tuple[Tensor, Tensor]:
    """W [N, inputs] and sB [N, R]."""
    if weight_NK.shape[1] == inputs:
        return weight_NK, added_NR
    return weight_NK[:, :inputs], weight_NK[:, inputs:]


@_lora.register_fake
def _(
    x: Tensor, weight: Tensor, added: Tensor, down: Tensor, ups: list[Tensor], scales: list[float]
) -> list[Tensor]:
    return [x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], down.shape[0])]


@torch.library.custom_op("tunewright::lora_backward", mutates_args=())
def _backward(
    grad_MN: Tensor, x_MI: Tensor, inner_MR: Tensor, weight_NK: Tensor, added_NR: Tensor, down_RI: Tensor,
    sizes: list[int], ranks: list[int], scales: list[float], for_input: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of x (an empty tensor if it needs none), of all A as one matrix, and of every B."""
    weight_NI, added_NR = _parts(weight_NK, added_NR, x_MI.shape[1])
    for_inner_MR = grad_MN @ added_NR
    for_x_MI = x_MI.new_empty(0)
    if for_input:
        for_x_MI = (grad_MN @ weight_NI).addmm_(for_inner_MR, down_RI)
    grads, inners = torch.split(grad_MN, sizes, 1), torch.split(inner_MR, ranks, 1)
    multiply = _amx_products.multiply
    ups = [
        multiply(inner.t(), grad).t() * scale
        for grad, inner, scale in zip(grads, inners, scales, strict=True)
    ]
    return [for_x_MI, multiply(for_inner_MR.t(), x_MI), *(up.contiguous() for up in ups)]


@_backward.register_fake
def _(
    grad: Tensor, x: Tensor, inner: Tensor, weight: Tensor, added: Tensor, down: Tensor, sizes: list[int],
    ranks: list[int], scales: list[float], for_input: bool,
) -> list[Tensor]:  # fmt: skip
    ups = [grad.new_empty(size, rank) for size, rank in zip(sizes, ranks, strict=True)]
    return [x.new_empty(x.shape if for_input else (0,)), down.new_empty(down.shape), *ups]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x_MI, weight_NK, added_NR, down_RI, ups, ctx.scales = inputs
    ctx.save_for_backward(x_MI, output[1], weight_NK, added_NR, down_RI)
    ctx.sizes, ctx.ranks = [len(up) for up in ups], [up.shape[1] for up in ups]


def _differentiate(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    for_input = ctx.needs_input_grad[0]
    for_x, for_down, *for_ups = _backward(
        grads[0], *ctx.saved_tensors, ctx.sizes, ctx.ranks, ctx.scales, for_input
    )
    return for_x if for_input else None, None, None, for_down, for_ups, None


_lora.register_autograd(_differentiate, setup_context=_keep)
