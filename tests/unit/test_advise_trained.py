"""What the advisor says that a method trains is what the method itself says of the model."""

from functools import cache
from typing import Any

import pytest

from tunewright import methods
from tunewright.advise import configs, trained
from tunewright.catalogue import default_config

SHAPES: dict[str, dict[str, Any]] = {
    "Llama": {"num_hidden_layers": 5, "num_key_value_heads": 8},
    "GPT2": {"n_layer": 3},
    "Qwen2": {"num_hidden_layers": 2, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "Mixtral": {"num_hidden_layers": 2},
    "Qwen2Moe": {"num_hidden_layers": 2, "mlp_only_layers": [0]},
}


@cache
def outline(name: str) -> Any:
    import torch
    import transformers

    with torch.device("meta"):
        config = getattr(transformers, f"{name}Config")(**SHAPES[name])
        return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("method", trained.FAMILIES)
@pytest.mark.parametrize("name", SHAPES)
def test_as_many_parameters_as_the_method_counts(name: str, method: str) -> None:
    model = outline(name)
    shape = configs.from_config(model.config.to_dict(), name)
    own = methods.kind(method)(default_config(method))
    assert not own.problems(model)
    assert trained.count(method, shape, {}) == own.count(model)


@pytest.mark.parametrize("method", trained.FAMILIES)
def test_rates_folders_and_options_are_those_of_the_method(method: str) -> None:
    kind, family = methods.kind(method), trained.FAMILIES[method]
    config = default_config(method)
    assert (family.lr, family.folder) == (kind.default_lr, kind.folder)
    assert family.base_bytes == (kind(config).base_bytes if method == "qlora" else None)
    same = {key: getattr(config, key) for key in family.options if key != "tasks"}
    assert {key: value for key, value in family.options.items() if key != "tasks"} == same


def test_a_rank_may_be_given() -> None:
    shape = configs.named("llama-2-7b")
    assert trained.count("lora", shape, {"rank": 8}) * 2 == trained.count("lora", shape, {}) == 39_976_960


def test_of_a_prefix_only_the_prefix_is_saved() -> None:
    shape = configs.named("llama-2-7b")
    assert trained.saved_bytes("prefix", shape, {}, "bf16") == 2 * 10 * shape.keys_and_values
    assert trained.saved_bytes("full", shape, {}, "fp32") == 4 * shape.parameters
