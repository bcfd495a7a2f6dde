"""Products of bf16 matrices that do not lie as matrix units want them: the code is in ``_amx_products.cpp``.

PyTorch's library multiplies x·Wᵀ at twice the rate of gᵀ·x, a weight's gradient, on the same units.
"""

import ctypes

import torch
from torch import Tensor

from tunewright.fast import _native
from tunewright.models import hollow

_CODE = "_amx_products"
_LEAST_DEPTH = 256
"""With fewer numbers a sum, laying out costs more than the product."""
_SUMS, _COLUMNS = 320 << 10, 640
"""Results of a long sum, and a row of them: with more, what is worked on does not stay in a core's cache."""


def prepare() -> str:
    """Build the code; why that cannot be done, or nothing."""
    return _native.why_not(_CODE)


def fits(a: Tensor, b: Tensor) -> bool:
    """Whether the code is the faster way to a·b; never before :func:`prepare`.

    It is where the left side [M, K] lies transposed, as a gradient does in a weight's gradient; and where all of a small
    result is one long sum, as of the output layer's gradient.
    """
    if _CODE not in _native.BUILT or hollow.is_on() or a.dtype != torch.bfloat16 or b.dtype != torch.bfloat16:
        return False
    (rows, depth), columns = a.shape, b.shape[1]
    if a.device.type != "cpu" or depth < _LEAST_DEPTH or 1 not in b.stride() or not rows * columns:
        return False
    if a.stride(0) == 1:
        return True
    small = rows * columns <= _SUMS and columns <= _COLUMNS
    return a.stride(1) == 1 and small and depth >= 16 * max(rows, columns)


def multiply(a_MK: Tensor, b_KN: Tensor, out_MN: Tensor | None = None) -> Tensor:
    """a·b by whichever way is faster; a sum is fp32, and rounded once. A row of ``out_MN`` lies together."""
    if not fits(a_MK, b_KN):
        return torch.mm(a_MK, b_KN) if out_MN is None else torch.mm(a_MK, b_KN, out=out_MN)
    if out_MN is None:
        out_MN = a_MK.new_empty(len(a_MK), b_KN.shape[1])
    (rows, depth), columns = a_MK.shape, b_KN.shape[1]
    sizes = (rows, columns, depth, out_MN.stride(0), *a_MK.stride(), *reversed(b_KN.stride()))
    addresses = (ctypes.c_void_p(x.data_ptr()) for x in (out_MN, a_MK, b_KN))
    if _native.library(_CODE).multiply(*addresses, (ctypes.c_int64 * 8)(*sizes)):
        torch.mm(a_MK, b_KN, out=out_MN)  # there was no memory for it; if there is none for this, it is told
    return out_MN
