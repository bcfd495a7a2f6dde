"""Diff pruning: masks against the hard-concrete formulas, and a sparse difference that is what it says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from training import MakeTrainer, killed_and_whole, losses, same
from transformers import GPT2Config, GPT2LMHeadModel

from tunewright.core.errors import ModelError
from tunewright.methods import Clock
from tunewright.methods._difference import Difference, attached, largest
from tunewright.methods.diff_pruning import Config, DiffPruning
from tunewright.models.load import find, outline

IDS = torch.tensor([[5, 77, 1030, 9, 4, 42]])
STEPS, SETTLES = 10, 7
DENSE = {"name": "diff_pruning", "density": 0.05}
FILE = "adapter_model.safetensors"


def pruning(**options: Any) -> DiffPruning:
    return DiffPruning(Config(**options))


def difference(structured: bool = False, seed: int = 0) -> Difference:
    """One of every kind of entry: masks open, closed and between."""
    made = Difference(torch.zeros(40, 50, dtype=torch.float64), structured)
    torch.manual_seed(seed)
    for parameter, spread in ((made.change, 1.0), *((mask, 3.0) for mask in made.masks())):
        torch.nn.init.normal_(parameter, std=spread)
    return made


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits.float()


def close(one: torch.Tensor, other: torch.Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(one, other, atol=atol, rtol=0)


# Masks


def expected_mask(logit: torch.Tensor) -> torch.Tensor:
    return torch.clamp(3 / (1 + torch.exp(-logit)) - 1.5, 0, 1)


@pytest.mark.parametrize("structured", [False, True])
def test_without_noise_the_mask_is_the_stretched_sigmoid(structured: bool) -> None:
    made = difference(structured)
    expected = expected_mask(made.alpha.double())
    if structured:
        assert made.group is not None
        expected = expected * expected_mask(made.group.double())
    torch.testing.assert_close(made.mask().double(), expected, atol=1e-6, rtol=0)
    assert (expected == 0).any()
    assert (expected == 1).any() or structured


@pytest.mark.parametrize("structured", [False, True])
def test_the_share_of_open_masks_is_as_expected(structured: bool) -> None:
    made = difference(structured).train()
    opened = torch.zeros(40, 50)
    for made.seed in range(400):
        opened += made.mask().detach() > 0
    expected = torch.sigmoid(made.alpha.detach())
    if made.group is not None:
        expected = expected * torch.sigmoid(made.group.detach())
    assert float(made.expected().detach()) == pytest.approx(float(expected.sum()), rel=1e-5)
    assert float(opened.sum() / 400) == pytest.approx(float(expected.sum()), rel=0.15 if structured else 0.01)


def test_noise_follows_from_the_seed_and_is_of_training_only() -> None:
    made = difference().train()
    made.seed = 1
    first = made.mask()
    assert torch.equal(made.mask(), first)
    made.seed = 2
    assert not torch.equal(made.mask(), first)
    torch.testing.assert_close(
        made.eval().mask().double(), expected_mask(made.alpha.double()), atol=1e-6, rtol=0
    )


def test_gradients_are_those_of_the_formula() -> None:
    made = difference()
    made.expected().backward()
    share = torch.sigmoid(made.alpha.detach())
    torch.testing.assert_close(made.alpha.grad, share * (1 - share), atol=1e-6, rtol=0)
    made.alpha.grad = None
    made(torch.zeros(40, 50, dtype=torch.float64)).sum().backward()
    mask = expected_mask(made.alpha.detach())
    between = (mask > 0) & (mask < 1)
    torch.testing.assert_close(made.change.grad, mask, atol=1e-6, rtol=0)
    slope = 3 * share * (1 - share) * made.change.detach() * between
    torch.testing.assert_close(made.alpha.grad, slope, atol=1e-6, rtol=0)


def test_the_largest_are_kept_and_closed_ones_come_last() -> None:
    both = [difference(seed=0), difference(seed=1)]
    sizes = torch.cat([made.delta().detach().abs().reshape(-1) for made in both])
    count = int((sizes > 0).sum())
    for wanted in (1, 100, count, count + 10):
        kept = torch.cat([i + 2000 * n for n, i in enumerate(largest(both, wanted))])
        assert len(kept) == wanted
        best = sizes.sort(descending=True).values[: min(wanted, count)]
        assert torch.equal(sizes[kept].sort(descending=True).values[: len(best)], best)


def test_what_is_kept_keeps_its_value() -> None:
    made = difference(structured=True)
    before = made.delta().detach()
    (kept,) = largest([made], 30)
    made.hold(kept)
    expected = torch.zeros(2000, dtype=torch.float64)
    expected[kept] = before.reshape(-1)[kept]
    assert made.is_held()
    torch.testing.assert_close(made.delta().reshape(-1), expected, atol=0, rtol=0)
    made.seed = 5
    torch.testing.assert_close(made.train().delta().reshape(-1), expected, atol=1e-3, rtol=0)


# In training


def test_it_begins_as_the_base_and_trains_twice_its_weights(make_model: Any, tiny_model_folder: Path) -> None:
    base = make_model()
    linear = [m for n, m in base.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    size = sum(module.weight.numel() for module in linear)
    for structured in (False, True):
        method = pruning(structured=structured)
        model = method.apply(make_model())
        close(logits(model), logits(base), 0)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert trained == method.count(base) == 2 * size + structured * len(linear)
        assert method.count(outline(find(str(tiny_model_folder)))) == trained
    assert method.saved(base) == 2 * round(0.005 * size)


def test_the_penalty_is_for_what_is_open_beyond_the_allowed_share(make_model: Any) -> None:
    method = pruning(penalty=10.0, density=0.01, settle=0.5)
    model = method.apply(make_model())
    share = torch.sigmoid(torch.tensor(5.0))
    allowed = [method.allowed(Clock(step, 40, 0)) for step in (0, 9, 18, 30)]
    assert allowed == pytest.approx([1, 0.1, 0.01, 0.01])
    for step, expected in zip((0, 9, 18), (0, 10 * (share - 0.1), 10 * (share - 0.01)), strict=True):
        found = method.penalty(model, Clock(step, 40, 0))
        assert found is not None
        assert float(found.detach()) == pytest.approx(float(expected), abs=1e-5)


def test_one_mask_is_drawn_for_a_step(make_model: Any) -> None:
    method = pruning()
    model = method.apply(make_model()).train()

    def drawn(step: int) -> list[torch.Tensor]:
        method.before_step(model, Clock(step, 100, 0))
        return [made.mask() for _, made in attached(model).values()]

    first, again, later = drawn(0), drawn(0), drawn(1)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, later))
    assert len({float(mask.sum().detach()) for mask in first}) == len(first)  # each weight has its own noise


class Look:
    """Notes what masks are trained, and which entries differ."""

    trainer: Any

    def __init__(self) -> None:
        self.masks: list[int] = []
        self.open: list[float] = []
        self.differ: list[list[torch.Tensor]] = []

    def __call__(self, event: Any) -> None:
        if event["kind"] != "step":
            return
        found = [made for _, made in attached(self.trainer.model).values()]
        self.masks.append(sum(".alpha" in name for name in self.trainer.optimizer.masters))
        self.open.append(sum(float(made.expected().detach()) for made in found))
        self.differ.append([made.alpha.detach() > 0 for made in found])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_settled_masks_stay_and_take_no_memory(make_trainer: MakeTrainer, precision: str) -> None:
    look = Look()
    trainer = look.trainer = make_trainer(
        method=DENSE, precision=precision, lr=0.003, max_steps=STEPS, readers=[look]
    )
    adapted = len(attached(trainer.model))
    trainer.run()
    assert look.masks == [adapted] * SETTLES + [0] * (STEPS - SETTLES)
    settled = look.differ[SETTLES - 1]
    for later in look.differ[SETTLES:]:
        assert all(map(torch.equal, later, settled))
    report = trainer.method.report(trainer.model)
    assert report["density"] == pytest.approx(0.05, abs=1e-3)
    assert (
        report["differing_weights"]
        == int(sum(mask.sum() for mask in settled))
        == trainer.method.saved(trainer.model) // 2
    )


def test_the_penalty_closes_masks_before_they_are_settled(make_trainer: MakeTrainer) -> None:
    left = {}
    for weight in (0.0, 1000.0):
        look = Look()
        trainer = look.trainer = make_trainer(
            method={**DENSE, "penalty": weight}, folder=str(weight), lr=0.003, max_steps=40, readers=[look]
        )
        trainer.run()
        left[weight] = look.open[26] / look.open[0]
    assert left[1000.0] < 0.2 < 0.8 < left[0.0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("killed_at", [4, SETTLES, SETTLES + 1, STEPS])
def test_a_killed_run_goes_on_bit_for_bit(
    make_trainer: MakeTrainer, tmp_path: Path, precision: str, killed_at: int
) -> None:
    """Before masks are settled, at the step that settles them, and after."""
    settings = {
        "method": {**DENSE, "structured": True}, "precision": precision, "lr": 0.003, "max_steps": STEPS,
        "micro_tokens": 32, "save_every": 1,
    }  # fmt: skip
    resumed, whole = killed_and_whole(make_trainer, tmp_path, killed_at, **settings)
    assert same(resumed.method.tensors(resumed.model), whole.method.tensors(whole.model))
    expected = losses(tmp_path, "whole")
    assert losses(tmp_path, "killed") == expected[:killed_at] + expected[killed_at - 1 :]


# Saving


@pytest.fixture
def trained(make_trainer: MakeTrainer, tmp_path: Path) -> tuple[Any, Path]:
    """A trainer that is done, and the folder of what it made."""
    trainer = make_trainer(method=DENSE, lr=0.01, max_steps=STEPS)
    trainer.run()
    folder = tmp_path / "saved"
    folder.mkdir()
    trainer.method.export(trainer.model, folder)
    return trainer, folder


def test_the_file_is_the_difference_between_base_and_merged(trained: Any, make_model: Any) -> None:
    trainer, folder = trained
    saved, base = load_file(folder / FILE), make_model().state_dict()
    found = logits(trainer.model)
    merged = DiffPruning.merge(trainer.model)
    close(logits(merged), found)
    count = 0
    for name, weight in merged.state_dict().items():
        difference = (weight - base[name]).reshape(-1)
        if f"{name}.indices" not in saved:
            assert not difference.any(), name
            continue
        indices, values = saved[f"{name}.indices"], saved[f"{name}.values"]
        assert indices.dtype == torch.int32
        expected = torch.zeros_like(difference).index_add(0, indices, values)
        torch.testing.assert_close(difference, expected, atol=1e-7, rtol=0)
        count += len(indices)
    assert 2 * count == sum(tensor.numel() for tensor in saved.values())
    assert sorted(merged.state_dict()) == sorted(base)
    assert type(merged.model.layers[0].mlp.up_proj) is torch.nn.Linear


def test_it_comes_back_sparse(trained: Any, make_model: Any) -> None:
    trainer, folder = trained
    again = DiffPruning.load(make_model(), folder)
    close(logits(again), logits(trainer.model), 0)
    (_, made) = next(iter(attached(again).values()))
    assert made.change.ndim == 1
    assert made.alpha.numel() == 0
    assert not any(p.requires_grad for p in again.parameters())
    assert trainer.method.report(again)["differing_weights"] == trainer.method.saved(trainer.model) // 2


def test_what_was_never_trained_is_an_empty_difference(make_model: Any, tmp_path: Path) -> None:
    method = pruning()
    method.export(method.apply(make_model()), tmp_path)
    assert load_file(tmp_path / FILE) == {}
    close(logits(DiffPruning.load(make_model(), tmp_path)), logits(make_model()), 0)


def test_an_unfinished_difference_merges_as_it_is(make_model: Any) -> None:
    model = pruning(target_modules=["q_proj"]).apply(make_model())
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    found = logits(model)
    close(logits(DiffPruning.merge(model)), found)


def test_conv1d_weights_differ_in_their_own_layout() -> None:
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=2048, n_embd=32, n_layer=1, n_head=4))
    method = pruning(target_modules=["c_attn"], density=0.5)
    model = method.apply(base)
    (made,) = (made for _, made in attached(model).values())
    assert made.change.shape == (32, 96)
    torch.nn.init.normal_(made.change)
    method.finish(model)
    assert method.saved(model) == 2 * 32 * 96 // 2
    found = logits(model)
    close(logits(DiffPruning.merge(model)), found)
    assert type(model.transformer.h[0].attn.c_attn).__name__ == "Conv1D"


# What cannot be


def test_a_shared_weight_is_refused(make_model: Any) -> None:
    (problem,) = pruning(target_modules=["q_proj", "lm_head"]).problems(make_model())
    assert problem.what.startswith("lm_head shares its weight")
    (problem,) = pruning(target_modules=["none"]).problems(make_model())
    assert problem.where == "method.target_modules"


Q = "model.layers.0.self_attn.q_proj.weight"


def pair(indices: list[int], values: list[float] | None = None, name: str = Q) -> dict[str, torch.Tensor]:
    values = [1.0] * len(indices) if values is None else values
    return {
        f"{name}.indices": torch.tensor(indices, dtype=torch.int32),
        f"{name}.values": torch.tensor(values),
    }


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        (pair([0, 32 * 32]), "an index lies outside"),
        (pair([-1, 5]), "an index lies outside"),
        (pair([0, 1], [1.0]), "not pairs of indices and values"),
        ({f"{Q}.values": torch.ones(3)}, "not pairs of indices and values"),
        ({**pair([0]), f"{Q}.indices": torch.ones(1)}, "not pairs of indices and values"),
        (pair([0] * (32 * 32 + 1)), "not pairs of indices and values"),
        (pair([0], name="model.layers.7.self_attn.q_proj.weight"), "modules that the base lacks"),
        ({"model.norm.weight": torch.ones(32)}, "modules that the base lacks"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    make_model: Any, tmp_path: Path, tensors: dict[str, torch.Tensor], told: str
) -> None:
    method = pruning()
    method.export(method.apply(make_model()), tmp_path)
    save_file(tensors, tmp_path / FILE)
    with pytest.raises(ModelError, match=told):
        DiffPruning.load(make_model(), tmp_path)


def test_a_strangers_pattern_is_never_searched_for(trained: Any, make_model: Any) -> None:
    trainer, folder = trained
    config = json.loads((folder / "adapter_config.json").read_text())
    config["tunewright_options"]["target_modules"] = "(([a-z]+)*_?.?)*!"  # takes for ever on a long name
    (folder / "adapter_config.json").write_text(json.dumps(config))
    close(logits(DiffPruning.load(make_model(), folder)), logits(trainer.model), 0)
