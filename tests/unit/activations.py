"""What the tests of techniques for activations share: models, a training pass, a count of what it keeps."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tunewright.fast import Portion, Work

LAYERS = 3
TOKENS = 512
_LLAMA = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": LAYERS,
          "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}  # fmt: skip
GPT2 = {"vocab_size": 64, "n_embd": 64, "n_layer": LAYERS, "n_head": 4, "n_positions": 128}
_LORA = {"r": 4, "lora_dropout": 0.1, "target_modules": "all-linear", "init_lora_weights": False}


def llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(**_LLAMA))


MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "gpt2 with dropout": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "lora with dropout": lambda: get_peft_model(llama(), LoraConfig(**_LORA)),
}


def make(kind: str = "llama") -> Any:
    """The same weights whenever it is called."""
    torch.manual_seed(0)
    return MODELS[kind]().train()


def work(model: Any, folder: Path) -> Work:
    portion = Portion(TOKENS, TOKENS, lambda tokens: 0.0, lambda tokens: None)
    return Work(model, 6, 6 * TOKENS, 2.0, lambda: iter([{"input_ids": tokens()}]), folder / "fast", portion)


def tokens() -> Tensor:
    """[4, 128]: a layer keeps more than 64 KiB of each activation."""
    return torch.randint(0, 64, (4, 128), generator=torch.Generator().manual_seed(1))


def learn(model: Any, rows: int = 4) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and all gradients of a training pass, always with the same dropout."""
    model.zero_grad()
    torch.manual_seed(7)
    ids_BT = tokens()[:rows]
    loss = model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]]) -> None:
    """Equal to the last bit."""
    (loss, gradients), (other_loss, other_gradients) = one, other
    assert torch.equal(loss, other_loss)
    assert gradients.keys() == other_gradients.keys()
    assert [n for n, gradient in gradients.items() if not torch.equal(gradient, other_gradients[n])] == []


@contextmanager
def counted(model: Any) -> Iterator[Callable[[], int]]:
    """``counted()`` is the bytes that were kept for backward passes within: of each storage, but for parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        address = x.untyped_storage().data_ptr()
        if address not in parameters:
            kept[address] = x.detach()  # its address is no other's as long as it is here
        return x.detach()

    with saved_tensors_hooks(keep, lambda x: x):
        yield lambda: sum(x.untyped_storage().nbytes() for x in kept.values())
