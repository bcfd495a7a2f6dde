"""Tensors without values: what a program would take of memory is seen by running it on them.

Numbers that are computed with have a shape and nothing else (torch's ``FakeTensor``); integers and truths, which decide
what a program does (tokens, labels, which expert), are real. Where they would come of numbers that are not there they
are made up: choices fall on all in turn, truths are true, a number that is asked for is one.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_aten = torch.ops.aten
_CHOICES = {_aten.topk.default, _aten.sort.default, _aten.sort.stable, _aten.max.dim, _aten.min.dim, _aten.argmax.default,
            _aten.multinomial.default}  # fmt: skip
_TRUE = {_aten.equal.default, _aten.allclose.default}
_INDEXED = {
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
}
_on: list["Hollow"] = []


def is_on() -> bool:
    """Whether tensors have no values now."""
    return bool(_on)


class Hollow(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within, tensors of numbers take no memory; ``live`` are the bytes they would take, ``most`` these at their most."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._sizes: dict[int, int] = {}
        self.live = self.most = 0

    def __enter__(self) -> "Hollow":
        _on.append(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        _on.remove(self)

    @contextmanager
    def watched(self) -> Iterator[list[int]]:
        """Gives a list, which has the most within as its only item afterwards."""
        before, self.most = self.most, self.live
        found: list[int] = []
        try:
            yield found
        finally:
            found.append(self.most)
            self.most = max(before, self.most)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One operation, on shapes if any of its tensors has no values."""
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if any(isinstance(x, FakeTensor) for x in tensors) or _makes_numbers(func, tensors, args, kwargs):
            out = self._on_shapes(func, args, kwargs)
        else:
            out = func(*args, **kwargs)
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._count(x)
        return out

    def _on_shapes(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is _aten._local_scalar_dense.default:
            return 1.0
        if func in _TRUE:
            return True
        if func in _INDEXED:
            args = (args[0], _places(args[1]), *args[2:])
        with self._fake:
            out = _grouped(*args, **kwargs) if func is _aten._grouped_mm.default else func(*args, **kwargs)
        # Modules exchange their tensors only where nothing else refers to them.
        self._fake.fake_tensor_converter.meta_converter.tensor_memo.clear()
        return tree_map(lambda x: _made_up(func, args, x) if _is_choice(x) else x, out)

    def _count(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live += self._sizes[key]
            self.most = max(self.most, self.live)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


def _makes_numbers(func: Any, tensors: Sequence[Tensor], args: Any, kwargs: Any) -> bool:
    """Whether an operation without tensors makes a tensor of numbers: its shape is all that is wanted."""
    sized = any(isinstance(x, list | tuple) and x for x in args)
    if tensors or not sized or not any("Tensor" in str(made.type) for made in func._schema.returns):
        return False
    made = func(*args, **{**kwargs, "device": torch.device("meta")})
    return bool(made.dtype.is_floating_point)


def _grouped(
    a: Tensor, b: Tensor, offs: Tensor | None = None, bias: object = None, out_dtype: Any = None
) -> Tensor:
    """A product for each expert. Torch's own rule is a GPU's, which takes bf16 alone; a CPU takes any numbers."""
    experts = [len(a if offs is None else offs)] if a.dim() == b.dim() else []
    return a.new_empty([*experts, a.shape[-2], b.shape[-1]], dtype=out_dtype)


def _places(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Masks as the places where they are true: how many that are is known, since truths are real."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool:
            found += index.nonzero(as_tuple=True)
        else:
            found.append(index)
    return found


def _is_choice(x: Any) -> bool:
    return isinstance(x, FakeTensor) and not (x.dtype.is_floating_point or x.dtype.is_complex)


def _made_up(func: Any, args: Any, x: Tensor) -> Tensor:
    """Real integers or truths in place of those that would come of numbers."""
    if func not in _CHOICES:
        return (torch.ones if x.dtype == torch.bool else torch.zeros)(x.shape, dtype=x.dtype)
    last = args[0].shape[-1] if args[0].dim() else 1
    return (torch.arange(x.numel()) % max(last, 1)).view(x.shape).to(x.dtype)
