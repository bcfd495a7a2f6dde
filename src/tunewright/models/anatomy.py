"""The parts of a transformer, found by what they are and not by one architecture's names.

Works on a model whose tensors are on the ``meta`` device as well: nothing here looks at a value.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_FEED_FORWARD = re.compile(r"mlp|ffn|feed_?forward|moe", re.IGNORECASE)


@dataclass(frozen=True)
class Linear:
    """A linear layer by its module's name; Conv1D, GPT-2's own kind, has its weight [inputs, outputs]."""

    name: str
    inputs: int
    outputs: int
    has_bias: bool
    is_conv1d: bool


def blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The decoder layers with their names, first layer first: the longest list of modules there is."""
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        return []
    name, stack = max(lists, key=lambda item: len(item[1]))
    return [(f"{name}.{i}", block) for i, block in enumerate(stack)]


def attention(block: nn.Module) -> nn.Module | None:
    """A block's self-attention sub-layer, its output projection included."""
    return _child(block, _ATTENTION)


def feed_forward(block: nn.Module) -> nn.Module | None:
    """A block's feed-forward sub-layer: an MLP, or a mixture of experts."""
    return _child(block, _FEED_FORWARD)


def _child(block: nn.Module, pattern: re.Pattern[str]) -> nn.Module | None:
    """The first child that is named so, has weights (GPT-NeoX names dropouts so) and is no normalisation."""
    weighty = ((name, m) for name, m in block.named_children() if next(m.parameters(), None) is not None)
    named = (m for name, m in weighty if pattern.search(name) and "norm" not in name)
    return next(named, None)


def linears(model: nn.Module) -> list[Linear]:
    """All linear layers but the output head."""
    head = output_head(model)
    return [linear(name, m) for name, m in model.named_modules() if _is_linear(m) and m is not head]


def numbers_per_token(layers: Iterable[Linear]) -> int:
    """How many numbers linear layers read and write for a token; LoRA's pairs read and write what their layer does."""
    return sum(
        2 * min(layer.inputs, layer.outputs) if ".lora_" in layer.name else layer.inputs + layer.outputs
        for layer in layers
    )


def targets(model: nn.Module, wanted: str | tuple[str, ...]) -> list[Linear]:
    """The linear layers that PEFT's ``target_modules`` names: ``all-linear``, names, or a pattern for whole names."""
    if wanted == "all-linear":
        return linears(model)
    named = [linear(name, m) for name, m in model.named_modules() if _is_linear(m)]
    if isinstance(wanted, str):
        return [layer for layer in named if re.fullmatch(wanted, layer.name)]
    return [layer for layer in named if any(f".{layer.name}".endswith(f".{name}") for name in wanted)]


def _is_linear(module: Any) -> bool:
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _is_conv1d(module: Any) -> bool:
    return any(kind.__name__ == "Conv1D" for kind in type(module).__mro__) and hasattr(module, "nx")


def linear(name: str, module: Any) -> Linear:
    """What a linear layer is; its weight, which may have to be made first, is not looked at."""
    has_bias = module.bias is not None
    if _is_conv1d(module):
        return Linear(name, module.nx, module.nf, has_bias, is_conv1d=True)
    return Linear(name, module.in_features, module.out_features, has_bias, is_conv1d=False)


def output_head(model: Any) -> nn.Module | None:
    """The layer that makes logits, if the model has one."""
    find = getattr(model, "get_output_embeddings", None)
    head: nn.Module | None = find() if find else None
    return head


def hidden_size(model: Any) -> int:
    """Width of the residual stream."""
    return int(model.config.get_text_config().hidden_size)


def embeddings(model: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """Token and position embeddings and the output head, by name; a tied weight comes once."""
    modules = {id(m) for m in model.modules() if isinstance(m, nn.Embedding) or m is output_head(model)}
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        if id(owner) in modules:
            yield name, parameter
