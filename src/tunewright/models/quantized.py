"""Weights held in 4 or 8 bits.

``nf4``: blocks of 64 in 4-bit NormalFloat; with ``double`` the blocks' scales are held in 8 bits themselves (Dettmers
et al. 2023, arXiv:2305.14314, section 3). ``int8``: each output's weights divided by their largest magnitude and
rounded to 127 steps (Dettmers et al. 2022, arXiv:2208.07339, section 2.1). Tensors are named as in
:func:`quantize`; O are outputs, I inputs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tunewright.models import anatomy, blockwise

_BLOCK, _BLOCK_OF_SCALES = 64, 256
Tensors = dict[str, Tensor]
Make = Callable[[str, Tensor], Tensors]
"""From a layer's name and weight [outputs, inputs] to what is held of it."""


@dataclass(frozen=True)
class Scheme:
    """How weights are held."""

    kind: Literal["nf4", "int8"] = "nf4"
    double: bool = True
    """Whether nf4's scales are quantized too."""

    @property
    def bytes_each(self) -> float:
        """Bytes for each weight of a large matrix, scales included."""
        if self.kind == "int8":
            return 1.0
        scale = 1 + 4 / _BLOCK_OF_SCALES if self.double else 4
        return 0.5 + scale / _BLOCK


def quantize(weight_OI: Tensor, scheme: Scheme) -> Tensors:
    """``codes`` and ``scales``; with double quantization the scales are codes and have ``offset`` and ``outer``."""
    if scheme.kind == "int8":
        scale_O = weight_OI.float().abs().amax(1) / 127
        divisor_O = torch.where(scale_O == 0, 1.0, scale_O)
        return {"codes": (weight_OI.float() / divisor_O[:, None]).round().to(torch.int8), "scales": scale_O}
    codes, scales = blockwise.encode(weight_OI, "nf4", _BLOCK)
    if not scheme.double:
        return {"codes": codes, "scales": scales}
    offset = scales.mean()
    inner, outer = blockwise.encode(scales - offset, "signed", _BLOCK_OF_SCALES)
    return {"codes": codes, "scales": inner, "offset": offset, "outer": outer}


def dequantize(tensors: Tensors, scheme: Scheme, outputs: int, inputs: int, dtype: torch.dtype) -> Tensor:
    """The weight [outputs, inputs] that :func:`quantize` gave these tensors for."""
    codes, scales, count = tensors["codes"], tensors["scales"], outputs * inputs
    if scheme.kind == "int8":
        return _scaled(codes, scales, dtype)
    if scheme.double:
        inner = blockwise.decode(scales, tensors["outer"], "signed", _BLOCK_OF_SCALES, scales.numel())
        scales = inner + tensors["offset"]
    return blockwise.decode(codes, scales, "nf4", _BLOCK, count, dtype).view(outputs, inputs)


def _scaled(codes_OI: Tensor, scale_O: Tensor, dtype: torch.dtype) -> Tensor:
    """int8 times each output's scale, some outputs at a time: fp32 of the whole is never there."""
    out_OI = torch.empty(codes_OI.shape, dtype=dtype, device=codes_OI.device)
    rows = max(1, blockwise.chunk(codes_OI.device) // codes_OI.shape[1])
    for out, codes, scale in zip(*(torch.split(t, rows) for t in (out_OI, codes_OI, scale_O)), strict=True):
        out.copy_(codes * scale[:, None])
    return out_OI


def candidates(model: Any) -> list[anatomy.Linear]:
    """The linear layers that are quantized: those inside the blocks, not head or embeddings."""
    inside = tuple(f"{name}." for name, _ in anatomy.blocks(model))
    return [linear for linear in anatomy.linears(model) if linear.name.startswith(inside)]
