"""Logits only where a label is, some rows at a time, with the gradient formed in the same pass.

The logits of a batch are its largest tensor: 2,048 tokens by 49,152 words are 400 MB in fp32, and the plain path holds
several of them. Here none outlives its part of the rows. As in Cut Cross-Entropy (Wijmans et al. 2024, arXiv:2411.09009)
and Liger (Hsu et al. 2024, arXiv:2410.10989).
"""

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tunewright.core.words import Words
from tunewright.fast import Technique, Work, _amx_products, _native
from tunewright.models import anatomy, hollow, likelihood

_CODE = "_softmax"
_LOGITS_BYTES = 64 << 20
"""Of one part of the rows; a matrix product of fewer rows is slower."""
_MOST_ROWS = 512
_GRADIENT_ROWS = 256
_SOFTMAX_ROWS = 64
"""Worked on in fp32 at a time: 64 rows of 49,152 words stay in a CPU's cache."""


class CrossEntropy(Technique):
    """Replaces the way from hidden states to losses; the model itself is left as it is."""

    idea = Words(
        "Logits are made only where a label is, some rows at a time, with their gradient in the same pass.",
        "只在有标签的位置计算 logits，分块进行，并在同一遍中得到梯度。",
    )

    def why_not(self, work: Work) -> str:
        """An output layer is needed, and that nothing comes after it."""
        if anatomy.output_head(work.model) is None:
            return "the model has no output layer"
        return "" if _agrees(work) else "the model changes its logits after the output layer"

    @contextmanager
    def on(self, work: Work) -> Iterator[None]:
        """:func:`likelihood.token_losses` goes this way."""
        _native.why_not(_CODE)  # built where it can be, and so is the other
        _amx_products.prepare()
        try:
            with likelihood.computed_by(work.model, losses):
                yield
        finally:
            _rooms.clear()


def losses(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """As :func:`likelihood.plain`."""
    return _losses(model, likelihood.hidden_states(model, batch), batch["labels"])


def _losses(model: Any, states_BTD: Tensor, labels_BT: Tensor) -> Tensor:
    kept = labels_BT != likelihood.IGNORED
    head = anatomy.output_head(model)
    assert head is not None, "why_not has seen to that"  # noqa: S101 our own bug
    states_ND = states_BTD[kept]
    if type(head) is nn.Linear and not torch.is_autocast_enabled(states_ND.device.type):
        return _linear(states_ND, head.weight, head.bias, labels_BT[kept])
    return F.cross_entropy(head(states_ND).float(), labels_BT[kept], reduction="none")


def _linear(states_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_N: Tensor) -> Tensor:
    """Losses [N]; a function's forward pass is not told that no gradient is wanted at all."""
    if not torch.is_grad_enabled():
        return _Sums(states_ND, weight_VD, bias_V, (False, False, False)).over(labels_N)
    found: Tensor = _LinearCrossEntropy.apply(states_ND, weight_VD, bias_V, labels_N)  # type: ignore[no-untyped-call]
    return found


def _agrees(work: Work) -> bool:
    """Whether losses are those of the plain way, and logits are left as they are however large.

    They are not if a model does something to its logits after its output layer, such as to cap them.
    """
    plain = work.plainly
    with torch.no_grad():
        own_N = _losses(work.model, plain.looked.states_BTD, plain.batch["labels"])
    return plain.looked.ends_with_head and plain.agrees(own_N)


class _LinearCrossEntropy(torch.autograd.Function):
    """Losses [N] of hidden states [N, D], an output layer [V, D] with or without bias [V], and labels [N].

    Gradients are made for losses that count one each; what they do count is known in the backward pass, and a row's
    gradient is linear in it. That of the weights needs it to be the same for all rows, or is made anew.
    """

    @staticmethod
    def forward(
        ctx: Any, states_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_N: Tensor
    ) -> Tensor:
        wanted = ctx.needs_input_grad
        ctx.set_materialize_grads(False)
        sums = _Sums(states_ND, weight_VD, bias_V, wanted)
        losses_N = sums.over(labels_N)
        ctx.save_for_backward(
            sums.states_ND, sums.weight_VD, sums.bias_V, states_ND, weight_VD, bias_V, labels_N
        )
        return losses_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_N = grads[0]
        if grad_N is None:
            return None, None, None, None
        for_states, for_weight, for_bias, states_ND, weight_VD, bias_V, labels_N = ctx.saved_tensors
        if for_states is not None:
            for_states = for_states * grad_N[:, None].to(for_states.dtype)
        if for_weight is not None or for_bias is not None:
            even = bool((grad_N == grad_N[0]).all()) if len(grad_N) else True
            if not even:
                wanted = (False, *ctx.needs_input_grad[1:3])
                sums = _Sums(states_ND, weight_VD, bias_V, wanted, for_weight)
                sums.over(labels_N, grad_N)
                for_weight, for_bias, scale = sums.weight_VD, sums.bias_V, None
            else:
                scale = grad_N[0] if len(grad_N) else None
            for_weight, for_bias = (_scaled(g, scale, weight_VD.dtype) for g in (for_weight, for_bias))
        return for_states, for_weight, for_bias, None


def _scaled(grad: Tensor | None, scale: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if grad is None:
        return None
    return (grad if scale is None else grad.mul_(scale)).to(dtype)


class _Sums:
    """What one pass over the rows adds up: gradients of the losses' sum, where they are wanted."""

    def __init__(
        self,
        states_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        wanted: tuple[bool, ...],
        room_VD: Tensor | None = None,
    ) -> None:
        """``room_VD`` fp32 is where the weight's gradient is made, if there is one already."""
        self._of = states_ND, weight_VD, bias_V
        self.states_ND = torch.empty_like(states_ND) if wanted[0] else None
        if room_VD is None and wanted[1]:
            room_VD = torch.empty_like(weight_VD, dtype=torch.float32)
        self.weight_VD = None if room_VD is None else room_VD.zero_()
        self.bias_V = (
            torch.zeros_like(bias_V, dtype=torch.float32) if bias_V is not None and wanted[2] else None
        )
        self._needed = any(wanted[:3])

    def over(self, labels_N: Tensor, counts_N: Tensor | None = None) -> Tensor:
        """Losses [N], fp32; ``counts_N`` is how much each one's gradient counts, one if not given."""
        states_ND, weight_VD, bias_V = self._of
        found = torch.empty(len(labels_N), dtype=torch.float32, device=labels_N.device)
        rows = max(
            _SOFTMAX_ROWS, min(_MOST_ROWS, _LOGITS_BYTES // (len(weight_VD) * weight_VD.element_size()))
        )
        room_CV = _room(states_ND, rows, len(weight_VD))
        for first in range(0, len(labels_N), rows):
            part = slice(first, first + rows)
            logits_CV = torch.mm(states_ND[part], weight_VD.t(), out=room_CV[: len(labels_N) - first])
            if bias_V is not None:
                logits_CV += bias_V
            found[part] = _to_gradients(logits_CV, labels_N[part], self._needed)
            if counts_N is not None:
                logits_CV *= counts_N[part, None].to(logits_CV.dtype)
            if self._needed:
                self._add(logits_CV, part)
        return found

    def _add(self, grads_CV: Tensor, part: slice) -> None:
        states_ND, weight_VD, _ = self._of
        if self.states_ND is not None:
            rows = len(grads_CV) if _amx_products.fits(grads_CV, weight_VD) else _GRADIENT_ROWS
            for grads, out in _pieces(rows, grads_CV, self.states_ND[part]):
                _amx_products.multiply(grads, weight_VD, out)
        if self.weight_VD is not None:
            self.weight_VD += _amx_products.multiply(grads_CV.t(), states_ND[part])
        if self.bias_V is not None:
            self.bias_V += grads_CV.sum(0, dtype=torch.float32)


_rooms: dict[tuple[Any, ...], Tensor] = {}


def _room(like: Tensor, rows: int, words: int) -> Tensor:
    """Where logits are made, the same at every step: freed, it would be a hole in memory that others nibble at."""
    key = like.device, like.dtype, rows, words
    if key not in _rooms:
        _rooms[key] = like.new_empty(rows, words)
    return _rooms[key]


def _to_gradients(logits_CV: Tensor, labels_C: Tensor, needed: bool) -> Tensor:
    """Losses [C]; the logits are overwritten by the losses' gradient if that is needed."""
    if _CODE in _native.BUILT and logits_CV.dtype == torch.bfloat16 and logits_CV.device.type == "cpu":
        return _by_code(logits_CV, labels_C, needed)
    found = []
    for logits, labels in _pieces(_SOFTMAX_ROWS, logits_CV, labels_C):
        exact = logits.float()  # the same tensor if it is fp32
        largest, own = exact.amax(1), exact.gather(1, labels[:, None])[:, 0]
        torch.softmax(exact, 1, out=exact)
        # The largest probability is at least 1/V: its logarithm is finite, as that of a label's own may not be.
        found.append(largest - exact.amax(1).log() - own)
        if needed:
            own_C1 = labels[:, None]
            exact.scatter_add_(1, own_C1, exact.new_full(own_C1.shape, -1.0))
            logits.copy_(exact)
    return torch.cat(found) if found else logits_CV.new_empty(0, dtype=torch.float32)


def _by_code(logits_CV: Tensor, labels_C: Tensor, needed: bool) -> Tensor:
    losses_C, labels_C = torch.empty(len(labels_C), dtype=torch.float32), labels_C.contiguous()
    if hollow.is_on():  # there are no addresses, and nothing else is taken
        return losses_C
    logits, labels, found = (ctypes.c_void_p(x.data_ptr()) for x in (logits_CV, labels_C, losses_C))
    sizes = map(ctypes.c_int64, (*logits_CV.shape, logits_CV.stride(0)))
    _native.library(_CODE).losses(logits, *sizes, labels, found, int(needed))
    return losses_C


def _pieces(rows: int, one: Tensor, other: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both in parts of at most so many rows."""
    return zip(torch.split(one, rows), torch.split(other, rows), strict=True)
