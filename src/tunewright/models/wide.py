"""Products of bf16 numbers on a processor that has no instructions for them: computed in fp32, kept in bf16.

PyTorch multiplies them there in loops of its own, at 1 to 15 GFLOP/s where fp32 reaches 110 (AVX2, two cores, by which side
is transposed). Here both sides are widened part by part, so that little memory is taken, sums are fp32, and a result is
rounded once, as matrix units round it.
"""

import math
import platform
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

_MOST = 4 << 20
"""Numbers that are wide at a time, of each operand and of the result."""
_FEW = 8
"""With fewer rows by a weight as it lies in memory PyTorch's loops are faster than widening it."""
_BACKWARD = "_scaled_dot_product_flash_attention_for_cpu_backward"
Kernel = Callable[..., Any]
_library: list[torch.library.Library] = []
_held: list[None] = []
"""One entry for each :func:`plain` that is entered."""


@cache
def why_not() -> str:
    """Why it would gain nothing on this processor; empty if it would."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return "it is for x86 processors"
    return "the processor multiplies bf16 itself" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else ""


def begin() -> None:
    """From now on, in this process, where :func:`why_not` has nothing against it."""
    if not why_not():
        install()


def install() -> None:
    """On any processor, once."""
    if _library:
        return
    _library.append(torch.library.Library("aten", "IMPL"))  # type: ignore[no-untyped-call]
    for name in ("mm", "bmm"):
        _replace(name, _product)
        _replace(f"{name}.out", _product)
    for name in ("addmm", "baddbmm"):
        _replace(name, _sum)
        _replace(f"{name}.out", _sum)
        _replace(f"{name}_", lambda call, start, *args, **dials: _sum(call, start, *args, out=start, **dials))
    _replace(_BACKWARD, _widened)


@contextmanager
def plain() -> Iterator[None]:
    """Within, products are PyTorch's own again."""
    _held.append(None)
    try:
        yield
    finally:
        _held.pop()


def _replace(name: str, ours: Kernel) -> None:
    """Calls of the operation with bf16 numbers on a CPU go to ``ours``, which is given the kernel that makes a result."""
    own = torch.library.get_kernel(f"aten::{name}", "CPU")
    making = torch.library.get_kernel(f"aten::{name.removesuffix('.out').rstrip('_')}", "CPU")

    def call(keys: Any, *args: Any, **dials: Any) -> Any:
        tensors = [x for x in (*args, *dials.values()) if isinstance(x, Tensor)]
        if _held or any(x.dtype != torch.bfloat16 or not x.numel() for x in tensors[:3]):
            return own.call_boxed(keys, *args, **dials)
        return ours(partial(making.call_boxed, keys), *args, **dials)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a kernel is replaced is what is wanted
        _library[0].impl(name, call, "CPU", with_keyset=True)  # type: ignore[no-untyped-call]


def _product(call: Kernel, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    return _filled(a, b, out, lambda rows, columns, x, y: call(x, y))


def _sum(
    call: Kernel,
    start: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
    out: Tensor | None = None,
) -> Tensor:
    whole = start.expand(*a.shape[:-1], b.shape[-1])

    def part(rows: slice, columns: slice, x: Tensor, y: Tensor) -> Tensor:
        made: Tensor = call(whole[..., rows, columns].to(x.dtype), x, y, beta=beta, alpha=alpha)
        return made

    return _filled(a, b, out, part)


def _filled(
    a: Tensor, b: Tensor, out: Tensor | None, part: Callable[[slice, slice, Tensor, Tensor], Tensor]
) -> Tensor:
    """``out``, or a new tensor, with the parts of a·b in their places; rows are a's and columns b's."""
    if a.shape[-2] == 1 or (a.shape[-2] < _FEW and b.stride(-2) == 1):
        made = part(slice(None), slice(None), a, b)
        return made if out is None else out.copy_(made)
    out = a.new_empty(*a.shape[:-1], b.shape[-1]) if out is None else out
    for columns in _cut(b.shape[-1], b.numel()):
        y = b[..., columns].float()
        for rows in _cut(a.shape[-2], max(a.numel(), out[..., columns].numel())):
            out[..., rows, columns] = part(rows, columns, a[..., rows, :].float(), y)
    return out


def _cut(length: int, numbers: int) -> Iterator[slice]:
    """So that of the ``numbers`` that lie along a side no part has many more than are to be wide at a time."""
    size = math.ceil(length / math.ceil(numbers / _MOST))
    return (slice(first, first + size) for first in range(0, length, size))


def _widened(call: Kernel, *args: Any, **dials: Any) -> tuple[Tensor, ...]:
    """Attention's way back."""
    made = call(*map(_wide, args), **{key: _wide(value) for key, value in dials.items()})
    return tuple(x.to(torch.bfloat16) for x in made)


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value
