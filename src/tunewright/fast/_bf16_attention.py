"""Causal attention in bf16, for samples that follow one another in a row: the code is in ``_bf16_attention.cpp``.

Each sample costs what its own length does, and no scores are held but those of 64 queries and 64 keys. Tokens that
several samples begin with lie in the row once.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tunewright.fast import _native

_CODE = "_bf16_attention"
_WIDTHS = (32, 64, 96, 128)


def prepare() -> str:
    """Build the code; why that cannot be done, or nothing."""
    return _native.why_not(_CODE)


def fits(query: Tensor) -> bool:
    """Whether there is code for such heads [.., D]; never before :func:`prepare`."""
    return _CODE in _native.BUILT and query.dtype == torch.bfloat16 and query.shape[3] in _WIDTHS


def _laid_out(x_1HMD: Tensor) -> Tensor:
    return x_1HMD if x_1HMD.stride(3) == 1 else x_1HMD.contiguous()


def _new(like_1HMD: Tensor) -> Tensor:
    """Laid out as [1, M, H, D]."""
    batch, heads, tokens, width = like_1HMD.shape
    return like_1HMD.new_empty(batch, tokens, heads, width).transpose(1, 2)


def _call(
    tensors: Sequence[Tensor],
    logsumexp_HM: Tensor,
    ends: Tensor,
    prefixes: Tensor | None,
    scale: float,
    back: bool,
) -> None:
    """Tensors as the code names them: query, key, value, output, and for the way back four gradients."""
    query, key = tensors[:2]
    bounds, shared = ends.to(torch.int64), None if prefixes is None else prefixes.to(torch.int64).contiguous()
    groups, width = key.shape[1], key.shape[3]
    apart = None
    if back and shared is not None:
        apart = torch.empty(2 * groups * int(shared[:, 1].sum()) * width)
    sizes = (len(ends) - 1, query.shape[1], groups, query.shape[2], width)
    addresses = [t.data_ptr() for t in tensors] + [None] * (8 - len(tensors)) + [logsumexp_HM.data_ptr()]
    strides = [stride for t in tensors for stride in (t.stride(1), t.stride(2))]
    failed = _native.library(_CODE).attend(
        (ctypes.c_int64 * 5)(*sizes),
        ctypes.c_float(scale),
        *(ctypes.c_void_p(None if x is None else x.data_ptr()) for x in (bounds, shared, apart)),
        (ctypes.c_void_p * 9)(*addresses),
        (ctypes.c_int64 * len(strides))(*strides),
        int(back),
    )
    if failed:
        raise ValueError(f"no code for heads of {width} numbers")
    last = int(bounds[-1])
    for made in tensors[5:] if back else tensors[3:]:
        made[:, :, last:] = 0  # tokens of no sample
    if not back:
        logsumexp_HM[:, last:] = 0


@torch.library.custom_op("tunewright::bf16_attention", mutates_args=())
def attend(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, prefixes: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    query, key, value = map(_laid_out, (query, key, value))
    out, logsumexp_HM = _new(query), query.new_empty(query.shape[1:3], dtype=torch.float32)
    _call((query, key, value, out), logsumexp_HM, ends, prefixes, scale, back=False)
    return out, logsumexp_HM


@attend.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, prefixes: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    return _new(query), query.new_empty(query.shape[1:3], dtype=torch.float32)


@torch.library.custom_op("tunewright::bf16_attention_backward", mutates_args=())
def attend_backward(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp_HM: Tensor, grad: Tensor, ends: Tensor,
    prefixes: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    query, key, value, out, grad = map(_laid_out, (query, key, value, out, grad))
    made = _new(query), _new(key), _new(value)
    _call((query, key, value, out, grad, *made), logsumexp_HM, ends, prefixes, scale, back=True)
    return made


@attend_backward.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp_HM: Tensor, grad: Tensor, ends: Tensor,
    prefixes: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _new(query), _new(key), _new(value)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, ends, prefixes, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, *output, ends, prefixes)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, ends, prefixes = ctx.saved_tensors
    return *attend_backward(*tensors, grad, ends, prefixes, ctx.scale), None, None, None


attend.register_autograd(_differentiate, setup_context=_keep)


def in_a_row(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, scale: float, prefixes: Tensor | None = None
) -> Tensor:
    """Query [1, H, M, D], key and value [1, G, M, D] -> [1, M, H, D].

    ``ends`` [S + 1] says where samples begin and the last ends; ``prefixes`` [S, 2], if any, where the tokens lie that
    each goes on from, and how many they are: no more than the sample that they begin has.
    """
    out: Tensor = attend(query, key, value, ends, prefixes, scale)[0]
    return out.transpose(1, 2)


def in_a_batch(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Query [B, H, T, D], key and value [B, G, T, D] -> [B, T, H, D]."""
    batch, _, tokens, _ = query.shape
    ends = torch.arange(batch + 1) * tokens
    out_1MHD = in_a_row(_in_a_row(query), _in_a_row(key), _in_a_row(value), ends, scale)
    return out_1MHD.view(batch, tokens, *out_1MHD.shape[2:])


def _in_a_row(x_BHTD: Tensor) -> Tensor:
    return x_BHTD.transpose(1, 2).flatten(0, 1)[None].transpose(1, 2)
