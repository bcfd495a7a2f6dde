"""A config alone says how many parameters a model has, to the last one."""

import json
from pathlib import Path
from typing import Any

import pytest

from tunewright.advise import configs
from tunewright.advise.shape import Shape
from tunewright.core.errors import ModelError

SMALL: dict[str, dict[str, Any]] = {
    "Llama": {"num_hidden_layers": 3, "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 8},
    "Mistral": {"num_hidden_layers": 2},
    "Qwen2": {"num_hidden_layers": 2, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "Qwen3": {"num_hidden_layers": 2, "num_key_value_heads": 8},
    "GPT2": {"n_layer": 3},
    "GPTNeo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "Mixtral": {"num_hidden_layers": 2},
    "Qwen2Moe": {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
    "Qwen3Moe": {"num_hidden_layers": 3, "mlp_only_layers": [0]},
}


def outline(name: str, changes: dict[str, Any]) -> Any:
    import torch
    import transformers

    with torch.device("meta"):
        config = getattr(transformers, f"{name}Config")(**changes)
        return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", SMALL)
def test_counts_are_those_of_the_model_itself(name: str) -> None:
    model = outline(name, SMALL[name])
    shape = configs.from_config(model.config.to_dict(), name)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    biases = sum(p.numel() for n, p in model.named_parameters() if n.endswith("bias"))
    assert shape.groups["biases"] == biases
    inside = sum(p.numel() for n, p in model.named_parameters() if ".layers." in n or ".h." in n)
    assert shape.blocks == inside


@pytest.mark.parametrize("name", SMALL)
def test_linear_layers_are_those_that_adapters_reach(name: str) -> None:
    from tunewright.models import anatomy

    model = outline(name, SMALL[name])
    shape = configs.from_config(model.config.to_dict(), name)
    found = sorted((n.inputs, n.outputs, n.has_bias) for n in anatomy.linears(model))
    own = sorted((n.inputs, n.outputs, n.bias) for n in shape.linears for _ in range(n.count))
    assert own == found


@pytest.mark.parametrize(
    ("name", "published"),
    [("llama-2-7b", 6_738_415_616), ("llama-2-13b", 13_015_864_320), ("llama-2-70b", 68_976_648_192),
     ("llama-3-8b", 8_030_261_248), ("llama-3-70b", 70_553_706_496), ("mistral-7b", 7_241_732_096),
     ("mixtral-8x7b", 46_702_792_704), ("qwen2.5-0.5b", 494_032_768), ("qwen2.5-7b", 7_615_616_512),
     ("qwen2.5-72b", 72_706_203_648), ("smollm2-135m", 134_515_008), ("gpt2", 124_439_808)],
)  # fmt: skip
def test_named_shapes_have_the_parameters_of_their_published_weights(name: str, published: int) -> None:
    assert configs.named(name).parameters == published


def test_of_a_mixture_a_token_meets_two_experts() -> None:
    shape = configs.named("mixtral-8x7b")
    assert shape.active == pytest.approx(12.9e9, rel=0.01)  # Jiang et al. 2024, arXiv:2401.04088
    assert shape.multiplied < shape.active


def test_the_built_in_model_is_found_by_name() -> None:
    shape = configs.find("builtin:pico")
    assert (shape.kind, shape.layers, shape.tied) == ("llama", 6, True)
    assert shape.parameters == 5_475_584


def test_a_folder_needs_no_more_than_its_config(tmp_path: Path) -> None:
    config = {
        "model_type": "gpt2",
        "n_embd": 8,
        "n_layer": 1,
        "n_head": 2,
        "n_positions": 16,
        "vocab_size": 32,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert isinstance(configs.find(str(tmp_path)), Shape)


@pytest.mark.parametrize(
    ("model", "told"),
    [("shape:llama-2-7", "did you mean 'llama-2-7b'"), ("builtin:pica", "did you mean 'pico'"),
     ("nobody/nothing", "neither a folder"), ("a b c", "neither a folder")],
)  # fmt: skip
def test_what_is_not_there_is_told(model: str, told: str) -> None:
    with pytest.raises(ModelError, match=told):
        configs.find(model)


def test_an_unknown_kind_names_those_that_are_known() -> None:
    with pytest.raises(ModelError, match=r"model_type 'bloom'.*gpt2, gpt_neo, llama"):
        configs.from_config({"model_type": "bloom"}, "bloom")


def test_all_missing_sizes_are_told_at_once() -> None:
    with pytest.raises(ModelError) as caught:
        configs.from_config({"model_type": "llama", "hidden_size": -1, "vocab_size": True}, "odd")
    assert len(caught.value.problems) == 5


@pytest.mark.parametrize("text", ["{", "[]", "x" * (2 << 20)])
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError):
        configs.find(str(tmp_path))


@pytest.mark.parametrize(
    "changes",
    [{"num_hidden_layers": 1 << 31}, {"head_dim": "wide"}, {"num_key_value_heads": 2.5}, {"mlp_only_layers": 3},
     {"hidden_size": True}, {"max_position_embeddings": [1]}, {"vocab_size": 1 << 40}],
)  # fmt: skip
def test_sizes_that_no_model_has_are_refused(changes: dict[str, Any]) -> None:
    good = configs.table("shapes.yaml")["llama-2-7b"]["config"]
    with pytest.raises(ModelError, match=next(iter(changes))):
        configs.from_config({**good, **changes}, "odd")
