"""AdamW with fp32 masters: exactly torch's where weights are fp32, and more exact where they are not."""

import gc
import math
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tunewright.core.errors import DriftError
from tunewright.recipes import TrainConfig
from tunewright.train import optimizer as optimizer_module
from tunewright.train.optimizer import Masters

LR = 0.01


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def batches(count: int, start: int = 0) -> Iterator[torch.Tensor]:
    for i in range(start, start + count):
        yield torch.randn(5, 6, generator=torch.Generator().manual_seed(i))


def learn(model: nn.Module, optimizer: Masters, x: torch.Tensor, factor: float = 1.0) -> float:
    model(x.to(next(model.parameters()).dtype)).float().square().mean().backward()
    norm = optimizer.gather()
    optimizer.step(factor)
    return norm


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# fp32


def test_fp32_is_torchs_own_adamw_to_the_last_bit() -> None:
    ours, theirs = network(), network()
    config = TrainConfig(weight_decay=0.1, clip=0.05)
    optimizer = Masters(ours, config, LR)
    named = list(theirs.named_parameters())
    groups = [
        {"params": [p for _, p in named if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for _, p in named if p.ndim <= 1], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=LR, betas=config.betas, fused=True)
    for step, x in enumerate(batches(12)):
        factor = 1.0 - step / 20
        norm = learn(ours, optimizer, x, factor)
        theirs(x).square().mean().backward()
        expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.05)
        for group in reference.param_groups:
            group["lr"] = LR * factor
        reference.step()
        reference.zero_grad()
        assert norm == float(expected)
        assert equal(ours.state_dict(), theirs.state_dict())
    assert float(expected) > 0.05  # the gradients were clipped indeed


def test_fp32_weights_are_their_own_masters() -> None:
    model = network()
    optimizer = Masters(model, TrainConfig(), LR)
    masters = optimizer.weights()
    assert all(p.data_ptr() == masters[name].data_ptr() for name, p in model.named_parameters())


def test_gradients_are_dropped_after_a_step() -> None:
    model = network()
    optimizer = Masters(model, TrainConfig(), LR)
    learn(model, optimizer, next(batches(1)))
    assert all(p.grad is None for p in model.parameters())


def test_the_scale_of_the_loss_is_taken_out_again() -> None:
    models = network(), network()
    x = next(batches(1))
    norms = []
    for model, scale in zip(models, (1.0, 1024.0), strict=True):
        optimizer = Masters(model, TrainConfig(), LR)
        (model(x).square().mean() * scale).backward()
        norms.append(optimizer.gather(scale))
        optimizer.step(1.0)
    assert norms[0] == norms[1]
    assert equal(models[0].state_dict(), models[1].state_dict())


# bf16


def test_bf16_masters_gather_updates_that_are_too_small_for_bf16() -> None:
    weight = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    nn.init.ones_(weight.weight)
    optimizer = Masters(weight, TrainConfig(weight_decay=0.0), 1e-4)
    bare = torch.ones(1, dtype=torch.bfloat16)
    for _ in range(100):
        weight.weight.grad = torch.ones_like(weight.weight)
        optimizer.gather()
        optimizer.step(1.0)  # a constant gradient moves AdamW by the learning rate
        bare -= 1e-4
    assert float(bare) == 1.0
    assert float(optimizer.weights()["weight"]) == pytest.approx(0.99, abs=1e-5)
    assert 1.0 > float(weight.weight.detach()) == pytest.approx(0.99, abs=2**-8)


def test_bf16_weights_are_their_masters_rounded() -> None:
    model = network(torch.bfloat16)
    optimizer = Masters(model, TrainConfig(), LR)
    for x in batches(5):
        learn(model, optimizer, x)
    masters = optimizer.weights()
    assert all(master.dtype == torch.float32 for master in masters.values())
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert all(torch.equal(p, masters[name].bfloat16()) for name, p in model.named_parameters())
    assert any(not torch.equal(p.float(), masters[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_few_masters_at_a_time_move_as_all_together(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the fp32 gradients of a few are all there ever are."""
    together, in_portions = network(dtype), network(dtype)
    config = TrainConfig(weight_decay=0.1, clip=0.05)
    optimizers = Masters(together, config, LR), Masters(in_portions, config, LR)
    held = []
    step = optimizers[1]._torch.step
    monkeypatch.setattr(optimizer_module, "_AT_ONCE", 60)
    monkeypatch.setattr(optimizers[1]._torch, "step", lambda: (held.append(gradients(optimizers[1])), step()))
    for x in batches(4):
        for model, optimizer, keep in zip((together, in_portions), optimizers, (True, False), strict=True):
            model(x.to(dtype)).float().square().mean().backward()
            optimizer.gather(2.0)
            optimizer.step(0.5, keep_gradients=keep)
    assert equal(together.state_dict(), in_portions.state_dict())
    assert equal(optimizers[0].state(), optimizers[1].state())
    assert max(map(len, held)) < len(optimizers[1].masters)


def gradients(optimizer: Masters) -> list[str]:
    return [name for name, master in optimizer.masters.items() if master.grad is not None]


def test_what_is_done_after_an_update_sees_gradients_if_they_are_kept() -> None:
    for keep in (True, False):
        model = network(torch.bfloat16)
        optimizer, seen = Masters(model, TrainConfig(), LR), list[bool]()
        model(next(batches(1)).bfloat16()).square().mean().backward()
        optimizer.gather()
        optimizer.step(1.0, partial(look_at_gradients, model, seen), keep)
        assert seen == [keep] * 6


def look_at_gradients(model: nn.Module, seen: list[bool]) -> None:
    seen += [parameter.grad is not None for parameter in model.parameters()]


def test_the_norm_of_a_large_bf16_gradient_is_exact() -> None:
    gradient = torch.randn(700, 600, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = gradient.double().square().sum().sqrt()
    assert float(optimizer_module._norm(gradient)) == pytest.approx(float(expected), rel=1e-5)


# What is trained


def test_frozen_weights_are_not_the_optimizers() -> None:
    model = network()
    model[0].requires_grad_(False)
    optimizer = Masters(model, TrainConfig(weight_decay=0.5), LR)
    before = snapshot(model)
    learn(model, optimizer, next(batches(1)))
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == set(optimizer.parameters) == {"1.weight", "1.bias", "3.weight", "3.bias"}


def test_only_matrices_decay() -> None:
    model = network()
    optimizer = Masters(model, TrainConfig(weight_decay=0.5), LR)
    before = snapshot(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.gather()
    optimizer.step(1.0)
    for name, tensor in model.state_dict().items():
        expected = before[name] * (1 - LR * 0.5) if tensor.ndim > 1 else before[name]
        assert torch.equal(tensor, expected), name


@pytest.mark.parametrize("kept", ["weight", "bias"])
def test_matrices_alone_or_none_at_all_may_be_trained(kept: str) -> None:
    model = nn.Linear(6, 3)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == kept)
    optimizer = Masters(model, TrainConfig(), LR)
    learn(model, optimizer, next(batches(1)))
    assert list(optimizer.weights()) == [kept]


def test_a_weight_without_a_gradient_stays() -> None:
    model = nn.ModuleDict({"used": nn.Linear(6, 3), "unused": nn.Linear(6, 3)})
    optimizer = Masters(model, TrainConfig(weight_decay=0.5), LR)
    before = snapshot(model)
    model["used"](next(batches(1))).sum().backward()
    optimizer.gather()
    optimizer.step(1.0)
    assert torch.equal(model["unused"].weight, before["unused.weight"])
    assert not torch.equal(model["used"].weight, before["used.weight"])


# Gradients that are not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_gradient_that_is_not_finite_is_named_and_nothing_is_updated(value: float) -> None:
    model = network()
    optimizer = Masters(model, TrainConfig(weight_decay=0.1), LR)
    learn(model, optimizer, next(batches(1)))
    weights = snapshot(model)
    state = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    model(next(batches(1))).square().mean().backward()
    model[3].weight.grad[1, 2] = value
    assert not math.isfinite(optimizer.gather())
    assert optimizer.bad_gradients() == ["3.weight"]
    assert equal(model.state_dict(), weights)
    assert equal(optimizer.state(), state)


def test_after_dropping_bad_gradients_training_goes_on_as_if_there_were_none() -> None:
    model, undisturbed = network(), network()
    optimizer, other = (Masters(m, TrainConfig(), LR) for m in (model, undisturbed))
    model(next(batches(1))).square().mean().backward()
    model[0].bias.grad[0] = float("nan")
    assert not math.isfinite(optimizer.gather())
    assert optimizer.bad_gradients() == ["0.bias"]
    optimizer.drop()
    assert optimizer.bad_gradients() == []
    for x in batches(2):
        learn(model, optimizer, x)
        learn(undisturbed, other, x)
    assert equal(model.state_dict(), undisturbed.state_dict())


# Masters and moments that are not finite


def test_masters_and_moments_that_are_not_finite_are_named() -> None:
    model = network()
    optimizer = Masters(model, TrainConfig(), LR)
    learn(model, optimizer, next(batches(1)))
    assert optimizer.not_finite() == []
    with torch.no_grad():
        optimizer.masters["1.bias"][0] = float("inf")
    optimizer.state()["3.weight|exp_avg_sq"][0, 0] = float("nan")
    assert optimizer.not_finite() == ["weight 1.bias", "exp_avg_sq of 3.weight"]


def test_a_master_is_told_where_bf16_rounding_hides_it() -> None:
    model = network(torch.bfloat16)
    optimizer = Masters(model, TrainConfig(), LR)
    with torch.no_grad():
        optimizer.masters["0.weight"][1, 1] = float("-inf")
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    assert optimizer.not_finite() == ["weight 0.weight"]


# State


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_through_safetensors_goes_on_to_the_last_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    model = network(dtype)
    optimizer = Masters(model, TrainConfig(), LR)
    for x in batches(4):
        learn(model, optimizer, x)
    save_file({name: t.clone() for name, t in optimizer.weights().items()}, tmp_path / "weights")
    save_file(optimizer.state(), tmp_path / "state")
    for x in batches(4, start=4):
        learn(model, optimizer, x)

    again = network(dtype)
    resumed = Masters(again, TrainConfig(), LR)
    resumed.set_weights(load_file(tmp_path / "weights"))
    resumed.set_state(load_file(tmp_path / "state"))
    for x in batches(4, start=4):
        learn(again, resumed, x)
    assert equal(again.state_dict(), model.state_dict())
    assert equal(resumed.weights(), optimizer.weights())
    assert equal(resumed.state(), optimizer.state())


def test_the_state_is_named_after_the_weights() -> None:
    model = network()
    optimizer = Masters(model, TrainConfig(), LR)
    before = optimizer.state()
    assert {"0.weight|exp_avg", "0.weight|exp_avg_sq", "0.weight|step"} <= set(before)
    assert len(before) == 3 * len(list(model.parameters()))
    learn(model, optimizer, next(batches(1)))
    assert optimizer.state().keys() == before.keys()


def test_moments_exist_before_the_first_step_and_are_zero() -> None:
    optimizer = Masters(network(torch.bfloat16), TrainConfig(), LR)
    assert all(not tensor.any() for tensor in optimizer.state().values())
    assert {tensor.dtype for tensor in optimizer.state().values()} == {torch.float32}
    assert optimizer.state()["0.weight|exp_avg"].shape == optimizer.weights()["0.weight"].shape


def test_putting_masters_back_sets_the_rounded_weights_too() -> None:
    model = network(torch.bfloat16)
    optimizer = Masters(model, TrainConfig(), LR)
    saved = {name: torch.full_like(master, 0.1) for name, master in optimizer.weights().items()}
    optimizer.set_weights(saved)
    assert all(torch.equal(p, torch.full_like(p, 0.1)) for p in model.parameters())
    assert equal(optimizer.weights(), saved)


@pytest.mark.parametrize("wrong", ["missing", "shape", "more"])
def test_the_weights_of_another_model_are_refused_and_nothing_is_set(wrong: str) -> None:
    optimizer = Masters(network(), TrainConfig(), LR)
    before = {name: master.clone() for name, master in optimizer.weights().items()}
    saved = {name: torch.zeros_like(master) for name, master in before.items()}
    if wrong == "missing":
        del saved["3.bias"]
    elif wrong == "shape":
        saved["3.bias"] = torch.zeros(4)
    else:
        saved["4.bias"] = torch.zeros(4)
    with pytest.raises(DriftError, match=r"checkpoints: .* such as (3|4)\.bias"):
        optimizer.set_weights(saved)
    assert equal(optimizer.weights(), before)


def test_release_gives_the_memory_back_and_leaves_the_model() -> None:
    model = network(torch.bfloat16)
    optimizer = Masters(model, TrainConfig(), LR)
    learn(model, optimizer, next(batches(1)))
    kept = [weakref.ref(tensor) for tensor in (*optimizer.masters.values(), *optimizer.state().values())]
    before = snapshot(model)
    optimizer.release()
    gc.collect()
    assert [ref() for ref in kept] == [None] * len(kept)
    assert equal(model.state_dict(), before)
    assert optimizer.parameters.keys() == before.keys()
