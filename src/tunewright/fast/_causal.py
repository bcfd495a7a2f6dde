"""Causal attention and its gradient by whole matrix products, for CPUs."""

import torch
from torch import Tensor

_BAND = 256
"""Queries worked on at once; keys after the last of them are left out."""


def forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output [B, H, T, D], laid out as [B, T, H, D], and the logarithm of each row's sum; PyTorch's own kernel."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(repeats, 1) if repeats > 1 else t for t in (key, value))
    out_BHTD, logsumexp, *_ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, True, scale=scale
    )
    return out_BHTD, logsumexp


def backward(
    query_BHTD: Tensor, key_BGTD: Tensor, value_BGTD: Tensor, grad_BHTD: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value.

    The queries of all heads that share a key are rows of one matrix: R heads of n queries are R·n rows (suffix M).
    """
    B, H, T, D = query_BHTD.shape
    G = key_BGTD.shape[1]
    query, grad = (t.reshape(B, G, H // G, T, D) for t in (query_BHTD, grad_BHTD))
    keys_NTD, values_NTD = (t.reshape(B * G, T, D) for t in (key_BGTD, value_BGTD))
    for_query = query.new_empty(query.shape)
    for_keys, for_values = keys_NTD.new_zeros(keys_NTD.shape), values_NTD.new_zeros(values_NTD.shape)
    for first in range(0, T, _BAND):
        band, seen = slice(first, first + _BAND), slice(0, min(T, first + _BAND))
        rows = query[:, :, :, band]
        query_NMD, grad_NMD = (t[:, :, :, band].reshape(B * G, -1, D) for t in (query, grad))
        keys, values = keys_NTD[:, seen], values_NTD[:, seen]
        mask_1MS = _mask(rows.shape[3], keys.shape[1], H // G, query.dtype)
        scores_NMS = torch.baddbmm(mask_1MS, query_NMD, keys.mT, alpha=scale)
        shares_NMS = torch.softmax(scores_NMS, -1, out=scores_NMS)
        for_values[:, seen].baddbmm_(shares_NMS.mT, grad_NMD)
        for_scores = torch._softmax_backward_data(grad_NMD @ values.mT, shares_NMS, -1, query.dtype)
        for_query[:, :, :, band] = (for_scores @ keys).view_as(rows)
        for_keys[:, seen].baddbmm_(for_scores.mT, query_NMD)
    return (
        for_query.mul_(scale).view(B, H, T, D),
        for_keys.mul_(scale).view(B, G, T, D),
        for_values.view(B, G, T, D),
    )


_MASKS: dict[tuple[int, int, int, torch.dtype], Tensor] = {}
_MOST_MASKS = 256


def _mask(queries: int, keys: int, repeats: int, dtype: torch.dtype) -> Tensor:
    """0 where the last ``queries`` of ``keys`` positions may look, else minus infinity [1, repeats * queries, keys]."""
    shape = queries, keys, repeats, dtype
    if shape not in _MASKS:
        if len(_MASKS) >= _MOST_MASKS:
            _MASKS.clear()
        later = torch.full((queries, keys), -torch.inf, dtype=dtype).triu(keys - queries + 1)
        _MASKS[shape] = later.repeat(repeats, 1)[None]
    return _MASKS[shape]
