"""The base of the prompt methods: numbers are trained that stand before the input; no weight changes."""

import inspect
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor

from tunewright.core.config import Config
from tunewright.core.errors import ModelError, Problem
from tunewright.core.words import Words
from tunewright.methods import _adapter
from tunewright.methods._peft import PeftMethod
from tunewright.models import files
from tunewright.models.generate import context_length

EMBEDDINGS = "prompt_embeddings"
"""The one tensor in PEFT's files of these methods: what a prompt encoder makes, not the encoder."""
KEEPS_APART = Words(
    "a prompt is input that was trained, not a change of weights", "提示是训练出来的输入，而不是权重的改变量"
)
_NUMBERS = ("F64", "F32", "F16", "BF16")
_COMMON = 5000
"""Tokens that a start is drawn from: the most frequent, which have the lowest ids (Lester et al. 2021)."""
_LEAST = 8
"""Tokens of the context that a prompt must leave; data.max_length cannot be less."""


class PromptConfig(Config):
    """How long the prompt is."""

    length: int = Field(20, ge=1)
    """Virtual tokens; each takes a position of the model's context."""


class PromptMethod(PeftMethod):
    """Virtual tokens before the embeddings of the input. A subclass gives PEFT's config and counts its encoder."""

    starts_equal = False

    @classmethod
    @abstractmethod
    def finished(cls, model: Any, length: int) -> Any:
        """PEFT's config of a trained prompt, which needs no encoder."""

    @classmethod
    def width(cls, model: Any) -> int:
        """Numbers for each virtual token in the file."""
        return int(model.get_input_embeddings().weight.shape[1])

    @classmethod
    def unfit(cls, model: Any, length: int) -> list[Problem]:
        """What speaks against a prompt of this length before this model, which may lie on ``meta``."""
        found = []
        takes_ids_alone = getattr(model.config.get_text_config(), "hidden_size_per_layer_input", 0)
        if takes_ids_alone or "inputs_embeds" not in inspect.signature(model.forward).parameters:
            what = f"{model.config.model_type} takes tokens only, and no embeddings of a prompt"
            found.append(Problem("method", what, "use method: prefix, or lora"))
        return found + too_long(model, length)

    def problems(self, model: Any) -> list[Problem]:
        """A model that no prompt can stand before, or none as long."""
        return self.unfit(model, self.config.length)

    def virtual_tokens(self) -> int:
        """The prompt's length."""
        return int(self.config.length)

    def inject(self, model: Any) -> Any:
        """PEFT's model with the prompt in the base's dtype: the optimizer holds fp32 masters of it."""
        return _prompted(model, self.peft_config(model))

    def saved(self, model: Any) -> int:
        """The prompt alone, whatever encoder makes it."""
        return self.virtual_tokens() * self.width(model.get_base_model())

    @classmethod
    def load(cls, base: Any, folder: Path) -> Any:
        """The base with the prompt before it; ModelError if the two do not fit.

        The shape of the weights says all there is to know: nothing is made or looked up as the config wants it.
        """
        length = cls._length(base, folder)
        if found := cls.unfit(base, length):
            raise ModelError(Problem(str(folder), problem.what, "name its own base") for problem in found)
        model = _prompted(base, cls.finished(base, length)).requires_grad_(False)
        fill(model, load_file(folder / _adapter.WEIGHTS)[EMBEDDINGS])
        return model.eval()

    @classmethod
    def _length(cls, base: Any, folder: Path) -> int:
        """Virtual tokens in the weights, which must be as many as the config says and as wide as the base needs."""
        told = _adapter.check(folder, (cls.saves,)).get("num_virtual_tokens")
        header, width = _adapter.header(folder), cls.width(base)
        found = header.get(EMBEDDINGS, {"shape": [], "dtype": ""})
        shape, numbers = found["shape"], found["dtype"] in _NUMBERS
        if len(header) != 1 or not numbers or len(shape) != 2 or shape[0] < 1 or shape[1] != width:
            what = f"holds {_shapes(header)}; expected {EMBEDDINGS} [length, {width}] for this base"
            files.refuse(folder / _adapter.WEIGHTS, what, "name its own base")
        if told != shape[0]:
            what = f"num_virtual_tokens is {told!r}, its weights have {shape[0]}"
            files.refuse(folder / _adapter.CONFIG, what)
        return int(shape[0])


def too_long(model: Any, length: int) -> list[Problem]:
    """A prompt that leaves hardly any of the context."""
    context = context_length(model)
    if length <= context - _LEAST:
        return []
    what = f"a prompt of {length} leaves no room in a context of {context} tokens"
    return [Problem("method.length", what, "use a shorter one")]


def _shapes(header: Mapping[str, Mapping[str, Any]]) -> str:
    some = [f"{name[:80]} {entry['shape']} {entry['dtype']}" for name, entry in sorted(header.items())[:3]]
    return ", ".join(some) + (" ..." if len(header) > 3 else "")


def _prompted(base: Any, config: Any) -> Any:
    """The base with a prompt as PEFT's config describes it."""
    from tunewright.methods._prompt_model import PromptModel

    config.base_model_name_or_path = str(base.config.name_or_path)
    return PromptModel(base, config)


@torch.no_grad()
def fill(model: Any, prompt_PD: Tensor) -> None:
    """Put these numbers [length, width] where the prompt's own are."""
    model.prompt_encoder[model.active_adapter].embedding.weight.copy_(prompt_PD)


def common_tokens(model: Any, length: int) -> Tensor:
    """Ids [length] drawn from the most frequent tokens."""
    weight = model.get_input_embeddings().weight
    return torch.randint(min(_COMMON, len(weight)), (length,)).to(weight.device)
