"""Partial fine-tuning: what is chosen, and that nothing else moves."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training import MakeTrainer, weights
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from tunewright.core.errors import ModelError
from tunewright.methods.partial import Config, Partial
from tunewright.models.load import find, outline

IDS = torch.tensor([[5, 77, 1030, 9, 4, 42]])
EMBEDDINGS = {"model.embed_tokens.weight"}


def partial(**options: Any) -> Partial:
    return Partial(Config(**options))


def block(model: Any, *numbers: int) -> set[str]:
    named = {i: f"model.layers.{i}." for i in numbers}
    return {n for n, _ in model.named_parameters() if any(n.startswith(start) for start in named.values())}


def trainable(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


# What is chosen


@pytest.mark.parametrize(
    ("options", "numbers", "more"),
    [
        ({}, (1,), set()),
        ({"last": 1}, (1,), set()),
        ({"last": 2}, (0, 1), set()),
        ({"last": 0, "embeddings": True}, (), EMBEDDINGS),
        ({"embeddings": True}, (1,), EMBEDDINGS),
        ({"layers": [0]}, (0,), set()),
        ({"layers": [0], "last": 1}, (0, 1), set()),
        ({"layers": [0], "patterns": ["model.norm.*"]}, (0,), {"model.norm.weight"}),
        ({"patterns": ["model.norm.weight"], "embeddings": True}, (), {"model.norm.weight", *EMBEDDINGS}),
        ({"patterns": ["lm_head.*"]}, (), EMBEDDINGS),  # tied: one weight, whichever of its names is given
    ],
    ids=str,
)
def test_choices_add_up(make_model: Any, options: Any, numbers: Any, more: set[str]) -> None:
    method, model = partial(**options), make_model()
    expected = block(model, *numbers) | more
    size = sum(p.numel() for n, p in model.named_parameters() if n in expected)
    assert method.count(model) == size > 0
    assert trainable(method.apply(model)) == expected


def test_a_pattern_is_for_whole_names(make_model: Any) -> None:
    model = make_model()
    found = set(partial(patterns=["*.layers.[0]*.self_attn.?_proj.weight"]).chosen(model))
    assert found == {f"model.layers.0.self_attn.{kind}_proj.weight" for kind in "qkvo"}
    assert partial(patterns=["self_attn"]).problems(model)


@pytest.mark.parametrize(("blocks", "first"), [(1, 0), (2, 1), (3, 1), (4, 2)])
def test_by_default_it_is_the_later_half(blocks: int, first: int) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_head=4, n_layer=blocks))
    chosen = partial().chosen(model)
    assert {int(name.split(".")[2]) for name in chosen} == set(range(first, blocks))


def test_the_count_is_told_from_shapes_alone(tiny_model_folder: Path, make_model: Any) -> None:
    shape = outline(find(str(tiny_model_folder)))
    for method in (partial(), partial(last=0, embeddings=True), partial(patterns=["lm_head.weight"])):
        assert method.problems(shape) == []
        assert method.count(shape) == method.count(make_model())


@pytest.mark.parametrize(
    ("options", "where", "what"),
    [
        ({"last": 3}, "method.last", "the model has 2 blocks"),
        ({"layers": [0, 2, 7]}, "method.layers", "there is no block 2"),
        (
            {"patterns": ["*norm*", "*.q_prj.*"]},
            "method.patterns",
            "no parameter has a name like '*.q_prj.*'",
        ),
        ({"last": 0}, "method", "nothing is chosen"),
    ],
)
def test_choices_that_hit_nothing_are_refused(make_model: Any, options: Any, where: str, what: str) -> None:
    found = partial(**options).problems(make_model())
    assert what in found[0].what
    assert {problem.where for problem in found} == {where}
    assert all(problem.fix for problem in found)
    with pytest.raises(ModelError):
        partial(**options).apply(make_model())


# Training


def test_gradients_are_those_of_full_fine_tuning(make_model: Any) -> None:
    whole, model = make_model().double(), partial().apply(make_model().double())
    for each in (whole, model):
        each(input_ids=IDS, labels=IDS).loss.backward()
    expected = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name].grad)
        else:
            assert parameter.grad is None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nothing_else_moves_or_is_saved(make_trainer: MakeTrainer, tmp_path: Path, precision: str) -> None:
    trainer = make_trainer(method="partial", precision=precision, lr=0.01, max_steps=3)
    before = weights(trainer)
    trainer.run()
    after = weights(trainer)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == block(trainer.model, 1)
    trainer.method.export(trainer.model, tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved.keys() == changed
    assert all(torch.equal(saved[name], after[name]) for name in saved)


# Saving


def test_tied_weights_are_saved_once_and_stay_tied(
    make_trainer: MakeTrainer, make_model: Any, tmp_path: Path
) -> None:
    trainer = make_trainer(method={"name": "partial", "embeddings": True}, lr=0.01, max_steps=2)
    trainer.run()
    trainer.method.export(trainer.model, tmp_path)
    assert sum("embed" in n or "head" in n for n in load_file(tmp_path / "adapter_model.safetensors")) == 1
    again = Partial.load(make_model(), tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    torch.testing.assert_close(logits(again), logits(trainer.model), atol=0, rtol=0)


def test_merged_it_is_the_model_itself(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(method="partial", lr=0.01, max_steps=2)
    trainer.run()
    merged = Partial.merge(trainer.model)
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again), logits(trainer.model), atol=0, rtol=0)


def test_the_file_must_fit_the_choice(make_model: Any, tmp_path: Path) -> None:
    partial(layers=[0]).export(partial(layers=[0]).apply(make_model()), tmp_path)
    config = tmp_path / "adapter_config.json"
    told = json.loads(config.read_text())
    wrong = copy.deepcopy(told)
    wrong["tunewright_options"]["layers"] = [1]
    config.write_text(json.dumps(wrong))
    with pytest.raises(ModelError, match=r"lacks 9 of 9 weights: model\.layers\.1"):
        Partial.load(make_model(), tmp_path)
