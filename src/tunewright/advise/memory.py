"""What training takes in memory, part by part, by closed formulas.

``Parts`` is the same for every way of predicting memory; the formulas here need a config and nothing else.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

from tunewright.advise import trained
from tunewright.advise.shape import Shape

LOGITS = 64 << 20
"""Bytes of logits that exist at a time: cross-entropy works on parts of the rows (see ``fast/cross_entropy.py``)."""
_PLAIN_LOGITS = 2 + 4 + 4
"""Bytes for each logit otherwise: bf16, its fp32 copy and the gradient of that."""
_MOMENTS = 8
"""AdamW's two fp32 moments of a number (Loshchilov & Hutter 2019, arXiv:1711.05101)."""
_ANSWER = 64
"""Tokens of an answer that is measured, by default."""
ON_POLICY = ("ppo", "grpo", "rloo")
"""Objectives that learn from the model's own answers."""


class Held(NamedTuple):
    """Bytes of a number under a precision."""

    weight: int
    gradient: int
    master: int
    activation: int


HELD = {"bf16": Held(2, 2, 4, 2), "fp32": Held(4, 4, 0, 4), "fp16": Held(4, 4, 0, 2)}
"""bf16: a rounded weight and its fp32 master, as in Micikevicius et al. 2018, arXiv:1710.03740; in fp32, and under an
fp16 autocast, the weight is its own master."""


@dataclass(frozen=True)
class Parts:
    """Bytes of a process, by what they hold."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    logits: float = 0.0
    cache: float = 0.0
    """The model before training, and keys and values of answers that are drawn."""
    evaluation: float = 0.0
    process: float = 0.0

    @property
    def total(self) -> float:
        """All together."""
        return float(sum(self.to_json().values()))

    def to_json(self) -> dict[str, int]:
        """Bytes by name."""
        return {part.name: round(getattr(self, part.name)) for part in fields(self)}

    def scaled(self, **by: float) -> "Parts":
        """Some parts multiplied."""
        return replace(self, **{name: getattr(self, name) * factor for name, factor in by.items()})


@dataclass(frozen=True)
class Choice:
    """A training as far as memory and time see it."""

    method: str
    objective: str = "sft"
    precision: str = "bf16"
    micro_tokens: int = 4096
    """In one forward pass of one device."""
    length: int = 1024
    """Of the longest row, in tokens."""
    checkpointing: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    """The method's own."""
    chunked: bool = True
    """Whether logits are made some rows at a time."""
    flash: bool = True
    """Whether attention keeps no scores."""
    dropout: bool = False
    """Whether masks of dropout are kept, as in the formulas of Korthikanti et al."""
    answers: int = 8
    """Drawn at a time by objectives that learn from them."""

    @property
    def family(self) -> trained.Family:
        """What is known of the method."""
        return trained.FAMILIES[self.method]


def estimate(shape: Shape, choice: Choice, process: float = 0.0) -> Parts:
    """Bytes on one device that holds everything; ``placement`` divides them.

    A bf16 parameter that is trained takes 2 + 4 + 8 + 2 bytes: weight, fp32 master, two moments, gradient, the 16
    bytes of Rajbhandari et al. 2020 (arXiv:1910.02054, section 3.1). One that is not takes its weight alone.
    """
    held, family = HELD[choice.precision], choice.family
    count = trained.count(choice.method, shape, choice.options)
    added = 0 if family.within else count
    if choice.method == "bitfit":
        added = count - shape.groups["biases"]
    parts = Parts(
        weights=_base(shape, choice) + held.weight * added,
        gradients=held.gradient * count,
        optimizer=(held.master + _MOMENTS) * count,
        activations=activations(shape, choice),
        logits=logits(shape, choice),
        cache=_reference(shape, choice, count) + _rollouts(shape, choice),
        process=process,
    )
    return replace(parts, evaluation=_evaluation(shape, choice, parts))


def _evaluation(shape: Shape, choice: Choice, parts: Parts) -> float:
    """What measuring takes of one row beyond what training has freed by then: its logits, or keys and values while it
    is answered. More rows are measured together only where there is room (see ``models/memory.py``).
    """
    held = HELD[choice.precision].activation
    answer = held * shape.keys_and_values * (choice.length + _ANSWER)
    measured = max(answer, choice.length * shape.vocabulary * _PLAIN_LOGITS)
    return max(0.0, measured - parts.activations - parts.logits - parts.gradients)


def _base(shape: Shape, choice: Choice) -> float:
    """The model's own weights. Quantized ones are those of linear layers: embedding, head, norms, biases and a
    mixture's experts stay as they are.
    """
    each, quantized = HELD[choice.precision].weight, choice.family.base_bytes
    if quantized is None:
        return float(each * shape.parameters)
    inside = sum(layer.weights for layer in shape.linears)
    return quantized * inside + each * (shape.parameters - inside)


def activations(shape: Shape, choice: Choice) -> float:
    """What the forward pass keeps for the backward pass, in bytes.

    Korthikanti et al. 2022, arXiv:2205.05198, section 4: ``s·b·h·(34 + 5·a·s/h)`` a layer for GPT. Here the sum is
    made from the shape, so that grouped keys, gates and experts count as they are: for GPT with dropout it is theirs.
    Attention in one kernel keeps no scores, which leaves ``34·s·b·h``. With checkpointing a block keeps its input,
    ``2·s·b·h``, and one block at a time has it all.
    """
    tokens, held = choice.micro_tokens, HELD[choice.precision].activation
    layers = shape.layers * choice.family.reaches
    block = tokens * block_bytes(shape, choice)
    if choice.checkpointing:
        return layers * tokens * held * shape.hidden + block
    return layers * block


def block_bytes(shape: Shape, choice: Choice) -> float:
    """Bytes that one block keeps of a token."""
    held, inputs, outputs = (
        HELD[choice.precision].activation,
        choice.family.keeps_inputs,
        choice.family.keeps_outputs,
    )
    wide, queries, keys = shape.hidden, shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    attention = wide + wide * inputs + 2 * queries + 2 * keys
    inner = _inner(shape)
    numbers = attention + wide + wide * inputs + (3 if shape.gated else 1) * inner + inner * inputs
    if outputs:
        numbers += sum(layer.outputs * layer.count for layer in shape.linears) / shape.layers
    masks = 2 * wide if choice.dropout else 0
    return held * numbers + masks + _scores(shape, choice)


def _inner(shape: Shape) -> float:
    """Width of the feed-forward layers that a token meets in a block, in the mean."""
    dense = sum(layer.outputs * layer.count for layer in shape.linears if layer.name.endswith(".up"))
    own = shape.experts
    return (dense + (own.inner * own.active * own.layers if own else 0)) / shape.layers


def _scores(shape: Shape, choice: Choice) -> float:
    """Softmax, its dropout's mask and output for each pair of positions: ``5·a·s`` a token, 2 without dropout."""
    if choice.flash:
        return 0.0
    return float((5 if choice.dropout else 2) * shape.heads * choice.length)


def logits(shape: Shape, choice: Choice) -> float:
    """Of the part of the rows that is worked on, or of all of them."""
    whole = choice.micro_tokens * shape.vocabulary * _PLAIN_LOGITS
    return float(min(whole, LOGITS) if choice.chunked else whole)


def _reference(shape: Shape, choice: Choice, count: int) -> float:
    """The weights before training of what is trained, which PPO's divergence is measured from.

    DPO keeps what the model said as numbers, and GRPO and RLOO ask for no such model: none of them holds another.
    """
    if choice.objective != "ppo" or not choice.family.within:
        return 0.0
    return float(HELD[choice.precision].weight * count)


def _rollouts(shape: Shape, choice: Choice) -> float:
    """Keys and values of the answers that are drawn at a time (Pope et al. 2022, arXiv:2211.05102, section 2.1)."""
    if choice.objective not in ON_POLICY:
        return 0.0
    held = HELD[choice.precision].activation
    return float(held * shape.keys_and_values * choice.length * choice.answers)


def layer_bytes(shape: Shape, choice: Choice) -> float:
    """Weights of one block, as gathered by ZeRO-3."""
    return HELD[choice.precision].weight * shape.blocks / shape.layers
