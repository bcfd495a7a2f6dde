"""Losses and gradients without all logits: those of float64, in parts of any size, for every kind of output layer."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from counted import Counted
from peft import LoraConfig, get_peft_model
from techniques import SHAPE, assert_near, batch, learn, watched, work
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
)

from tunewright.fast import _native, cross_entropy
from tunewright.fast.cross_entropy import CrossEntropy
from tunewright.models import likelihood

WORDS, WIDTH = 200, 12


class Bigram(nn.Module):
    """The smallest language model: a token's embedding is its hidden state."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.states, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS, bias=bias)

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.head(self.states(input_ids)))

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def bigram(bias: bool = True) -> Bigram:
    torch.manual_seed(0)
    return Bigram(bias)


def rows(count: int) -> dict[str, Tensor]:
    """A token each, so that gradients of embeddings are those of hidden states."""
    torch.manual_seed(1)
    return {"input_ids": torch.arange(count)[None], "labels": torch.randint(0, WORDS, (1, count))}


def llama(**own: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, **own)).train()


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 8 rows, gradients of 4 and softmax of 3 at a time."""
    for name, rows in (("_MOST_ROWS", 8), ("_GRADIENT_ROWS", 4), ("_SOFTMAX_ROWS", 3)):
        monkeypatch.setattr(cross_entropy, name, rows)


def exact(model: Bigram, given: dict[str, Tensor], counts_N: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """In float64, by way of all logits."""
    double = bigram(model.head.bias is not None).double()
    logits_NV = double.head(double.states(given["input_ids"][0]))
    losses_N = F.cross_entropy(logits_NV, given["labels"][0], reduction="none")
    (losses_N * counts_N).sum().backward()
    return losses_N.detach(), {n: p.grad for n, p in double.named_parameters() if p.grad is not None}


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("uneven", [True, False])
@pytest.mark.parametrize("count", [1, 3, 4, 7, 8, 9, 30])
def test_it_is_as_in_float64_however_the_rows_are_parted(count: int, uneven: bool, bias: bool) -> None:
    """Weights of rows may differ, as where advantages weigh tokens: the gradient is made anew then."""
    model, given = bigram(bias), rows(count)
    counts_N = torch.linspace(-1.0, 3.0, count) if uneven else torch.full((count,), 0.7)
    losses_N = cross_entropy.losses(model, given)
    (losses_N * counts_N).sum().backward()
    found = {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
    assert_near((losses_N.detach().double(), found), exact(model, given, counts_N), 2e-6)


@pytest.mark.parametrize("trained", ["states", "head.weight", "head.bias"])
@pytest.mark.parametrize("uneven", [True, False])
def test_what_is_frozen_gets_no_gradient(trained: str, uneven: bool) -> None:
    model, given = bigram(), rows(9)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(trained))
    counts_N = torch.linspace(1.0, 2.0, 9) if uneven else torch.ones(9)
    (cross_entropy.losses(model, given) * counts_N).sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    (name,) = found
    expected = exact(model, given, counts_N)[1][name]
    torch.testing.assert_close(found[name].double(), expected, rtol=1e-5, atol=1e-6)


def test_a_label_that_is_hardly_possible_has_a_finite_loss() -> None:
    """Its probability is no number of fp32; its logarithm is."""
    model = bigram()
    given = {"input_ids": torch.tensor([[0, 1]]), "labels": torch.tensor([[5, 6]])}
    with torch.no_grad():
        model.head.bias[7] = 150.0
    losses_N = cross_entropy.losses(model, given)
    losses_N.sum().backward()
    expected = F.cross_entropy(
        model(given["input_ids"], False).logits[0].double(), given["labels"][0], reduction="none"
    )
    assert expected.min() > -torch.log(torch.tensor(1e-40, dtype=torch.float64))
    torch.testing.assert_close(losses_N.double(), expected, rtol=1e-6, atol=0)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_nothing_to_learn_is_no_loss_and_no_gradient() -> None:
    model, given = bigram(), rows(4)
    given["labels"] = torch.full_like(given["labels"], likelihood.IGNORED)
    losses_N = cross_entropy.losses(model, given)
    assert losses_N.shape == (0,)
    losses_N.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.usefixtures("small_parts")
def test_no_full_logits_are_ever_held() -> None:
    model, given = bigram(), rows(100)
    for way, largest in ((cross_entropy.losses, WORDS * WIDTH), (likelihood.plain, WORDS * 100)):
        with watched() as seen:
            way(model, given).mean().backward()
        assert seen.largest == largest  # the weight's own gradient, but for the plain way


@pytest.mark.usefixtures("small_parts")
def test_measuring_makes_no_gradient() -> None:
    model, given = bigram(), rows(100)
    with torch.no_grad(), watched() as seen:
        losses_N = cross_entropy.losses(model, given)
    assert seen.largest == WORDS * 8
    torch.testing.assert_close(losses_N, likelihood.plain(model, given).detach())


def test_labels_that_count_unevenly_need_one_gradient_of_the_weights_at_a_time() -> None:
    def most(counts_N: Tensor) -> int:
        model, given = bigram(), rows(100)
        with Counted() as seen:
            (cross_entropy.losses(model, given) * counts_N).sum().backward()
        return seen.most

    more = most(torch.linspace(-1.0, 3.0, 100)) - most(torch.ones(100))
    assert more < WORDS * WIDTH * 4


def test_a_gradient_of_the_gradient_is_refused() -> None:
    """It would be wrong: the first one is made of numbers."""
    model = bigram()
    (gradient,) = torch.autograd.grad(
        cross_entropy.losses(model, rows(4)).square().sum(), model.states.weight, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def test_the_loss_does_not_change_the_model() -> None:
    model, given = bigram(), rows(4)
    own = model.head.forward = lambda states: nn.Linear.forward(model.head, states)
    cross_entropy.losses(model, given)
    assert model.head.forward is own
    del model.head.forward
    with pytest.raises(IndexError):
        cross_entropy.losses(model, {**given, "input_ids": torch.tensor([[WORDS]])})
    assert "forward" not in vars(model.head)


HEADS = {
    "lora": {"target_modules": ["q_proj", "lm_head"]},
    "whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("kind", HEADS)
def test_an_adapted_head_makes_logits_where_labels_are(kind: str) -> None:
    torch.manual_seed(0)
    model = get_peft_model(llama(), LoraConfig(r=4, init_lora_weights=False, **HEADS[kind]))
    given = batch(20, 13)
    plain = learn(model, given)
    shapes: list[torch.Size] = []
    assert CrossEntropy().why_not(work(model)) == ""
    with CrossEntropy().on(work(model)):
        hook = model.get_output_embeddings().register_forward_hook(lambda *seen: shapes.append(seen[2].shape))
        found = learn(model, given)
        hook.remove()
    assert shapes[-1] == (int((given["labels"] != likelihood.IGNORED).sum()), SHAPE["vocab_size"])
    assert_near(found, plain)
    assert any("lm_head" in name for name in found[1])


def test_under_autocast_it_is_as_near_as_the_plain_way() -> None:
    model, given = llama(), batch(20, 13)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain, own = likelihood.plain(model, given), cross_entropy.losses(model, given)
    torch.testing.assert_close(own, plain, rtol=1e-3, atol=1e-3)


def test_held_out_losses_are_the_same() -> None:
    model = llama().eval()
    with torch.no_grad(), CrossEntropy().on(work(model)):
        own = likelihood.token_losses(model, batch(20, 13))
    torch.testing.assert_close(own, likelihood.plain(model, batch(20, 13)).detach())


CHANGED = {
    "capped": lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=30.0)),
    "scaled": lambda: CohereForCausalLM(CohereConfig(**SHAPE, logit_scale=0.0625)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", CHANGED)
def test_a_model_that_changes_its_logits_is_refused(kind: str, dtype: torch.dtype) -> None:
    """Also where they are still so small that capping hardly shows."""
    torch.manual_seed(0)
    model = CHANGED[kind]().to(dtype)
    for share in (1.0, 1e-3):
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(share)
        assert "changes its logits" in CrossEntropy().why_not(work(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_that_could_but_does_not_is_taken(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=None))
    assert CrossEntropy().why_not(work(model.to(dtype))) == ""


def test_a_model_without_an_output_layer_is_refused() -> None:
    assert CrossEntropy().why_not(work(LlamaModel(LlamaConfig(**SHAPE)))) == "the model has no output layer"


# The softmax of bf16 logits, by code for the processor


CODED = _native.why_not("_softmax") == ""
needs_code = pytest.mark.skipif(not CODED, reason=_native.why_not("_softmax"))
Pair = tuple[Tensor, Tensor]


def by_code_and_plain(
    logits_CV: Tensor, labels_C: Tensor, monkeypatch: pytest.MonkeyPatch
) -> tuple[Pair, Pair]:
    """Losses and gradients either way."""
    coded, plain = logits_CV.clone(), logits_CV.clone()
    found = cross_entropy._to_gradients(coded, labels_C, True), coded
    monkeypatch.setattr(_native, "BUILT", set())
    return found, (cross_entropy._to_gradients(plain, labels_C, True), plain)


@needs_code
@pytest.mark.parametrize("words", [1, 15, 16, 17, 100, 32_003])
def test_by_code_it_is_as_near_to_float64_as_by_pytorch(words: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(words)
    logits_CV, labels_C = (torch.randn(7, words) * 6).bfloat16(), torch.randint(0, words, (7,))
    labels_C[0] = logits_CV[0].argmax()
    leaf = logits_CV.double().requires_grad_()
    exact_C = F.cross_entropy(leaf, labels_C, reduction="none")
    exact_C.sum().backward()
    for losses_C, grads_CV in by_code_and_plain(logits_CV, labels_C, monkeypatch):
        torch.testing.assert_close(losses_C.double(), exact_C.detach(), rtol=1e-5, atol=2e-6)
        assert (grads_CV - leaf.grad).norm() <= 2e-3 * leaf.grad.norm() + 1e-6


@needs_code
def test_by_code_words_that_cannot_come_and_numbers_that_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    logits_CV = torch.randn(6, 40).bfloat16()
    logits_CV[0, ::2] = -torch.inf
    logits_CV[1, 3], logits_CV[2, 39] = torch.nan, torch.inf
    logits_CV[3] = 0
    logits_CV[3, 5], logits_CV[4] = 3e38, -100
    labels_C = torch.tensor([1, 0, 0, 5, 7, 0])
    (coded, grads_CV), (plain, plain_CV) = by_code_and_plain(logits_CV, labels_C, monkeypatch)
    torch.testing.assert_close(coded, plain, equal_nan=True)
    torch.testing.assert_close(grads_CV, plain_CV, equal_nan=True)
    assert coded.isfinite().tolist() == [True, False, False, True, True, True]


@needs_code
def test_by_code_logits_are_left_alone_where_no_gradient_is_needed() -> None:
    logits_CV = torch.randn(5, 33).bfloat16()
    before = logits_CV.clone()
    cross_entropy._to_gradients(logits_CV, torch.arange(5), False)
    assert torch.equal(logits_CV, before)


@needs_code
def test_by_code_rows_may_lie_apart() -> None:
    wide_CV, labels_C = torch.randn(5, 64).bfloat16(), torch.arange(5)
    narrow_CV = wide_CV[:, :40].clone()
    expected = cross_entropy._to_gradients(narrow_CV, labels_C, True)
    rest = wide_CV[:, 40:].clone()
    assert torch.equal(cross_entropy._to_gradients(wide_CV[:, :40], labels_C, True), expected)
    assert torch.equal(wide_CV[:, :40], narrow_CV)
    assert torch.equal(wide_CV[:, 40:], rest)


def test_the_room_of_logits_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "_rooms", {})
    model = llama()
    with CrossEntropy().on(work(model)):
        learn(model, batch(9, 12))
        (room_CV,) = cross_entropy._rooms.values()
        learn(model, batch(30, 2))
        assert next(iter(cross_entropy._rooms.values())) is room_CV
    assert not cross_entropy._rooms
