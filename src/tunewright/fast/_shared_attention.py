"""Causal attention over samples in one row, some of which go on from tokens that another sample begins with.

Such tokens lie in the row once. For attention alone they are laid before each sample that shares them; all else works on
the row. This is for numbers that ``_bf16_attention`` has no code for, which looks them up where they lie.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tunewright.fast import _packed_attention as packed


class _Layout(NamedTuple):
    ends: Tensor
    """Where samples begin in the whole row, which has shared tokens as often as they are shared, and the last ends."""
    from_row: Tensor
    """For each token of the whole row, where it lies in the row."""
    own: Tensor
    """For each token of the row, where it lies in the whole row."""
    shared: tuple[tuple[int, int, int], ...]
    """Runs of tokens by where they begin in the whole row and in the row, and how many they are."""


@lru_cache(maxsize=8)  # the layers of one pass ask for the same, and the backward pass again
def _layout(ends: tuple[int, ...], prefixes: tuple[tuple[int, int], ...]) -> _Layout:
    pieces, own, shared, at, bounds = [], [], [], 0, [0]
    for begin, end, (source, count) in zip(ends, ends[1:], prefixes, strict=False):
        if count:
            pieces.append(torch.arange(source, source + count))
            shared.append((at, source, count))
            at += count
        pieces.append(torch.arange(begin, end))
        own.append(torch.arange(at, at + end - begin))
        at += end - begin
        bounds.append(at)
    return _Layout(torch.tensor(bounds), torch.cat(pieces), torch.cat(own), tuple(shared))


def _found(ends: Tensor, prefixes: Tensor) -> _Layout:
    return _layout(tuple(ends.tolist()), tuple((a, b) for a, b in prefixes.tolist()))


def _picked(x_1HMD: Tensor, places: Tensor) -> Tensor:
    """Tokens at these places [1, H, len(places), D], laid out as [1, T, H, D]."""
    _, heads, _, width = x_1HMD.shape
    found = x_1HMD[0].transpose(0, 1).flatten(1)[places]
    return found.view(1, len(places), heads, width).transpose(1, 2)


def _put(x_1HTD: Tensor, places: Tensor, tokens: int) -> Tensor:
    """Tokens put at these places among so many [1, H, tokens, D], all others zero."""
    _, heads, _, width = x_1HTD.shape
    made = x_1HTD.new_zeros(1, tokens, heads, width)
    made[0, places] = x_1HTD[0, :, : len(places)].transpose(0, 1)
    return made.transpose(1, 2)


@torch.library.custom_op("tunewright::shared_attention", mutates_args=())
def _attend(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, prefixes: Tensor, scale: float
) -> Tensor:
    at = _found(ends, prefixes)
    out = packed.attend(*(_picked(x, at.from_row) for x in (query, key, value)), at.ends, scale)
    return _put(_picked(out, at.own), torch.arange(len(at.own)), query.shape[2])


def _like(x: Tensor) -> Tensor:
    batch, heads, tokens, width = x.shape
    return x.new_empty(batch, tokens, heads, width).transpose(1, 2)


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, prefixes: Tensor, scale: float) -> Tensor:
    return _like(query)


@torch.library.custom_op("tunewright::shared_attention_backward", mutates_args=())
def _backward(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, ends: Tensor, prefixes: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    at, tokens = _found(ends, prefixes), query.shape[2]
    grad = _put(grad, at.own, len(at.from_row))  # what shared tokens make of it counts once
    made = packed.attend_backward(
        *(_picked(x, at.from_row) for x in (query, key, value)), grad, at.ends, scale
    )
    for_query, for_key, for_value = (_summed(x, at, tokens) for x in made)
    return for_query, for_key, for_value


@_backward.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, ends: Tensor, prefixes: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(query), _like(key), _like(value)


def _summed(x_1HTD: Tensor, at: _Layout, tokens: int) -> Tensor:
    """A token's gradients, of all samples that see it."""
    row = _put(_picked(x_1HTD, at.own), torch.arange(len(at.own)), tokens)
    for begin, source, count in at.shared:
        row[:, :, source : source + count] += x_1HTD[:, :, begin : begin + count]
    return row


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, ends, prefixes = ctx.saved_tensors
    return *_backward(query, key, value, grad, ends, prefixes, ctx.scale), None, None, None


_attend.register_autograd(_differentiate, setup_context=_keep)


def attention(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, prefixes: Tensor, scale: float
) -> Tensor:
    """Query [1, H, M, D], key and value [1, G, M, D] -> [1, M, H, D].

    ``ends`` [S + 1] says where the samples' own tokens begin in the row and the last ends; ``prefixes`` [S, 2] where the
    tokens lie that a sample goes on from, and how many they are.
    """
    out: Tensor = _attend(query, key, value, ends, prefixes, scale)
    return out.transpose(1, 2)
