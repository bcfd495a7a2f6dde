"""Causal attention over samples in one row on an NVIDIA GPU: PyTorch's FlashAttention kernel for lengths that vary.

Dao 2023, arXiv:2307.08691. Each sample costs what its own length does, and no length is asked of the GPU.
"""

from functools import cache

import torch
from torch import Tensor

_KINDS = (torch.bfloat16, torch.float16)
_WIDEST, _MULTIPLE = 192, 8
"""Numbers of a head: of wider ones the backward pass needs more memory on the chip than some of these GPUs have."""


def why_not(device: torch.device, dtype: torch.dtype) -> str:
    """What speaks against the kernel, whatever the heads; or nothing."""
    if device.type != "cuda":
        return "PyTorch has no kernel for samples in one row for this device"
    if dtype not in _KINDS:
        return "the kernel for samples in one row is for 16-bit numbers"
    return _says(device, dtype)


@cache
def _says(device: torch.device, dtype: torch.dtype) -> str:
    """What the kernel says to two short samples; nothing if it computes. A GPU may be too old for it, or a build lack it."""
    query = torch.ones(1, 1, 16, _MULTIPLE, device=device, dtype=dtype, requires_grad=True)
    ends = torch.tensor([0, 5, 12], device=device, dtype=torch.int32)
    try:
        attention(query, query, query, ends, 1.0).sum().backward()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        return f"PyTorch's kernel for samples in one row says: {str(error).splitlines()[0]}"
    return ""


def fits(query: Tensor, value: Tensor) -> bool:
    """Whether the kernel takes heads of these sizes [.., D], where :func:`why_not` has nothing against it."""
    width = query.shape[3]
    return query.dtype in _KINDS and width == value.shape[3] <= _WIDEST and width % _MULTIPLE == 0


def attention(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, scale: float) -> Tensor:
    """Query [1, H, M, D], key and value [1, G, M, D], where samples begin and the last ends int32 [S + 1]
    -> [1, M, H, D].
    """
    from torch.nn.attention.varlen import varlen_attn

    tokens = query.shape[2]
    # What fills up the row is a sample, too: else it would be left as found.
    bounds = torch.cat([ends, ends.new_full((1,), tokens)])
    q_MHD, k_MGD, v_MGD = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    # The window is the kernel's word for causal. No sample is longer than the row: how long the longest is need not be asked.
    out_MHD = varlen_attn(
        q_MHD, k_MGD, v_MGD, bounds, bounds, tokens, tokens,
        scale=scale, window_size=(-1, 0), enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    assert isinstance(out_MHD, Tensor)  # noqa: S101 nothing else was asked for
    return out_MHD.unsqueeze(0)
