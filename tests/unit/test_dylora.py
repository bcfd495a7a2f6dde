"""DyLoRA: nested ranks against the paper's formula, and what cutting one off costs."""

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from training import OTHERS, MakeTrainer

from tunewright.core.errors import ModelError
from tunewright.methods import Clock
from tunewright.methods.dylora import Config, DyLora, truncate

IDS = torch.tensor([[5, 77, 1030, 9, 4, 42]])
RANK, ALPHA = 8, 16.0
DYLORA = {"name": "dylora", "rank": RANK, "alpha": ALPHA}


def dylora(**options: Any) -> DyLora:
    return DyLora(Config(**{"rank": RANK, "alpha": ALPHA, **options}))


def filled(model: Any) -> Any:
    """Its B, too, is not zero."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def close(one: torch.Tensor, other: torch.Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(one, other, atol=atol, rtol=0)


def step_of(method: DyLora, rank: int) -> Clock:
    """A step that draws this rank."""
    clocks = (Clock(step, 1000, 0) for step in range(1000))
    return next(clock for clock in clocks if method.drawn(clock) == rank)


# Training


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_a_step_uses_the_first_ranks_at_alpha_over_their_number(make_model: Any, rank: int) -> None:
    method = dylora(target_modules=["q_proj"])
    model = filled(method.apply(make_model())).double().train()
    method.before_step(model, step_of(method, rank))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(3, 32, dtype=torch.float64)
    expected = x @ (layer.base_layer.weight + ALPHA / rank * b[:, :rank] @ a[:rank]).T
    torch.testing.assert_close(layer(x), expected)
    layer(x).square().sum().backward()
    assert a.grad[:rank].all()
    assert b.grad[:, :rank].all()
    assert not a.grad[rank:].any()
    assert not b.grad[:, rank:].any()


def test_outside_of_training_all_ranks_count(make_model: Any) -> None:
    method = dylora()
    model = filled(method.apply(make_model()))
    method.before_step(model, step_of(method, 2))
    found = logits(model)
    assert (logits(truncate(copy.deepcopy(model), 2)) - found).abs().max() > 0.1
    close(logits(model.merge_and_unload()), found, 1e-4)


def test_ranks_are_drawn_equally_often_from_seed_and_step() -> None:
    method = dylora()
    ranks = [method.drawn(Clock(step, 8000, 3)) for step in range(8000)]
    assert ranks == [method.drawn(Clock(step, 1, 3)) for step in range(8000)]
    assert ranks[:20] != [method.drawn(Clock(step, 8000, 4)) for step in range(20)]
    counts = Counter(ranks)
    assert counts.keys() == set(range(1, RANK + 1))
    assert max(abs(count - 1000) for count in counts.values()) < 5 * (8000 / 8 * 7 / 8) ** 0.5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_was_drawn_leaves_no_trace_in_the_file(
    make_trainer: MakeTrainer, make_model: Any, tmp_path: Path, precision: str
) -> None:
    trainer = make_trainer(method=DYLORA, precision=precision, lr=0.01, max_steps=3)
    trainer.run()
    trainer.method.export(trainer.model, tmp_path)
    found = logits(trainer.model)
    close(logits(DyLora.load(make_model(precision), tmp_path)), found)
    theirs = PeftModel.from_pretrained(make_model(precision), tmp_path, autocast_adapter_dtype=False)
    close(logits(theirs), found)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"


# Smaller ranks


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_a_smaller_rank_is_the_first_rows_and_columns(make_model: Any, rank: int) -> None:
    model = filled(dylora(target_modules=["q_proj"]).apply(make_model()))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    a, b = (factors["default"].weight.clone() for factors in (layer.lora_A, layer.lora_B))
    truncate(model, rank).eval()
    x = torch.randn(3, 32)
    expected = x @ (layer.base_layer.weight + ALPHA / rank * b[:, :rank] @ a[:rank]).T
    torch.testing.assert_close(layer(x), expected)


def test_a_smaller_rank_is_saved_and_merged_as_such(make_model: Any, tmp_path: Path) -> None:
    method = dylora()
    whole = filled(method.apply(make_model()))
    model = truncate(copy.deepcopy(whole), 3)
    method.export(model, tmp_path / "small")
    method.export(whole, tmp_path / "whole")
    assert json.loads((tmp_path / "small" / "adapter_config.json").read_text())["r"] == 3
    close(logits(PeftModel.from_pretrained(make_model(), tmp_path / "small")), logits(model))
    close(logits(DyLora.load(make_model(), tmp_path / "whole", at_rank=3)), logits(model))
    close(logits(DyLora.merge(DyLora.load(make_model(), tmp_path / "whole", at_rank=3))), logits(model), 1e-3)


def test_at_rank_is_what_is_measured_and_saved(
    make_trainer: MakeTrainer, make_model: Any, tmp_path: Path
) -> None:
    trainer = make_trainer(method={**DYLORA, "at_rank": 2}, lr=0.01, max_steps=3)
    trainer.run()
    layers = [layer for layer in trainer.model.modules() if isinstance(layer, LoraLayer)]
    assert {layer.lora_A["default"].weight.shape[0] for layer in layers} == {2}
    assert {layer.scaling["default"] for layer in layers} == {ALPHA / 2}
    trainer.method.export(trainer.model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 2
    assert 4 * trainer.method.saved(trainer.model) == trainer.method.count(make_model())


@pytest.mark.parametrize("rank", [0, 9])
def test_a_rank_that_is_not_there(make_model: Any, rank: int) -> None:
    model = dylora().apply(make_model())
    with pytest.raises(ModelError, match="the adapter's rank is 8"):
        truncate(model, rank)


def test_a_rank_to_keep_is_not_above_the_rank(make_model: Any) -> None:
    (problem,) = dylora(at_rank=9).problems(make_model())
    assert (problem.where, problem.fix) == ("method.at_rank", "give at most 8")


def cut(model: Any, rank: int, scale: float) -> Any:
    smaller = truncate(copy.deepcopy(model), rank)
    for layer in (layer for layer in smaller.modules() if isinstance(layer, LoraLayer)):
        layer.scaling["default"] = scale
    return smaller


def test_cutting_costs_less_than_with_a_plain_lora(make_trainer: MakeTrainer) -> None:
    """The reason for the method: a plain LoRA cut to a rank that it was not trained for falls apart."""
    whole: dict[str, float] = {}
    rises: dict[str, list[float]] = {}
    for name, scales in (("dylora", [1]), ("lora", [1, 0])):  # at its own scale the plain one may fare better
        method = {**DYLORA, "name": name}
        trainer = make_trainer(OTHERS, method=method, folder=name, valid=OTHERS, lr=0.01, max_steps=200)
        trainer.run()
        whole[name] = trainer.held_out_loss()
        rises[name] = [
            min(
                trainer.held_out.loss(cut(trainer.model, rank, ALPHA / (rank if own else RANK)), print)
                for own in scales
            )
            - whole[name]
            for rank in (1, 2, 4)
        ]
    assert whole["dylora"] == pytest.approx(whole["lora"], abs=0.1)
    assert all(ours < theirs / 2 for ours, theirs in zip(rises["dylora"], rises["lora"], strict=True)), rises
