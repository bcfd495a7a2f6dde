"""LoRA layers of one input as one product: which they are, that nothing changes, and that no trace is left."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from techniques import SHAPE, VOCABULARY, assert_near, batch, learn, watched, work
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tunewright import methods
from tunewright.fast import lora_linear
from tunewright.fast.lora_linear import LoraLinear
from tunewright.fast.process import mapped_files
from tunewright.models import anatomy, likelihood
from tunewright.models.load import find, load_model
from tunewright.recipes import plugin_config

OURS = "tunewright::lora"
ALL = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}


def llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(**SHAPE))


def qwen2() -> Any:
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)  # at zero they would hide that one was left out
    return model


def gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64))


def adapted(make: Callable[[], Any] = llama, **config: Any) -> Any:
    """The base with random adapters of rank 4 on all linear layers, if nothing else is said."""
    torch.manual_seed(0)
    given = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, **ALL, **config}
    return get_peft_model(make(), LoraConfig(**given), autocast_adapter_dtype=False).train()


def found(model: Any) -> list[list[str]]:
    """The groups by the layers' own names, block after block."""
    names = {module: name.rpartition(".")[2] for name, module in model.named_modules()}
    return [[names[layer] for layer in group] for group in lora_linear._together(work(model))]


BLOCK = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
SOME = {
    "all": ({}, BLOCK),
    "q and v": ({"target_modules": ["q_proj", "v_proj"]}, [["q_proj", "v_proj"]]),
    "o and up": ({"target_modules": ["o_proj", "up_proj"]}, [["o_proj"], ["up_proj"]]),
}


@pytest.mark.parametrize("kind", SOME)
def test_layers_of_one_input_are_a_group(kind: str) -> None:
    config, groups = SOME[kind]
    assert found(adapted(**config)) == groups * 2


def test_a_layer_that_is_not_plain_is_left_out_of_its_group() -> None:
    model = adapted()
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Linear) and layer.bias is None and layer.out_features == 48:
                layer.weight.requires_grad_(True)  # gate and up
    assert found(model) == [BLOCK[0], BLOCK[1], BLOCK[3]] * 2


PATTERNS = {"rank_pattern": {"k_proj": 1, "gate_proj": 9}, "alpha_pattern": {"v_proj": 0.3, "up_proj": 20}}
SAME: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "plain": (llama, {}),
    "rslora": (llama, {"use_rslora": True}),
    "patterns": (llama, PATTERNS),
    "biases": (qwen2, PATTERNS),
    "rank one": (llama, {"r": 1}),
    "dora": (llama, {"use_dora": True}),
    "dora with biases": (qwen2, {"use_dora": True, "use_rslora": True, **PATTERNS}),
    "a rank over the width": (llama, {"r": 60}),
    "the head": (llama, {"target_modules": ["q_proj", "lm_head"]}),
    "the last block": (llama, {"layers_to_transform": [1]}),
    "trained biases": (qwen2, {"bias": "all"}),
}


@pytest.mark.parametrize("kind", SAME)
def test_losses_and_gradients_are_the_same(kind: str) -> None:
    """In float64, where what is left is the rounding of the losses themselves."""
    make, config = SAME[kind]
    model, given = adapted(make, **config).double(), batch(20, 9)
    plain = learn(model, given)
    assert LoraLinear().why_not(work(model)) == ""
    with LoraLinear().on(work(model)):
        with watched() as seen:
            own = learn(model, given)
        assert seen.called.count(OURS) == len(found(model.eval()))
    assert_near(own, plain, 2e-6)


def test_only_b_is_trained_as_in_lora_fa() -> None:
    model, given = adapted(), batch(20, 9)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    plain = learn(model, given)
    with LoraLinear().on(work(model)):
        assert_near(learn(model, given), plain)


def with_dtype() -> Any:
    model = adapted().to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.float() if "lora_" in name else parameter.data
    return model


def merged() -> Any:
    model = adapted()
    model.merge_adapter()
    return model


def two_at_once() -> Any:
    model = adapted()
    model.add_adapter("other", LoraConfig(r=2, **ALL))
    model.base_model.set_adapter(["default", "other"])
    return model


def thawed() -> Any:
    return adapted().requires_grad_(True)


LEFT_ALONE = {
    "full": llama,
    "dropout": lambda: adapted(lora_dropout=0.1),
    "adapters with biases": lambda: adapted(qwen2, target_modules=["q_proj"], lora_bias=True),
    "conv1d": lambda: adapted(gpt2, target_modules="all-linear", fan_in_fan_out=True),
    "an embedding": lambda: adapted(target_modules=["embed_tokens"]),
    "merged": merged,
    "two at once": two_at_once,
    "another dtype": with_dtype,
    "trained bases": thawed,
}


@pytest.mark.parametrize("kind", LEFT_ALONE)
def test_all_else_is_left_alone(kind: str) -> None:
    model = LEFT_ALONE[kind]()
    assert LoraLinear().why_not(work(model)) == "no plain LoRA layers without dropout"
    with LoraLinear().on(work(model)):
        assert not [m for m in model.modules() if "forward" in vars(m)]


def test_the_adapter_in_use_counts_and_may_change_within() -> None:
    """The other one is of another rank, and not on every layer."""
    model, given = adapted(), batch(20, 9)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    expected = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        expected[name] = learn(model, given)
        assert LoraLinear().why_not(work(model)) == ""
    for first, second in (("default", "other"), ("other", "default")):
        model.set_adapter(first)
        with LoraLinear().on(work(model)):
            for name in (first, second, first):
                model.set_adapter(name)
                assert_near(learn(model, given), expected[name])


# While it is on


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=batch(20, 9)["input_ids"], use_cache=False).logits
    return result


WAYS: dict[str, Callable[[Any], Tensor]] = {
    "whole": logits,
    "without what is around the base": lambda model: logits(model.get_base_model()),
    "generated": lambda model: model.generate(
        input_ids=batch(6)["input_ids"], max_new_tokens=4, do_sample=False
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_adapters_that_moved_are_used_as_they_are(way: str) -> None:
    model = adapted()
    with LoraLinear().on(work(model)):
        before = WAYS[way](model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(-2.0)
        own = WAYS[way](model)
    torch.testing.assert_close(own, WAYS[way](model))
    assert not torch.equal(own, before)


def test_adapters_that_are_switched_off_are_off() -> None:
    """As where the model before training is the reference."""
    model, given = adapted(), batch(20, 9)
    with model.disable_adapter():
        plain = logits(model)
    expected = learn(model, given)
    with LoraLinear().on(work(model)):
        with model.disable_adapter():
            assert torch.equal(logits(model), plain)
        assert_near(learn(model, given), expected)


def test_merged_within_and_taken_apart_again() -> None:
    model, given = adapted(), batch(20, 9)
    plain = learn(model, given)
    with LoraLinear().on(work(model)):
        model.merge_adapter()
        torch.testing.assert_close(logits(model), logits(adapted()), rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
        assert_near(learn(model, given), plain, 1e-4)


def test_several_forward_passes_before_one_backward() -> None:
    """As of a chosen and a rejected answer."""
    model, given, other = adapted(), batch(20, 9), batch(11, 15, seed=1)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        parts = [likelihood.token_losses(model, b).mean() for b in (given, other)]
        (parts[0] * parts[1]).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain, none = gradients(), torch.zeros(1)
    with LoraLinear().on(work(model)):
        assert_near((none, gradients()), (none, plain))


def test_gradient_checkpointing_goes_with_it() -> None:
    model, given = adapted(), batch(20, 9)
    plain = learn(model, given)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    with LoraLinear().on(work(model)):
        for _ in range(2):
            with watched() as seen:
                assert_near(learn(model, given), plain)
            assert seen.called.count(OURS) == 2 * 8  # computed again once


def test_an_adapter_is_exported_the_same_within(tmp_path: Path) -> None:
    choice = {"name": "lora", "rank": 4}
    method = methods.create(choice, plugin_config("methods", choice))
    torch.manual_seed(0)
    model = method.apply(llama()).train()
    method.export(model, tmp_path / "before")
    with LoraLinear().on(work(model)):
        method.export(model, tmp_path / "within")
    method.export(model, tmp_path / "after")
    files = {path.name: path.read_bytes() for path in (tmp_path / "before").iterdir()}
    assert "adapter_model.safetensors" in files
    for folder in ("within", "after"):
        assert {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()} == files


# Afterwards


def assert_untouched(model: Any, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, value in after.items():
        assert torch.equal(value, before[name]), name
        assert value.is_contiguous(), name
        assert value.untyped_storage().nbytes() == value.nbytes, name
    assert not [m for m in model.modules() if "forward" in vars(m) or m._forward_pre_hooks]


@pytest.mark.parametrize("broken", [False, True])
def test_weights_are_as_before(broken: bool) -> None:
    """Equal, and not parts of a larger matrix, also after an error."""
    model = adapted(qwen2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        with LoraLinear().on(work(model)):
            learn(model, batch(20, 9))
            assert any(not value.is_contiguous() for value in model.state_dict().values())
            assert 1 // (not broken)
    except ZeroDivisionError:
        assert broken
    assert_untouched(model, before)


def test_a_layer_of_one_output_is_no_part_of_a_larger_matrix_either() -> None:
    torch.manual_seed(0)
    base = LlamaForSequenceClassification(LlamaConfig(**{**SHAPE, "pad_token_id": 0}, num_labels=1))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["score"]))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert len(model.base_model.model.score.base_layer.weight) == 1
    with LoraLinear().on(work(model)):
        assert "forward" in vars(model.base_model.model.score)
    assert_untouched(model, before)


@pytest.fixture
def from_a_file(tmp_path: Path) -> Any:
    """An adapted model whose weights are pages of a file."""
    llama().save_pretrained(tmp_path)
    return adapted(lambda: load_model(find(str(tmp_path)), "fp32"))


def places(model: Any) -> dict[str, int]:
    return {name: p.data_ptr() for name, p in model.named_parameters() if "base_layer" in name}


def test_weights_of_a_file_are_its_pages_again(from_a_file: Any) -> None:
    before = places(from_a_file)
    assert all(any(place in file for file in mapped_files()) for place in before.values())
    with LoraLinear().on(work(from_a_file)):
        copied = {name.split(".")[-3] for name, place in places(from_a_file).items() if place != before[name]}
        learn(from_a_file, batch(20, 9))
    assert copied == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}  # the others are alone
    assert places(from_a_file) == before


def test_what_was_merged_within_stays_merged(from_a_file: Any) -> None:
    plain = logits(from_a_file)
    with LoraLinear().on(work(from_a_file)):
        from_a_file.merge_adapter()
    torch.testing.assert_close(logits(from_a_file), plain, rtol=1e-4, atol=1e-4)
    from_a_file.unmerge_adapter()
    torch.testing.assert_close(logits(from_a_file), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings")
def test_tied_weights_stay_tied() -> None:
    model = adapted(lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True)),
                    target_modules=["q_proj", "lm_head"])  # fmt: skip
    plain = learn(model, batch(20, 9))
    with LoraLinear().on(work(model)):
        assert_near(learn(model, batch(20, 9)), plain)
    head, embeddings = anatomy.output_head(model), model.get_input_embeddings()
    assert head.base_layer.weight is embeddings.weight
    assert_near(learn(model, batch(20, 9)), plain, 0.0)
