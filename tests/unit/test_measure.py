"""The held-out loss, and what it does when memory ends."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from tunewright.core.errors import HardwareError
from tunewright.data.template import ChatCodec
from tunewright.objectives.sft import Config, Sft
from tunewright.train.measure import HeldOut

TALKS = [(f"Say {n}.", "word " * n) for n in (4, 1, 9, 2, 2, 3, 4, 5, 4, 4)]
MakeHeldOut = Callable[..., HeldOut]


@pytest.fixture
def make_held_out(make_mixture: Any, tokenizer: Any) -> MakeHeldOut:
    def make(budget: int, talks: Sequence[Any] = TALKS) -> HeldOut:
        return HeldOut(Sft(Config(), ChatCodec(tokenizer)), make_mixture(talks), budget)

    return make


class Limited(torch.nn.Module):
    """A model whose allocator fails above so many tokens; ``seen`` is how many each pass had."""

    def __init__(self, model: Any, limit: int = 1 << 30) -> None:
        super().__init__()
        self.model, self.limit = model, limit
        self.seen: list[int] = []

    def forward(self, input_ids: torch.Tensor, **more: Any) -> Any:
        if input_ids.numel() > self.limit:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate")
        self.seen.append(input_ids.numel())
        return self.model(input_ids=input_ids, **more)


def test_the_loss_is_the_mean_over_supervised_tokens(make_held_out: MakeHeldOut, make_model: Any) -> None:
    model, held_out = make_model(), make_held_out(1)
    alone = [make_held_out(1, [talk]) for talk in TALKS]
    weights = [int(one.samples[0]["learned"][1:].sum()) for one in alone]
    expected = sum(one.loss(model) * w for one, w in zip(alone, weights, strict=True)) / sum(weights)
    assert held_out.loss(model) == pytest.approx(expected, abs=1e-6)
    for budget in (20, 64, 4096):
        assert make_held_out(budget).loss(model) == pytest.approx(expected, abs=1e-6)


def test_the_loss_of_one_sample_is_transformers_own(make_held_out: MakeHeldOut, make_model: Any) -> None:
    model, held_out = make_model(), make_held_out(64, TALKS[:1])
    sample = held_out.samples[0]
    ids = torch.tensor(sample["input_ids"], dtype=torch.long)[None]
    labels = torch.where(torch.tensor(sample["learned"])[None] > 0, ids, -100)
    with torch.no_grad():
        assert held_out.loss(model) == pytest.approx(
            float(model(input_ids=ids, labels=labels).loss), abs=1e-6
        )


@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_the_model_as_it_was(
    make_held_out: MakeHeldOut, make_model: Any, training: bool
) -> None:
    model = make_model().train(training)
    make_held_out(64).loss(model)
    assert model.training == training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_memory_that_ends_makes_batches_smaller_and_leaves_the_loss(
    make_held_out: MakeHeldOut, make_model: Any
) -> None:
    model = make_model()
    told: list[int] = []
    expected = make_held_out(128).loss(model)
    held_out, limited = make_held_out(128), Limited(model, 40)
    assert held_out.loss(limited, told.append) == pytest.approx(expected, abs=1e-6)
    assert told[0] == 64
    assert held_out.budget == told[-1]
    again: list[int] = []
    assert held_out.loss(limited, again.append) == pytest.approx(expected, abs=1e-6)
    assert again == []


@pytest.mark.parametrize("measure", [HeldOut.loss, HeldOut.rehearse])
@pytest.mark.parametrize("training", [True, False])
def test_memory_that_ends_leaves_the_model_as_it_was(
    make_held_out: MakeHeldOut, make_model: Any, measure: Callable[..., Any], training: bool
) -> None:
    limited = Limited(make_model(), 25).train(training)
    told: list[int] = []
    measure(make_held_out(128), limited, told.append)
    assert told
    assert limited.training == training


def test_if_not_even_one_sample_fits_the_error_is_raised_and_the_model_is_as_it_was(
    make_held_out: MakeHeldOut, make_model: Any
) -> None:
    limited = Limited(make_model(), 3).train()
    with pytest.raises(
        HardwareError, match=r"data.valid: one sample alone is too much .* \d+ tokens; fix: lower"
    ):
        make_held_out(4).loss(limited)
    assert limited.training


@pytest.mark.parametrize("budget", [20, 64, 100, 4096])
def test_the_rehearsal_is_one_batch_that_takes_as_much_memory_as_any(
    make_held_out: MakeHeldOut, make_model: Any, budget: int
) -> None:
    limited, held_out = Limited(make_model()), make_held_out(budget)
    held_out.rehearse(limited)
    (rehearsed,) = limited.seen
    held_out.loss(limited)
    assert rehearsed == max(limited.seen[1:])


def test_the_rehearsal_finds_the_budget_that_the_measurement_needs(
    make_held_out: MakeHeldOut, make_model: Any
) -> None:
    limited, held_out = Limited(make_model(), 60), make_held_out(128)
    rehearsed: list[int] = []
    measured: list[int] = []
    held_out.rehearse(limited, rehearsed.append)
    held_out.loss(limited, measured.append)
    assert rehearsed
    assert measured == []


def test_it_counts_its_samples(make_held_out: MakeHeldOut, make_model: Any) -> None:
    assert len(make_held_out(64)) == len(TALKS)
    assert not HeldOut(make_held_out(64).objective, (), 64)
