"""What each method trains and saves, from a shape alone.

``methods/*.py`` say the same of a model, but to import them takes torch: a test holds both together.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tunewright.advise.shape import Linear, Shape

Options = Mapping[str, Any]
_NF4 = 0.5 + (1 + 4 / 256) / 64
"""Bytes of a weight in nf4 with quantized scales (Dettmers et al. 2023, arXiv:2305.14314, section 3)."""


@dataclass(frozen=True)
class Family:
    """A method, as far as memory and time see it."""

    count: Callable[[Shape, Options], int]
    """Trainable parameters."""
    lr: float
    """Peak learning rate by default."""
    options: Options = field(default_factory=dict)
    """Defaults that :attr:`count` reads."""
    folder: str = "adapter"
    saved: Callable[[Shape, Options], int] | None = None
    """Numbers written, where they are not those that are trained."""
    base_bytes: float | None = None
    """Bytes of a frozen weight of a linear layer, where it is quantized."""
    reaches: float = 1.0
    """Share of the blocks, counted from the end, that the backward pass goes through."""
    keeps_inputs: bool = True
    """Whether what goes into linear layers is kept for the backward pass: what is trained there asks for it."""
    keeps_outputs: bool = False
    """Whether what comes out of them is kept, too."""
    within: bool = False
    """Whether what is trained are weights of the model's own."""
    pace: float = 1.0
    """Time of a step against LoRA's, beyond what operations say."""


def _full(shape: Shape, options: Options) -> int:
    return shape.parameters


def _partial(shape: Shape, options: Options) -> int:
    """The later half of the blocks."""
    return sum(map(shape.block, range(shape.layers // 2, shape.layers)))


def _bitfit(shape: Shape, options: Options) -> int:
    return shape.norm_biases + sum(n.outputs * n.count for n in shape.linears)


def _lora(shape: Shape, options: Options) -> int:
    return sum(options["rank"] * (n.inputs + n.outputs) * n.count for n in shape.linears)


def _dora(shape: Shape, options: Options) -> int:
    return _lora(shape, options) + sum(n.outputs * n.count for n in shape.linears)


def _multi_task(shape: Shape, options: Options) -> int:
    return _lora(shape, options) * max(1, len(options["tasks"]))


def _ia3(shape: Shape, options: Options) -> int:
    return sum(_scaled(layer) * layer.count for layer in shape.linears)


def _scaled(layer: Linear) -> int:
    """Keys' and values' outputs; the inputs of what each feed-forward layer ends with."""
    if layer.name in ("mlp.down", "shared.switch"):
        return layer.inputs
    return layer.outputs if layer.name in ("attention.k", "attention.v", "attention.qkv") else 0


def _houlsby(shape: Shape, options: Options) -> int:
    norms = shape.groups["norms"] + shape.norm_biases
    return 2 * _bottlenecks(shape) + norms


def _bottlenecks(shape: Shape, options: Options | None = None) -> int:
    """One in each block, a sixteenth of the hidden size wide."""
    wide, thin = shape.hidden, max(1, shape.hidden // 16)
    return shape.layers * (2 * wide * thin + wide + thin)


def _prompt(shape: Shape, options: Options) -> int:
    return int(options["length"] * shape.hidden)


def _prefix(shape: Shape, options: Options) -> int:
    """The network that makes the prefix, as wide inside as ``hidden_size``."""
    width, hidden = shape.kv_heads * shape.head_size, options["hidden_size"]
    return int(options["length"] * width + (width + 1) * hidden + (hidden + 1) * shape.keys_and_values)


def _prefix_saved(shape: Shape, options: Options) -> int:
    return int(options["length"] * shape.keys_and_values)


_LORA: Options = {"rank": 16}
FAMILIES: dict[str, Family] = {
    "full": Family(_full, 5e-5, folder="model", within=True),
    "partial": Family(_partial, 5e-5, reaches=0.5, within=True),
    "bitfit": Family(_bitfit, 2e-3, keeps_inputs=False, within=True),
    "lora": Family(_lora, 2e-4, _LORA),
    "dora": Family(_dora, 2e-4, _LORA, keeps_outputs=True, pace=1.3),
    "qlora": Family(_lora, 2e-4, _LORA, base_bytes=_NF4, pace=1.5),
    "ia3": Family(_ia3, 1e-2, keeps_inputs=False, keeps_outputs=True),
    "houlsby": Family(_houlsby, 1e-3, keeps_inputs=False),
    "pfeiffer": Family(_bottlenecks, 1e-3, keeps_inputs=False),
    "prompt": Family(_prompt, 0.1, {"length": 20}, keeps_inputs=False),
    "prefix": Family(
        _prefix, 1e-3, {"length": 10, "hidden_size": 512}, saved=_prefix_saved, keeps_inputs=False
    ),
    "multi_task": Family(_multi_task, 2e-4, {"rank": 8, "tasks": ()}, pace=1.2),
}  # fmt: skip
"""Paces: qlora by lit-gpt's table of Llama 2 7B (3.68 against 2.36 minutes), dora by docs/methods.md (0.73 to 0.82 of
LoRA's tokens a second)."""


def count(method: str, shape: Shape, options: Options) -> int:
    """Trainable parameters with these options over the method's defaults."""
    family = FAMILIES[method]
    return family.count(shape, {**family.options, **options})


def saved_bytes(method: str, shape: Shape, options: Options, precision: str) -> int:
    """Bytes of the artifact: numbers are written as they are held."""
    family = FAMILIES[method]
    numbers = (family.saved or family.count)(shape, {**family.options, **options})
    return numbers * (2 if precision == "bf16" else 4)
