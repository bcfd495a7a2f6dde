"""Sparse differences as a file holds them: ``<module>.weight.indices`` and ``.values`` [K], of the flattened weight."""

from typing import Any

from torch import Tensor

from tunewright.core.errors import ModelError, Problem
from tunewright.methods._difference import Difference, attach, attached
from tunewright.models import anatomy, files

_INDICES, _VALUES = ".weight.indices", ".weight.values"
_WHOLE = ("I32", "I64")
_NONE: dict[str, Any] = {"dtype": "", "shape": []}


def tensors(model: Any) -> dict[str, Tensor]:
    """What is saved of a model whose differences are learned; those without an entry are left out."""
    found: dict[str, Tensor] = {}
    for name, (_, difference) in attached(model).items():
        if difference.indices is not None and difference.indices.numel():
            found |= {name + _INDICES: difference.indices, name + _VALUES: difference.change.detach()}
    return found


def misses(base: Any, header: dict[str, dict[str, Any]]) -> list[str]:
    """Differences to weights that are not there, or that are no pairs of indices and values."""
    sizes = {linear.name: linear.inputs * linear.outputs for linear in anatomy.targets(base, ".*")}
    names = {name.removesuffix(_INDICES).removesuffix(_VALUES) for name in header}
    if strange := sorted(names - sizes.keys()):
        return [f"{len(strange)} differences are to modules that the base lacks: {strange[0]}"]
    wrong = sorted(name for name in names if not _is_pair(name, header, sizes[name]))
    return [f"{len(wrong)} differences are not pairs of indices and values: {wrong[0]}"] if wrong else []


def _is_pair(name: str, header: dict[str, dict[str, Any]], size: int) -> bool:
    indices, values = header.get(name + _INDICES, _NONE), header.get(name + _VALUES, _NONE)
    shape = indices["shape"]
    counted = len(shape) == 1 and 0 < shape[0] <= size and shape == values["shape"]
    return counted and indices["dtype"] in _WHOLE


def fill(model: Any, tensors: dict[str, Tensor]) -> None:
    """Put differences beside their weights; ModelError if an index lies outside of its weight."""
    for name in sorted(n.removesuffix(_INDICES) for n in tensors if n.endswith(_INDICES)):
        module, indices = model.get_submodule(name), tensors[name + _INDICES]
        if int(indices.min()) < 0 or int(indices.max()) >= module.weight.numel():
            raise ModelError(Problem(name, "an index lies outside of the weight", files.AGAIN))
        difference = Difference(module.weight.detach()[:0])
        difference.settle(indices.to(module.weight.device), tensors[name + _VALUES].to(module.weight))
        attach(module, difference)
