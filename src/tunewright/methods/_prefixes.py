"""The base of prefix methods: keys and values are trained that stand before those of every layer."""

import inspect
from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from tunewright.core.errors import ModelError, Problem
from tunewright.methods._prompts import PromptConfig, PromptMethod, common_tokens, fill, too_long
from tunewright.models import anatomy

CACHES = ("past_key_values", "layer_past")
"""What decoder layers call the argument that brings keys and values."""
_PLAIN_LAYERS = {"full_attention", "sliding_attention"}


class Shape(NamedTuple):
    """Of what a model keeps for each token: key and value of every layer."""

    layers: int
    heads: int
    head_size: int

    @property
    def numbers(self) -> int:
        """Numbers for one token in all layers."""
        return 2 * self.layers * self.heads * self.head_size


class PrefixConfig(PromptConfig):
    """How long the prefix is and what makes it."""

    projection: bool = False
    """Train a small network that makes the prefix, and not the prefix itself. Then it starts at random, else
    from the keys and values of real tokens."""
    hidden_size: int = Field(512, ge=1)
    """Width of that network."""


class PrefixMethod(PromptMethod):
    """Keys and values before those of every layer."""

    saves = "PREFIX_TUNING"

    @classmethod
    def width(cls, model: Any) -> int:
        """Keys and values of all layers for one virtual token."""
        return shape(model).numbers

    @classmethod
    def unfit(cls, model: Any, length: int) -> list[Problem]:
        """Layers that take no keys and values, or cannot see as far back as the whole prefix."""
        found = []
        odd = [f"{name} is no layer" for name, block in anatomy.blocks(model) if not _takes_prefix(block)]
        kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - _PLAIN_LAYERS
        odd += [f"{kind} is no attention" for kind in sorted(kinds)]
        if odd:
            what = f"{model.config.model_type}: {odd[0]} that a prefix can stand before"
            found.append(Problem("method", what, "use method: prompt, or lora"))
        if length >= (sight := window(model)):
            what = f"a prefix of {length} is out of sight: a layer looks back {sight} tokens"
            found.append(Problem("method.length", what, "use a shorter one"))
        return found + too_long(model, length)

    @classmethod
    def finished(cls, model: Any, length: int) -> Any:
        """A prefix without a network."""
        return _peft_config(model, length, inference_mode=True)

    def peft_config(self, model: Any) -> Any:
        """PEFT's PrefixTuningConfig."""
        return _peft_config(
            model, self.config.length,
            prefix_projection=self.config.projection, encoder_hidden_size=self.config.hidden_size,
        )  # fmt: skip

    def count(self, model: Any) -> int:
        """The prefix, or the network that makes it from embeddings as wide as a layer's keys."""
        _, heads, head_size = shape(model)
        width, whole, hidden = heads * head_size, shape(model).numbers, self.config.hidden_size
        if not self.config.projection:
            return int(self.config.length * whole)
        return int(self.config.length * width + (width + 1) * hidden + (hidden + 1) * whole)

    def inject(self, model: Any) -> Any:
        """The prefix starts from what the model itself keeps of real tokens, unless a network makes it."""
        start = _kept(model, common_tokens(model, self.config.length))
        adapted = super().inject(model)
        if not self.config.projection:
            fill(adapted, start)
        return adapted


def shape(model: Any) -> Shape:
    """Of keys and values; under grouped-query attention there are fewer heads than for queries."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shape(len(anatomy.blocks(model)), int(heads), int(head_size))


def window(model: Any) -> int:
    """How many tokens back the layer with the shortest sight looks; 2^30 without a limit."""
    config = model.config.get_text_config()
    slides = getattr(config, "use_sliding_window", True)
    sliding = getattr(config, "sliding_window", None) if slides else None
    local = config.window_size if "local" in getattr(config, "attention_layers", ()) else None  # GPT-Neo
    return min(sliding or 1 << 30, local or 1 << 30)


def _takes_prefix(block: Any) -> bool:
    has_cache = bool({*CACHES} & {*inspect.signature(block.forward).parameters})
    return has_cache and anatomy.attention(block) is not None


def _peft_config(model: Any, length: int, **more: Any) -> Any:
    from peft import PrefixTuningConfig

    layers, heads, head_size = shape(model)
    return PrefixTuningConfig(
        num_virtual_tokens=length, num_layers=layers, num_attention_heads=heads,
        token_dim=heads * head_size, task_type="CAUSAL_LM", **more,
    )  # fmt: skip


@torch.no_grad()
def _kept(model: Any, ids_P: Tensor) -> Tensor:
    """Keys and values [P, width] of these tokens at the beginning of a text, laid out as PEFT has them."""
    was_training = model.training
    cache = model.eval()(input_ids=ids_P[None], use_cache=True).past_key_values
    model.train(was_training)
    states = [states for layer in cache.layers for states in (layer.keys, layer.values)]
    layers, heads, head_size = shape(model)
    expected = (1, heads, len(ids_P), head_size)
    if len(states) != 2 * layers or any(tuple(s.shape) != expected for s in states):
        what = f"{model.config.model_type} keeps keys and values in another shape than PEFT's prefixes have"
        raise ModelError(Problem("method", what, "use method: prompt, or lora"))
    return torch.cat(states).permute(2, 0, 1, 3).reshape(len(ids_P), -1)
