"""GaLore against its formula in float64, and against AdamW where nothing is projected."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tunewright.optimizers.adamw import AdamW
from tunewright.optimizers.adamw import Config as AdamWConfig
from tunewright.optimizers.galore import Config, GaLore
from tunewright.recipes import TrainConfig
from tunewright.train.optimizer import Masters

LR = 0.01


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 16)).to(dtype)


def learn(model: nn.Module, optimizer: Masters, steps: range) -> list[float]:
    losses = []
    for i in steps:
        x = torch.randn(16, 24, generator=torch.Generator().manual_seed(i))
        dtype = next(model.parameters()).dtype
        loss = (model(x.to(dtype)).float() - x[:, :16].cumsum(1)).square().mean()
        loss.backward()
        optimizer.gather()
        optimizer.step(1.0)
        losses.append(float(loss.detach()))
    return losses


def masters(model: nn.Module, algorithm: Any, **train: Any) -> Masters:
    return Masters(model, TrainConfig(clip=100.0, **train), LR, algorithm)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (3, 12, 20)])
def test_steps_are_the_papers_formula(shape: tuple[int, ...]) -> None:
    """One projection for three steps, the singular vectors by a full SVD; the signs of those cancel."""
    config, decay, betas = Config(rank=4, period=3, scale=0.5), 0.1, (0.9, 0.95)
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(*shape, generator=generator)
    gradients = [torch.randn(*shape, generator=generator) for _ in range(3)]
    u, _, vh = torch.linalg.svd(gradients[0].double(), full_matrices=False)
    expected = w.double()
    m = v = torch.zeros((), dtype=torch.float64)
    for step, gradient in enumerate(gradients, 1):
        is_wide = shape[-2] < shape[-1]
        low = u[..., :4].mT @ gradient.double() if is_wide else gradient.double() @ vh[..., :4, :].mT
        m, v = 0.9 * m + 0.1 * low, 0.95 * v + 0.05 * low.square()
        n = (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
        back = u[..., :4] @ n if is_wide else n @ vh[..., :4, :]
        expected = expected * (1 - LR * decay) - LR * 0.5 * back
    master, algorithm = w.clone().requires_grad_(), GaLore(config)
    optimizer = algorithm.make([{"params": [master], "weight_decay": decay}], LR, betas)
    state = optimizer.state[master] = algorithm.start(master.detach())
    for gradient in gradients:
        master.grad = gradient
        optimizer.step()
    torch.testing.assert_close(master.detach().double(), expected, atol=1e-6, rtol=0)
    before = state["projector"].clone()
    optimizer.step()
    assert not torch.equal(state["projector"], before)  # the fourth begins another period


def test_a_rank_as_long_as_the_short_side_is_adamw() -> None:
    ours, theirs = network(), network()
    found = learn(ours, masters(ours, GaLore(Config(rank=24))), range(20))
    expected = learn(theirs, masters(theirs, AdamW(AdamWConfig())), range(20))
    assert found == pytest.approx(expected, rel=1e-5)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_the_update_has_the_rank(tmp_path: Path) -> None:
    model = network()
    before = model[0].weight.detach().clone()
    learn(model, masters(model, GaLore(Config(rank=3, period=100)), weight_decay=0.0), range(5))
    singular = torch.linalg.svdvals((model[0].weight.detach() - before).double())
    assert singular[2] > 1e-3
    assert singular[3] < 1e-6


def test_the_loss_falls() -> None:
    model = network()
    losses = learn(model, masters(model, GaLore(Config(rank=8, period=10, scale=1.0))), range(120))
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5])


def test_state_takes_the_memory_that_it_says() -> None:
    algorithm = GaLore(Config())
    state = algorithm.start(torch.zeros(4096, 4096, device="meta"))
    held = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    assert held / 4096**2 == pytest.approx(GaLore.facts.bytes_per_parameter, rel=1e-3)
    assert state.keys() == {"step", "projector", "exp_avg", "exp_avg_sq"}
    for small in (torch.zeros(4096, device="meta"), torch.zeros(128, 4096, device="meta")):
        assert algorithm.start(small).keys() == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stop", [3, 4])
def test_it_goes_on_bit_for_bit(dtype: torch.dtype, stop: int, tmp_path: Path) -> None:
    """Stopped within a period and at the end of one."""
    algorithm = GaLore(Config(rank=4, period=4))
    whole, first, second = (network(dtype) for _ in range(3))
    at_once = masters(whole, algorithm)
    learn(whole, at_once, range(9))
    half = masters(first, algorithm)
    learn(first, half, range(stop))
    save_file({n: t.contiguous() for n, t in half.weights().items()}, tmp_path / "weights")
    save_file({n: t.contiguous() for n, t in half.state().items()}, tmp_path / "state")
    resumed = masters(second, algorithm)
    resumed.restore(load_file(tmp_path / "weights"), load_file(tmp_path / "state"))
    learn(second, resumed, range(stop, 9))
    assert resumed.state().keys() == at_once.state().keys()
    assert all(torch.equal(resumed.state()[name], tensor) for name, tensor in at_once.state().items())
    assert all(torch.equal(resumed.weights()[name], w) for name, w in at_once.weights().items())
