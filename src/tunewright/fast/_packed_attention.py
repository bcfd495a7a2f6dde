"""Causal attention over samples that follow one another in one row: each sees itself only.

They are laid side by side, padded to one length, for attention alone; everything else works on the row, which has no
padding.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tunewright.fast import _causal

_STEP = 32
"""Lengths are rounded up to a multiple of this: kernels are made for shapes, and so fewer have to be."""


class _Layout(NamedTuple):
    samples: int
    longest: int
    from_row: Tensor
    """For each place in the padded batch, the token of the row that lies there; its own first one in padding."""
    padding: Tensor
    """Places that are padding."""
    to_row: Tensor
    """For each token of the row, its place in the padded batch."""


@lru_cache(maxsize=8)  # the layers of one pass ask for the same, and the backward pass again
def _layout(ends: tuple[int, ...]) -> _Layout:
    ends_S1 = torch.tensor(ends)
    lengths_S = ends_S1.diff()
    longest = -(-int(lengths_S.max()) // _STEP) * _STEP
    within_ST = torch.arange(longest)[None].expand(len(lengths_S), -1)
    real_ST = within_ST < lengths_S[:, None]
    from_row_ST = ends_S1[:-1, None] + torch.where(real_ST, within_ST, 0)
    places = torch.arange(real_ST.numel()).view_as(real_ST)
    return _Layout(len(lengths_S), longest, from_row_ST.flatten(), places[~real_ST], places[real_ST])


def _padded(x_1HMD: Tensor, at: _Layout) -> Tensor:
    """[S, H, T, D], laid out as [S, T, H, D]."""
    _, heads, _, width = x_1HMD.shape
    row_MX = x_1HMD[0].transpose(0, 1).flatten(1)
    return row_MX[at.from_row].view(at.samples, at.longest, heads, width).transpose(1, 2)


def _row(x_SHTD: Tensor, at: _Layout, tokens: int) -> Tensor:
    """[1, H, M, D], laid out as [1, M, H, D]; zero for tokens of no sample."""
    samples, heads, longest, width = x_SHTD.shape
    places_PX = x_SHTD.transpose(1, 2).reshape(samples * longest, heads * width)
    row_MX = x_SHTD.new_zeros(tokens, heads * width)
    torch.index_select(places_PX, 0, at.to_row, out=row_MX[: len(at.to_row)])
    return row_MX.view(1, tokens, heads, width).transpose(1, 2)


@torch.library.custom_op("tunewright::packed_attention", mutates_args=())
def attend(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, scale: float) -> Tensor:
    at = _layout(tuple(ends.tolist()))
    out_SHTD, _ = _causal.forward(_padded(query, at), _padded(key, at), _padded(value, at), scale)
    return _row(out_SHTD, at, query.shape[2])


def _like(x: Tensor) -> Tensor:
    batch, heads, tokens, width = x.shape
    return x.new_empty(batch, tokens, heads, width).transpose(1, 2)


@attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, scale: float) -> Tensor:
    return _like(query)


@torch.library.custom_op("tunewright::packed_attention_backward", mutates_args=())
def attend_backward(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, ends: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    at = _layout(tuple(ends.tolist()))
    grad_SHTD = _padded(grad, at)
    grad_SHTD.transpose(1, 2).flatten(0, 1)[at.padding] = 0
    grads = _causal.backward(_padded(query, at), _padded(key, at), _padded(value, at), grad_SHTD, scale)
    for_query, for_key, for_value = (_row(x, at, query.shape[2]) for x in grads)
    return for_query, for_key, for_value


@attend_backward.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, ends: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(query), _like(key), _like(value)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, ends = ctx.saved_tensors
    return *attend_backward(query, key, value, grad, ends, ctx.scale), None, None


attend.register_autograd(_differentiate, setup_context=_keep)


def attention(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, scale: float) -> Tensor:
    """Query [1, H, M, D], key and value [1, G, M, D], where samples begin and the last ends [S + 1] -> [1, M, H, D]."""
    out: Tensor = attend(query, key, value, ends, scale)
    return out.transpose(1, 2)


def mask(ends: Tensor, tokens: int) -> Tensor:
    """Whom each token of the row sees [1, 1, M, M]: its own sample's, up to itself; what fills up the row, itself alike."""
    places = torch.arange(tokens, device=ends.device)
    sample = torch.bucketize(places, ends[1:].to(places.dtype), right=True)
    return ((sample[:, None] == sample) & (places[:, None] >= places))[None, None]


def dropping(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, dropout: float, scale: float) -> Tensor:
    """The same with dropout of the scores, by PyTorch's kernel, which then keeps them: of each sample alone, where a mask
    would have it keep those of the whole row.
    """
    at = _layout(tuple(ends.tolist()))
    q_SHTD, k_SGTD, v_SGTD = (_padded(x, at) for x in (query, key, value))
    out_SHTD = F.scaled_dot_product_attention(
        q_SHTD,
        k_SGTD,
        v_SGTD,
        dropout_p=dropout,
        is_causal=True,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    _, heads, tokens, width = query.shape
    row_MX = out_SHTD.transpose(1, 2).reshape(-1, heads * width)[at.to_row]
    return F.pad(row_MX, (0, 0, 0, tokens - len(row_MX))).view(1, tokens, heads, width)
