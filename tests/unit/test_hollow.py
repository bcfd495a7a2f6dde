"""Tensors without values: nothing is held, all that decides is real, bytes are those of real tensors."""

import pytest
import torch
from counted import Counted
from torch import nn

from tunewright.core.units import resident_bytes
from tunewright.models import hollow
from tunewright.models.hollow import Hollow


def test_numbers_take_no_memory():
    with Hollow():
        torch.empty(1)  # what is imported for it is
    before = resident_bytes()
    with Hollow() as counted:
        x = torch.empty(1 << 20, 1 << 15, dtype=torch.bfloat16)
        y = x @ x.t()[:, :8]
        assert counted.live == (1 << 36) + (1 << 24)
        del x
        assert counted.live == (1 << 24)
        del y
    assert (counted.live, counted.most) == (0, (1 << 36) + (1 << 24))
    assert resident_bytes() - before < 1 << 26


def test_a_view_is_not_counted_again():
    with Hollow() as counted:
        x = torch.zeros(10, 10)
        rows = [x[1:], x.t(), x.view(100)]
        assert counted.live == 400
        del x
        assert counted.live == 400
        rows.clear()
        assert counted.live == 0


def test_what_decides_is_real():
    with Hollow():
        ids, labels = torch.tensor([[3, 1, 2]]), torch.tensor([[-100, 7, -100]])
        states = torch.randn(1, 3, 4)
        kept = states[labels != -100]
        assert kept.shape == (1, 4)
        assert ids.tolist() == [[3, 1, 2]]
        states[labels == -100] = 0.0
        assert nn.functional.cross_entropy(kept, torch.tensor([2])).item() == 1.0
        assert torch.isfinite(states).all().item() is True
        assert torch.equal(states, states + 1)


def test_choices_fall_on_all_in_turn():
    with Hollow():
        chosen = torch.randn(6, 4).topk(2).indices
    assert chosen.flatten().bincount().tolist() == [3, 3, 3, 3]


def test_a_module_may_be_moved_to_other_numbers():
    with Hollow() as counted:
        layer = nn.Linear(8, 8, bias=False).to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    assert counted.live == 128


@pytest.mark.parametrize("bias", [False, True])
def test_passes_count_as_those_of_real_tensors_do(bias):
    labels = torch.arange(16) % 8

    def most(mode: Hollow) -> tuple[int, int]:
        with mode:
            network = nn.Sequential(
                nn.Linear(32, 64, bias=bias), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 8, bias=bias)
            )
            nn.functional.cross_entropy(network(torch.randn(16, 32)), labels).backward()
            return mode.live, mode.most

    assert most(Hollow()) == most(Counted())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_in_one_product_count_as_real_ones_do(dtype):
    ends = torch.tensor([8, 24, 32], dtype=torch.int32)

    def most(mode: Hollow) -> tuple[int, int]:
        with mode:
            rows = torch.randn(32, 64, dtype=dtype, requires_grad=True)
            weights = torch.randn(3, 16, 64, dtype=dtype, requires_grad=True)
            nn.functional.grouped_mm(rows, weights.transpose(1, 2), offs=ends).pow(2).sum().backward()
            return mode.live, mode.most

    assert most(Hollow()) == most(Counted())


def test_only_within():
    with Hollow():
        assert hollow.is_on()
    assert not hollow.is_on()
    assert torch.ones(2).sum().item() == 2.0
