"""AdamW with moments in 8 bits: near AdamW, a quarter of its state, and the same after a stop."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tunewright.optimizers.adamw import AdamW
from tunewright.optimizers.adamw import Config as AdamWConfig
from tunewright.optimizers.adamw_8bit import AdamW8bit, Config
from tunewright.recipes import TrainConfig
from tunewright.train.optimizer import Masters

LR = 3e-3


def network(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(48, 96), nn.Tanh(), nn.Linear(96, 48)).to(dtype)


def learn(model: nn.Module, optimizer: Masters, steps: range) -> list[float]:
    losses, teacher = [], network(seed=1)
    for i in steps:
        x = torch.randn(64, 48, generator=torch.Generator().manual_seed(i))
        loss = (model(x.to(next(model.parameters()).dtype)).float() - teacher(x).detach()).square().mean()
        loss.backward()
        optimizer.gather()
        optimizer.step(1.0)
        losses.append(float(loss.detach()))
    return losses


def masters(model: nn.Module, algorithm: Any) -> Masters:
    return Masters(model, TrainConfig(weight_decay=0.01), LR, algorithm)


def alone(
    algorithm: Any, w: Tensor, gradients: list[Tensor], betas: tuple[float, float] = (0.9, 0.999)
) -> Tensor:
    """A weight after a step along each of the gradients."""
    master = w.clone().requires_grad_()
    optimizer = algorithm.make([{"params": [master], "weight_decay": 0.1}], LR, betas)
    optimizer.state[master] = algorithm.start(master.detach())
    for gradient in gradients:
        master.grad = gradient
        optimizer.step()
    return master.detach()


def test_the_first_step_is_adamws() -> None:
    """Nothing was rounded before it."""
    w, gradient = torch.randn(70, 80), torch.randn(70, 80)
    expected = alone(AdamW(AdamWConfig()), w, [gradient])
    torch.testing.assert_close(alone(AdamW8bit(Config()), w, [gradient]), expected, atol=1e-6, rtol=0)


def test_later_steps_are_near_adamws() -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(3, 70, 80, generator=generator)
    gradients = [torch.randn(3, 70, 80, generator=generator) * (1 + i % 3) for i in range(30)]
    expected = alone(AdamW(AdamWConfig()), w, gradients)
    found = alone(AdamW8bit(Config()), w, gradients)
    assert 0 < (found - expected).norm() < 0.03 * (expected - w).norm()


def test_a_tensor_longer_than_a_part_is_stepped_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn((1 << 18) + 300, generator=generator)
    gradients = [torch.randn(w.shape, generator=generator) for _ in range(3)]
    expected = alone(AdamW(AdamWConfig()), w, gradients)
    found = alone(AdamW8bit(Config()), w, gradients)
    assert (found - expected).norm() < 0.03 * (expected - w).norm()
    tail = slice(-300, None)
    assert (found[tail] - expected[tail]).norm() < 0.05 * (expected[tail] - w[tail]).norm()


def test_it_learns_as_adamw_does() -> None:
    ours, theirs = network(), network()
    optimizer = masters(ours, AdamW8bit(Config()))
    found = torch.tensor(learn(ours, optimizer, range(150)))
    expected = torch.tensor(learn(theirs, masters(theirs, AdamW(AdamWConfig())), range(150)))
    assert expected[-1] < 0.1 * expected[0]
    assert ((found - expected).abs() / expected).max() < 0.1
    assert any(tensor.dtype == torch.uint8 for tensor in optimizer.state().values())


def test_a_weight_whose_gradients_were_small_does_not_leap() -> None:
    """Its second moment is below what 8 bits can tell beside that of its neighbours; its first one is not."""
    w, gradients = torch.zeros(4096), []
    for i in range(50):
        gradient = torch.full((4096,), 1e3 * (-1) ** i)
        gradient[7] = 1e-4 if i < 25 else 0.0
        gradients.append(gradient)
    expected = alone(AdamW(AdamWConfig()), w, gradients)[7].abs()
    assert alone(AdamW8bit(Config()), w, gradients)[7].abs() < 2 * expected


def test_small_tensors_are_adamws_throughout() -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(63, 65, generator=generator)
    gradients = [torch.randn(63, 65, generator=generator) for _ in range(20)]
    expected = alone(AdamW(AdamWConfig()), w, gradients)
    torch.testing.assert_close(alone(AdamW8bit(Config()), w, gradients), expected, atol=1e-6, rtol=0)


def test_state_takes_the_memory_that_it_says() -> None:
    state = AdamW8bit(Config()).start(torch.zeros(4096, 4096, device="meta"))
    held = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    assert held / 4096**2 == pytest.approx(AdamW8bit.facts.bytes_per_parameter, rel=1e-3)
    assert sum(tensor.dtype == torch.uint8 for tensor in state.values()) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_goes_on_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    algorithm = AdamW8bit(Config())
    whole, first, second = (network(dtype) for _ in range(3))
    at_once = masters(whole, algorithm)
    learn(whole, at_once, range(9))
    half = masters(first, algorithm)
    learn(first, half, range(4))
    save_file({n: t.contiguous() for n, t in half.weights().items()}, tmp_path / "weights")
    save_file({n: t.contiguous() for n, t in half.state().items()}, tmp_path / "state")
    resumed = masters(second, algorithm)
    resumed.restore(load_file(tmp_path / "weights"), load_file(tmp_path / "state"))
    learn(second, resumed, range(4, 9))
    assert resumed.state().keys() == at_once.state().keys()
    assert all(torch.equal(resumed.state()[name], tensor) for name, tensor in at_once.state().items())
    assert all(torch.equal(resumed.weights()[name], w) for name, w in at_once.weights().items())
    assert not at_once.not_finite()
