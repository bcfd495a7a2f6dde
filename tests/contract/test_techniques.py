"""Every speed technique on every architecture: the same losses and gradients as without it, and no trace afterwards."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch

from tunewright import fast, methods
from tunewright.data.tokens import LENGTH, SAMPLE
from tunewright.models import likelihood
from tunewright.models.announce import announced
from tunewright.recipes import plugin_config

METHODS = {"full": {"name": "full"}, "lora": {"name": "lora", "rank": 4},
           "partial": {"name": "partial", "last": 1}}  # fmt: skip
ASKED = {"frozen_layers": "partial", "lora_linear": "lora"}
"""Techniques that have something to do with one method only; all others with full fine-tuning."""
EXACT = 1e-5
COMPILED = ("llama",)
"""Compiling takes seconds each."""
Found = tuple[torch.Tensor, dict[str, torch.Tensor]]


def batch(seed: int) -> dict[str, torch.Tensor]:
    """Three rows, the last two padded at the right; the first words are not learned, two rows begin with the same."""
    torch.manual_seed(seed)
    ids, labels = torch.randint(5, 200, (3, 40)), torch.full((3, 40), likelihood.IGNORED)
    ids[1, :15] = ids[0, :15]
    for row, (length, learned) in enumerate(((40, 14), (31, 14), (12, 4))):
        ids[row, length:] = 0
        labels[row, learned : length - 1] = ids[row, learned + 1 : length]
    return {
        "input_ids": ids,
        "labels": labels,
        SAMPLE: torch.arange(3) + 3 * seed,
        LENGTH: torch.tensor([40, 31, 12]),
    }


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """``make(architecture, method, dtype)`` is the model as the loop has it, its adapters moved off their start."""
    made = {
        name: maker(vocab_size=200, initializer_range=0.1).state_dict()
        for name, maker in architectures.ARCHITECTURES.items()
    }

    def model(architecture: str, method: str, dtype: torch.dtype) -> Any:
        torch.manual_seed(0)
        base = architectures.ARCHITECTURES[architecture](vocab_size=200, initializer_range=0.1)
        base.load_state_dict(made[architecture])
        choice = METHODS[method]
        adapted = methods.create(choice, plugin_config("methods", choice)).apply(base.to(dtype))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        return adapted.train()

    return model


def work(model: Any, folder: Path) -> fast.Work:
    def batches() -> Iterator[fast.Batch]:
        yield batch(0)

    portion = fast.Portion(64, 64, lambda tokens: 0.0, lambda tokens: None)
    return fast.Work(model, 1000, 100_000, 3.0, batches, folder, portion)


def learned(model: Any, seed: int = 0) -> Found:
    """The mean loss and all gradients."""
    given = batch(seed)
    with announced(model, given):
        loss = likelihood.token_losses(model, given).mean()
    loss.backward()
    found = {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach().double(), found


def farthest(one: Found, other: Found) -> float:
    """The largest difference of the losses, and of any gradient as a share of its norm."""
    assert one[1].keys() == other[1].keys()
    shares = [((one[1][n] - g).norm() / g.norm().clamp_min(1e-6)).item() for n, g in other[1].items()]
    return max(abs(one[0] - other[0]).item(), *shares)


def cases() -> list[Any]:
    return [
        pytest.param(name, architecture, id=f"{name}-{architecture}")
        for name in fast.names()
        for architecture in architectures.ARCHITECTURES
        if name != "compile" or architecture in COMPILED
    ]


@pytest.mark.filterwarnings("default")  # torch._dynamo looks at .grad of what it traces, and warns itself
@pytest.mark.parametrize(("name", "architecture"), cases())
def test_nothing_about_the_result_changes(
    make: Callable[..., Any], tmp_path: Path, name: str, architecture: str
) -> None:
    method = ASKED.get(name, "full")
    model = make(architecture, method, torch.float32)
    given = work(model, tmp_path)
    if reason := fast.technique(name).why_not(given):
        assert architecture in REFUSED.get(name, ()), reason
        return
    plain = learned(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with fast.using({n: n == name for n in fast.names()}, given, lambda reasons: None):
        assert farthest(learned(model), plain) < EXACT
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert all(value.is_contiguous() for value in after.values())
    again = learned(model)
    assert torch.equal(again[0], plain[0])
    assert all(torch.equal(again[1][n], gradient) for n, gradient in plain[1].items())
    assert not list(tmp_path.rglob("*"))


REFUSED = {
    "attention": ("gpt-neo",),  # its attention cannot be exchanged
    "packing": ("gpt-neo",),
    "shared_prompts": ("gpt-neo",),
    "lora_linear": ("gpt2",),  # its layers are Conv1D
    "micro_batch": tuple(architectures.ARCHITECTURES),  # the number was given
    "weight_gradients": tuple(
        architectures.ARCHITECTURES
    ),  # they are of bf16; tests/unit/test_weight_gradients.py
    "wide_products": tuple(architectures.ARCHITECTURES),  # fp32 has no bf16 products; tests/unit/test_wide.py
}


@pytest.mark.parametrize("architecture", architectures.ARCHITECTURES)
@pytest.mark.parametrize("name", [name for name in fast.names() if name != "compile"])
def test_in_bf16_it_is_as_near_to_the_exact_result_as_the_plain_path(
    make: Callable[..., Any], tmp_path: Path, name: str, architecture: str
) -> None:
    """In the mean of several batches: the worst gradient of one is noise itself."""
    method, seeds = ASKED.get(name, "full"), range(4)
    precise, model = (make(architecture, method, torch.bfloat16) for _ in range(2))
    exact = [learned(precise.float(), seed) for seed in seeds]

    def error() -> float:
        return sum(farthest(learned(model, seed), right) for seed, right in zip(seeds, exact, strict=True))

    plain, given = error(), work(model, tmp_path)
    if fast.technique(name).why_not(given):
        return
    with fast.using({n: n == name for n in fast.names()}, given, lambda reasons: None):
        assert error() < 1.5 * plain


def test_all_together_nothing_changes(make: Callable[..., Any], tmp_path: Path) -> None:
    """As in a recipe that says nothing, but for compiling."""
    model = make("llama", "lora", torch.float32)
    plain, told = learned(model), []
    switches = dict.fromkeys(("compile",), False)
    with fast.using(switches, work(model, tmp_path), told.append):
        assert farthest(learned(model), plain) < EXACT
    on = {name for name, reason in told[0].items() if not reason}
    assert {"attention", "cross_entropy", "lora_linear", "process"} <= on
    assert told[0]["compile"] == "switched off"
    assert told[0]["frozen_layers"]


def test_off_is_off(make: Callable[..., Any], tmp_path: Path) -> None:
    model, told = make("llama", "lora", torch.float32), []
    with fast.using(False, work(model, tmp_path), told.append):
        learned(model)
    assert set(told[0].values()) == {"switched off"}


@pytest.mark.filterwarnings("default")
def test_compiled_with_everything_else_it_is_the_same(make: Callable[..., Any], tmp_path: Path) -> None:
    """Lengths differ from step to step: one compilation serves all."""
    model = make("llama", "lora", torch.float32)
    plain = learned(model)
    with fast.using({"compile": True}, work(model, tmp_path), lambda reasons: None):
        assert farthest(learned(model), plain) < EXACT
