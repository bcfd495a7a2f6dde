"""Signals, losses that jump, numbers that are not finite, memory that ends."""

import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from activations import GPT2, MODELS, TOKENS, counted, learn, make
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from tunewright.core.errors import InterruptedRunError
from tunewright.models.memory import fitting, is_out_of_memory
from tunewright.train import guard
from tunewright.train.guard import Preemption, is_spike, not_finite

SIGNALS = [signal.SIGINT, signal.SIGTERM]


# Signals


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Every test leaves the handlers as it found them."""
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_where_nothing_is_to_be_finished_a_signal_ends_the_run_at_once(number: int) -> None:
    after = []
    with pytest.raises(InterruptedRunError, match=signal.Signals(number).name) as caught, Preemption():
        send(number)
        after.append("went on")
    assert after == []
    assert caught.value.exit_code == 128 + number


@pytest.mark.parametrize("number", SIGNALS)
def test_a_patient_run_ends_itself(number: int, capfd: pytest.CaptureFixture[str]) -> None:
    with Preemption() as preemption:
        done = []
        with pytest.raises(InterruptedRunError, match="what was done is kept") as caught:
            with preemption.patient():
                assert preemption.asked == 0
                send(number)
                assert preemption.asked == number
                done.append("the step")
            done.append("went on")
        assert done == ["the step"]
        assert caught.value.exit_code == 128 + number
    assert capfd.readouterr().err == "\nstopping after this step, with a checkpoint of it\n"


def test_a_second_signal_changes_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with Preemption() as preemption:
        with pytest.raises(InterruptedRunError) as caught, preemption.patient():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
                send(number)
            assert preemption.asked == signal.SIGTERM
        send(signal.SIGINT)  # while the run is ending
        assert caught.value.exit_code == 143
    assert capfd.readouterr().err.count("stopping") == 1


def test_a_run_without_a_signal_ends_as_usual() -> None:
    with Preemption() as preemption:
        with preemption.patient():
            pass
        assert preemption.asked == 0


def test_an_error_within_is_not_hidden_by_a_signal() -> None:
    with Preemption() as preemption:
        with pytest.raises(ValueError, match="within"), preemption.patient():
            send(signal.SIGTERM)
            raise ValueError("within")
        assert preemption.asked == signal.SIGTERM


def test_after_a_patient_part_signals_end_the_run_at_once_again() -> None:
    with pytest.raises(InterruptedRunError, match="what was done is kept"), Preemption() as preemption:
        with preemption.patient():
            pass
        send(signal.SIGTERM)


def test_handlers_are_put_back_after_an_error_too() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError, match="within"), Preemption():
        assert signal.getsignal(signal.SIGTERM) != before
        raise ValueError("within")


def test_in_another_thread_signals_are_left_alone() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with Preemption() as preemption, preemption.patient():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


# Spikes


def noisy(mean: float, spread: float, count: int = guard.WINDOW, seed: int = 0) -> list[float]:
    return [float(x) for x in np.random.default_rng(seed).normal(mean, spread, count)]


def test_a_loss_far_above_those_before_it_is_a_spike() -> None:
    recent = noisy(2.0, 0.1)
    assert is_spike(recent, 10.0)
    assert is_spike(recent, 4.0)
    assert not is_spike(recent, 2.3)
    assert not is_spike(recent, max(recent))


def test_a_loss_far_below_is_none() -> None:
    assert not is_spike(noisy(2.0, 0.1), 0.0)
    assert not is_spike(noisy(2.0, 0.1), -50.0)


def test_the_first_losses_are_not_judged() -> None:
    recent = noisy(2.0, 0.01)
    assert not is_spike([], 1e9)
    assert not is_spike(recent[:31], 1e9)
    assert is_spike(recent[:32], 1e9)


@pytest.mark.parametrize("mean", [-40.0, -0.5, 0.0, 3.0])
def test_what_counts_is_the_distance_so_losses_may_be_negative(mean: float) -> None:
    recent = noisy(mean, 0.05)
    assert is_spike(recent, mean + 2.0)
    assert not is_spike(recent, mean + 0.2)
    assert not is_spike(recent, mean - 5.0)


def test_constant_losses_leave_room_for_small_changes() -> None:
    recent = [1.0] * guard.WINDOW
    assert not is_spike(recent, 1.0)
    assert not is_spike(recent, 1.25)
    assert is_spike(recent, 1.3)


def test_hard_batches_that_come_up_now_and_then_are_no_spikes() -> None:
    recent = noisy(1.0, 0.05)
    recent[5::16] = [4.0, 4.5, 4.2, 4.4]
    assert not is_spike(recent, 4.6)
    assert not is_spike(recent, 6.0)
    assert is_spike(recent, 12.0)


@pytest.mark.parametrize("seed", range(5))
def test_heavy_tails_raise_few_false_alarms(seed: int) -> None:
    """Student's t with three degrees of freedom, whose variance barely exists."""
    losses = 2.0 + 0.1 * np.random.default_rng(seed).standard_t(3, 2000)
    window = guard.WINDOW
    alarms = [
        i for i in range(window, 2000) if is_spike([float(x) for x in losses[i - window : i]], losses[i])
    ]
    assert len(alarms) <= 5  # of 1,936; a threshold of three deviations would call some 60


@pytest.mark.parametrize("seed", range(3))
def test_noise_alone_raises_no_alarm(seed: int) -> None:
    losses, window = noisy(2.0, 0.3, 2000, seed), guard.WINDOW
    assert not any(is_spike(losses[i - window : i], losses[i]) for i in range(window, 2000))


def test_a_falling_loss_raises_no_alarm_and_does_not_hide_a_spike() -> None:
    falling = [5.0 * 0.97**n + noise for n, noise in enumerate(noisy(0.0, 0.02, 200))]
    for i in range(len(falling)):
        assert not is_spike(falling[max(0, i - guard.WINDOW) : i], falling[i])
    assert is_spike(falling[100:164], falling[164] + 2.0)


# Numbers that are not finite

BAD = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", BAD)
def test_a_tensor_with_one_bad_number_is_named(dtype: torch.dtype, value: float) -> None:
    good, bad = torch.ones(3, 4, dtype=dtype), torch.ones(5, 2, dtype=dtype)
    bad[4, 1] = value
    assert not_finite([("good", good), ("bad", bad)]) == ["bad"]
    assert not_finite([("good", good), ("also good", good)]) == []


def test_all_bad_ones_are_named_in_order_whatever_their_types_and_shapes() -> None:
    tensors = {
        "scalar": torch.tensor(float("nan")),
        "integers": torch.tensor([1, 2]),
        "empty": torch.empty(0, 3),
        "half": torch.tensor([float("inf")], dtype=torch.bfloat16),
        "flags": torch.tensor([True]),
        "fine": torch.tensor([torch.finfo(torch.float32).max]),
        "whole": torch.tensor([[float("-inf")]]),
        "view": torch.tensor([[1.0, float("nan")], [2.0, 3.0]]).t()[1],
        "other part of it": torch.tensor([[1.0, float("nan")], [2.0, 3.0]]).t()[0],
    }
    assert not_finite(tensors.items()) == ["scalar", "half", "whole", "view"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_largest_numbers_are_finite(dtype: torch.dtype) -> None:
    assert not_finite([("large", torch.full((1000,), torch.finfo(dtype).max, dtype=dtype))]) == []
    assert not_finite([("small", torch.full((9,), torch.finfo(dtype).tiny / 2, dtype=dtype))]) == []


@pytest.mark.parametrize("tensors", [[], [torch.empty(0)], [torch.tensor([1, 2])]])
def test_where_there_is_nothing_to_look_at_nothing_is_wrong(tensors: list[torch.Tensor]) -> None:
    assert not_finite(("name", tensor) for tensor in tensors) == []


# Memory


class Allocator:
    """Work that needs as much memory as it is given."""

    def __init__(self, limit: int, error: BaseException) -> None:
        self.limit, self.error = limit, error
        self.tried: list[int] = []
        self.told: list[int] = []

    def __call__(self, budget: int) -> str:
        self.tried.append(budget)
        if budget > self.limit:
            raise self.error
        return f"done with {budget}"


CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: not enough memory: you tried")
ENDS = [CPU, MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")]


@pytest.mark.parametrize("error", ENDS, ids=["cpu", "python", "cuda"])
def test_the_budget_is_halved_until_it_fits(error: BaseException) -> None:
    work = Allocator(13, error)
    assert fitting(100, 1, work, work.told.append) == "done with 12"
    assert work.tried == [100, 50, 25, 12]
    assert work.told == [50, 25, 12]


def test_what_fits_at_once_is_not_told() -> None:
    work = Allocator(100, CPU)
    assert fitting(100, 1, work, work.told.append) == "done with 100"
    assert (work.tried, work.told) == ([100], [])


@pytest.mark.parametrize("error", ENDS, ids=["cpu", "python", "cuda"])
def test_if_the_least_does_not_fit_the_error_is_raised(error: BaseException) -> None:
    work = Allocator(2, error)
    with pytest.raises(type(error)) as caught:
        fitting(20, 3, work, work.told.append)
    assert caught.value is error
    assert work.tried == [20, 10, 5, 3]


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("not enough memory"), OSError()])
def test_other_errors_are_raised_at_once(error: Exception) -> None:
    work = Allocator(2, error)
    with pytest.raises(type(error)):
        fitting(20, 1, work)
    assert work.tried == [20]
    assert not is_out_of_memory(error)


def test_what_the_failed_try_held_is_free_before_the_next() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def work(budget: int) -> int:
        assert [ref() for ref in held] == [None] * len(held)
        tensor = torch.zeros(budget)
        held.append(weakref.ref(tensor))
        if budget > 10:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate")
        return len(tensor)

    assert fitting(40, 1, work) == 10


def test_torchs_own_refusal_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value)


# Memory that is plenty


PLAIN: dict[str, Callable[[], Any]] = {
    "llama": MODELS["llama"],
    "lora": lambda: get_peft_model(MODELS["llama"](), LoraConfig(target_modules="all-linear")),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_what_training_keeps_is_estimated_from_above_and_not_by_far(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    model = PLAIN[kind]().train()
    with counted(model) as kept:
        learn(model)
    for share, roomy in ((2.0, False), (5.0, True)):
        monkeypatch.setattr(guard, "available_memory", lambda share=share: int(share * kept()))
        assert guard.is_roomy(model, TOKENS) == roomy


def test_experts_in_one_tensor_dropout_and_other_devices_are_always_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(guard, "available_memory", lambda: 1 << 60)
    model = make()
    assert guard.is_roomy(model, TOKENS)
    assert not guard.is_roomy(model.to("meta"), TOKENS)
    assert not guard.is_roomy(make("gpt2 with dropout"), TOKENS)
    model = make()
    model.model.layers[0].experts = torch.nn.Parameter(torch.zeros(2, 3, 4))
    assert not guard.is_roomy(model, TOKENS)
