"""Tiny models of every kind of transformer that the methods meet, as Hugging Face folders with random weights."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tunewright.models.load import BUILTIN

CONTEXT = 256
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_LLAMA = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2, "max_position_embeddings": CONTEXT}  # fmt: skip
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT,
         "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # fmt: skip
_GPT_NEO = {"hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "num_heads": 4,
            "max_position_embeddings": CONTEXT, "attention_types": [[["global", "local"], 1]]}  # fmt: skip
_MIXTURE = {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False}

Maker = Callable[..., Any]
ARCHITECTURES: dict[str, Maker] = {
    "llama": lambda **own: LlamaForCausalLM(LlamaConfig(**_LLAMA, tie_word_embeddings=True, **own)),
    "llama-untied": lambda **own: LlamaForCausalLM(LlamaConfig(**_LLAMA, tie_word_embeddings=False, **own)),
    "gpt2": lambda **own: GPT2LMHeadModel(GPT2Config(**_GPT2, **own)),
    "gpt-neo": lambda **own: GPTNeoForCausalLM(GPTNeoConfig(**_GPT_NEO, **own)),
    "qwen2": lambda **own: Qwen2ForCausalLM(Qwen2Config(**_LLAMA, tie_word_embeddings=True, **own)),
    "mixtral": lambda **own: MixtralForCausalLM(MixtralConfig(**_MIXTURE, **own)),
}
"""Grouped queries with and without tied embeddings, Conv1D layers, layers without biases beside such with,
biases in attention, a mixture of experts.
"""


def save_all(folder: Path) -> dict[str, Path]:
    """Each architecture's folder under ``folder``, with the built-in tokenizer."""
    return {name: _save(folder / name, make) for name, make in ARCHITECTURES.items()}


def _save(folder: Path, make: Maker) -> Path:
    add_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    model = make(
        vocab_size=len(tokenizer), initializer_range=0.1, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    for bias in _biases(model):
        torch.nn.init.normal_(bias, std=0.1)  # at zero they would hide that one was left out
    model.save_pretrained(folder)
    return folder


def add_tokenizer(folder: Path) -> None:
    """Put the built-in tokenizer into a model's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in _TOKENIZER:
        shutil.copy(BUILTIN["pico"] / name, folder)


def _biases(model: Any) -> Iterator[torch.Tensor]:
    return (parameter for name, parameter in model.named_parameters() if name.endswith("bias"))
