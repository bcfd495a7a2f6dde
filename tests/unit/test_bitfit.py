"""BitFit against the paper's counts, with biases that an architecture has and with such that were added."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training import MakeTrainer
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    LlamaConfig,
    MixtralConfig,
    PhiConfig,
    Qwen2Config,
)

from tunewright.core.errors import ModelError
from tunewright.methods.bitfit import BitFit, Config

IDS = torch.tensor([[5, 77, 30, 9, 4, 42]])
SMALL = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "eos_token_id": None, "bos_token_id": None, "pad_token_id": None}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 2}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**GROUPED),
    "gpt2": GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None),
    "gpt-neo": GPTNeoConfig(
        vocab_size=97, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global"], 2]],
        bos_token_id=None, eos_token_id=None,
    ),
    "qwen2": Qwen2Config(**GROUPED),
    "mixtral": MixtralConfig(**GROUPED, num_local_experts=4),
    "phi": PhiConfig(**SMALL),
}  # fmt: skip
every_model = pytest.mark.parametrize("kind", CONFIGS)


def build(kind: str) -> Any:
    torch.manual_seed(0)
    dtype = torch.float32 if kind == "mixtral" else torch.float64  # fused experts have no other kernel
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[kind]), dtype=dtype).eval()


def bitfit() -> BitFit:
    return BitFit(Config())


def trained(kind: str) -> Any:
    """The model with all biases moved."""
    model = bitfit().apply(build(kind))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


# What is trained


@pytest.mark.parametrize(
    ("shape", "blocks", "percent"), [({}, 12, 0.09), ({"hidden_size": 1024, "num_hidden_layers": 24,
     "num_attention_heads": 16, "intermediate_size": 4096}, 24, 0.08)], ids=["base", "large"],
)  # fmt: skip
def test_it_trains_the_papers_share_of_bert(shape: dict[str, int], blocks: int, percent: float) -> None:
    config = BertConfig(**shape)
    with torch.device("meta"):
        model = BertModel(config)
    d, m = config.hidden_size, config.intermediate_size
    block = 3 * d + d + m + d + 2 * d  # q, k, v; output; two layers of the feed-forward; two normalisations
    found = bitfit().count(model)
    assert found == blocks * block + d + d  # the embeddings' normalisation and the pooler
    assert round(100 * found / sum(p.numel() for p in model.parameters()), 2) == percent


def test_gpt2_has_all_biases_already() -> None:
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
    assert bitfit().count(model) == 12 * (3 * 768 + 768 + 4 * 768 + 768 + 2 * 768) + 768 == 102_144
    assert bitfit().report(bitfit().apply(model)) == {
        "biases": 12 * 6 + 1, "added_biases": 0, "added_parameters": 0,
    }  # fmt: skip


@every_model
def test_biases_are_trained_and_nothing_else(kind: str) -> None:
    base = build(kind)
    before, expected = logits(base), bitfit().count(base)
    model = bitfit().apply(base)
    torch.testing.assert_close(logits(model), before)
    names = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in names.values()) == expected
    assert all(name.endswith("bias") for name in names)
    assert not [n for n, p in model.named_parameters() if n.endswith("bias") and not p.requires_grad]


@pytest.mark.parametrize(
    ("kind", "biases", "added"),
    [
        ("llama", 2 * 7, 2 * 7),
        ("gpt2", 2 * 6 + 1, 0),
        ("gpt-neo", 2 * (4 + 2 + 2) + 1, 2 * 3),  # q, k, v have none
        ("qwen2", 2 * 7, 2 * 4),  # the output projection and the feed-forward have none
        ("mixtral", 2 * 4, 2 * 4),  # experts are fused: no layers to add one to
        ("phi", 2 * 7 + 1 + 1, 0),  # the head's too
    ],
)
def test_it_says_what_was_added(kind: str, biases: int, added: int) -> None:
    report = bitfit().report(bitfit().apply(build(kind)))
    assert (report["biases"], report["added_biases"]) == (biases, added)
    base = build(kind)
    present = sum(p.numel() for n, p in base.named_parameters() if n.endswith("bias"))
    assert report["added_parameters"] == bitfit().count(base) - present


def test_an_added_biass_gradient_is_the_sum_of_its_outputs() -> None:
    model, seen = bitfit().apply(build("llama")), []
    layer = model.model.layers[0].mlp.up_proj
    layer.register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs[0]))
    model(input_ids=IDS, labels=IDS).loss.backward()
    torch.testing.assert_close(layer.bias.grad, seen[0].sum(dim=(0, 1)))
    assert layer.weight.grad is None


def test_added_biases_have_the_dtype_of_the_weights(make_model: Any) -> None:
    model = bitfit().apply(make_model("bf16"))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


# Merging


@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi"])
def test_what_the_architecture_can_have_merges_into_a_plain_model(kind: str, tmp_path: Path) -> None:
    model = trained(kind)
    expected = logits(model)
    assert BitFit.keeps_apart(build(kind)) is None
    merged = BitFit.merge(model)
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(logits(again), expected)
    assert not torch.allclose(logits(build(kind)), expected)
    if kind == "llama":
        assert again.config.attention_bias
        assert again.config.mlp_bias


@pytest.mark.parametrize("kind", ["gpt-neo", "qwen2", "mixtral"])
def test_what_it_cannot_have_is_refused_with_the_reason(kind: str) -> None:
    model = trained(kind)
    reason = BitFit.keeps_apart(model)
    assert reason is not None
    assert reason == BitFit.keeps_apart(build(kind))  # known before training
    with pytest.raises(ModelError, match=r"biases were added .* no option of it"):
        BitFit.merge(model)


def test_a_bases_config_is_left_alone_until_it_is_merged() -> None:
    model = trained("llama")
    bitfit().report(model)
    BitFit.keeps_apart(model)
    assert not model.config.attention_bias


# Saving


def test_it_saves_biases_only_and_finds_them_again(
    make_trainer: MakeTrainer, make_model: Any, tmp_path: Path
) -> None:
    trainer = make_trainer(method="bitfit", lr=0.02, max_steps=3)
    trainer.run()
    trainer.method.export(trainer.model, tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == 2 * 7
    assert all(name.endswith(".bias") and tensor.any() for name, tensor in saved.items())
    again = BitFit.load(make_model(), tmp_path).eval()
    torch.testing.assert_close(logits(again), logits(trainer.model.eval()), atol=0, rtol=0)
