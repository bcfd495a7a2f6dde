"""The size of a model, from its config alone: parameters by group, linear layers, and what a token makes it compute.

No weight is read and nothing heavy is imported. Counts are exact: a test compares them with transformers' own models.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from tunewright.core.units import human_count


@dataclass(frozen=True)
class Linear:
    """A kind of linear layer: ``count`` of them in the whole model, each with ``outputs`` x ``inputs`` weights."""

    name: str
    inputs: int
    outputs: int
    count: int
    bias: bool = False

    @property
    def weights(self) -> int:
        """Numbers of all of them, without biases."""
        return self.inputs * self.outputs * self.count


@dataclass(frozen=True)
class Experts:
    """A mixture's feed-forward layers: ``each`` experts of width ``inner`` in some blocks, ``active`` for a token.

    transformers holds them as three-dimensional weights, which are no linear layers: adapters leave them alone.
    """

    each: int
    active: int
    inner: int
    blocks: tuple[int, ...]
    """Numbers of the blocks that have them; the others are dense."""

    @property
    def layers(self) -> int:
        """How many blocks have them."""
        return len(self.blocks)


@dataclass(frozen=True)
class Shape:
    """What a config says of a decoder."""

    name: str
    kind: str
    """``model_type``."""
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    inner: int
    """Width of a dense feed-forward layer."""
    vocabulary: int
    context: int
    """Most tokens in a sequence."""
    tied: bool
    """Whether the output head is the embedding."""
    linears: tuple[Linear, ...]
    """All but the output head."""
    positions: int = 0
    """Learned position embeddings."""
    experts: Experts | None = None
    gated: bool = True
    """Whether feed-forward layers multiply by a gate, as in SwiGLU."""
    layer_norm: bool = False
    """Whether normalisations have biases beside their weights."""
    head_norms: bool = False
    """Whether queries and keys of each head are normalised."""
    packed: bool = False
    """Whether one layer makes queries, keys and values."""

    @cached_property
    def groups(self) -> Mapping[str, int]:
        """Parameters by group; tied ones once."""
        names = {n.name: n for n in self.linears}
        attention = [n for n in names.values() if n.name.startswith("attention.")]
        norms = self.hidden * (2 * self.layers + 1) + self.layers * 2 * self.head_size * self.head_norms
        return {
            "embedding": self.vocabulary * self.hidden + self.positions * self.hidden,
            "head": 0 if self.tied else self.vocabulary * self.hidden,
            "attention": sum(n.weights for n in attention),
            "mlp": sum(n.weights for n in names.values()) - sum(n.weights for n in attention),
            "experts": self._experts(self.experts.each) if self.experts else 0,
            "router": self.experts.each * self.hidden * self.experts.layers if self.experts else 0,
            "norms": norms,
            "biases": sum(n.outputs * n.count for n in self.linears if n.bias) + self.norm_biases,
        }  # fmt: skip

    def _experts(self, number: int) -> int:
        """Weights of so many experts in each block that has any."""
        own = self.experts
        return (3 if self.gated else 2) * self.hidden * own.inner * number * own.layers if own else 0

    @property
    def norm_biases(self) -> int:
        """Numbers of all normalisations' biases."""
        return self.hidden * (2 * self.layers + 1) * self.layer_norm

    @cached_property
    def parameters(self) -> int:
        """All of them; tied ones once."""
        return sum(self.groups.values())

    @property
    def active(self) -> int:
        """Parameters that a token meets: of a mixture's experts those that it is sent to."""
        return (
            self.parameters
            - self.groups["experts"]
            + self._experts(self.experts.active if self.experts else 0)
        )

    @property
    def multiplied(self) -> int:
        """Weights that a token is multiplied by, two operations each: all active ones but looked-up embeddings and
        vectors, and the output head.
        """
        inside = self.groups["attention"] + self.groups["mlp"] + self.groups["router"]
        return (
            inside + self._experts(self.experts.active if self.experts else 0) + self.vocabulary * self.hidden
        )

    def block(self, number: int) -> int:
        """Parameters of one block, the first is 0."""
        own = self.experts
        sparse = bool(own and number in own.blocks)
        absent = "mlp." if sparse else "shared."
        linears = (n for n in self.linears if not n.name.startswith(absent))
        norms = 2 * self.hidden * (1 + self.layer_norm) + 2 * self.head_size * self.head_norms
        mixed = self._experts(own.each) // own.layers + own.each * self.hidden if own and sparse else 0
        return sum(n.outputs * (n.inputs + n.bias) for n in linears) + norms + mixed

    @property
    def blocks(self) -> int:
        """Parameters of all blocks together."""
        return sum(map(self.block, range(self.layers)))

    @property
    def keys_and_values(self) -> int:
        """Numbers that attention keeps of each token."""
        return 2 * self.layers * self.kv_heads * self.head_size

    def __str__(self) -> str:
        told = f"{self.name}: {human_count(self.parameters)} parameters"
        return told + (f", {human_count(self.active)} for a token" if self.experts else "")
