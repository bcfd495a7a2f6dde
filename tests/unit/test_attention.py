"""Attention by large matrix products: outputs and gradients of float64, for one sample and for many in one row."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from techniques import SHAPE, batch, learn, watched, work
from torch import Tensor
from torch.library import opcheck
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tunewright.fast import _causal, attention, lora_linear
from tunewright.fast import _packed_attention as packed
from tunewright.fast.attention import Attention

OURS, BACKWARD = "tunewright::causal_attention", "tunewright::causal_attention_backward"
MODULE = SimpleNamespace(is_causal=True, num_key_value_groups=2, training=True)
Four = tuple[Tensor, Tensor, Tensor, Tensor]


def some(T: int, heads: int = 2, groups: int = 1, width: int = 16, rows: int = 2) -> Four:
    """Query, key, value and the gradient of the output, laid out as models have them."""
    torch.manual_seed(T)
    query, key, value = (
        torch.randn(rows, T, h, width).transpose(1, 2).requires_grad_() for h in (heads, groups, groups)
    )
    return query, key, value, torch.randn(rows, T, heads, width)


def exact(four: Four, scale: float) -> list[Tensor]:
    """Output [B, T, H, D] and the three gradients, by their formula in float64."""
    query, key, value = (x.detach().double().requires_grad_() for x in four[:3])
    repeats, T = query.shape[1] // key.shape[1], query.shape[2]
    keys, values = (x.repeat_interleave(repeats, 1) for x in (key, value))
    later_TT = torch.ones(T, T, dtype=torch.bool).triu(1)
    shares = (query @ keys.mT * scale).masked_fill(later_TT, -torch.inf).softmax(-1)
    out_BTHD = (shares @ values).transpose(1, 2)
    return [out_BTHD.detach(), *torch.autograd.grad(out_BTHD, (query, key, value), four[3].double())]


def found(four: Four, scale: float | None, **others: Any) -> list[Tensor]:
    query, key, value, grad = four
    out_BTHD, _ = attention.attention(MODULE, query, key, value, None, scaling=scale, **others)
    return [out_BTHD.detach(), *torch.autograd.grad(out_BTHD, (query, key, value), grad)]


def assert_exact(four: Four, scale: float | None = None, near: float = 2e-6) -> None:
    with watched() as seen:
        own = found(four, scale)
    assert {OURS, BACKWARD} <= set(seen.called)
    for x, expected in zip(own, exact(four, scale or four[0].shape[3] ** -0.5), strict=True):
        assert (x - expected).norm() < near * expected.norm()


@pytest.mark.parametrize("T", [2, 255, 256, 257, 600])
def test_any_length_is_as_in_float64(T: int) -> None:
    """Queries are worked on 256 at a time."""
    assert_exact(some(T))


@pytest.mark.parametrize("width", [16, 64, 80])
@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (3, 3), (3, 1), (6, 2), (8, 8), (8, 1)])
def test_any_heads_are_as_in_float64(heads: int, groups: int, width: int) -> None:
    assert_exact(some(70, heads, groups, width))


@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_a_scale_of_the_models_own(scale: float) -> None:
    assert_exact(some(270, width=8), scale)


def test_one_token_sees_itself() -> None:
    four = some(1)
    out, _, _, for_value = found(four, None)
    assert torch.equal(out, four[2].repeat_interleave(2, 1).transpose(1, 2))
    torch.testing.assert_close(for_value, four[3].sum(2, keepdim=True).transpose(1, 2))


def test_masks_are_kept_and_not_without_end() -> None:
    for queries in range(1, _causal._MOST_MASKS + 10):
        mask_1MS = _causal._mask(queries, queries + 1, 2, torch.float32)
    assert len(_causal._MASKS) <= _causal._MOST_MASKS
    assert _causal._mask(queries, queries + 1, 2, torch.float32) is mask_1MS
    assert mask_1MS.isfinite().sum() == 2 * sum(range(2, queries + 2))


FOUR = some(12)
OTHER = {
    "a mask": {"attention_mask": torch.ones(2, 1, 12, 12, dtype=torch.bool).tril(-1).logical_or(torch.eye(12).bool())},
    "dropout": {"dropout": 0.5},
    "a bias": {"position_bias": torch.randn(1, 2, 12, 12)},
    "all see all": {"is_causal": False},
    "a cache": {"query": FOUR[0][:, :, -3:]},
    "a token after a cache": {"query": FOUR[0][:, :, -1:]},
    "values of another width": {"value": torch.randn(2, 1, 12, 24)},
    "a query that nothing is learned of": {"query": FOUR[0].detach()},
}  # fmt: skip


def both(**given: Any) -> tuple[Tensor, Tensor, list[str]]:
    """Our output and that of transformers' own implementation, and what ours called."""
    asked = {"query": FOUR[0], "key": FOUR[1], "value": FOUR[2], "attention_mask": None, **given}
    torch.manual_seed(0)
    with watched() as seen:
        own, _ = attention.attention(MODULE, **asked)
    torch.manual_seed(0)
    return own, sdpa_attention_forward(MODULE, **asked)[0], seen.called


@pytest.mark.parametrize("kind", OTHER)
def test_what_is_not_plain_causal_attention_goes_the_plain_way(kind: str) -> None:
    own, plain, called = both(**OTHER[kind])
    assert torch.equal(own, plain)
    assert OURS not in called


def test_what_is_not_learned_from_goes_the_plain_way() -> None:
    assert OURS in both()[2]
    with torch.no_grad():
        own, plain, called = both()
    assert torch.equal(own, plain)
    assert OURS not in called


# Samples in one row


def assert_each_alone(lengths: tuple[int, ...], left: int, heads: int = 3, groups: int = 1) -> None:
    """In one row as each alone; tokens of no sample get nothing and give nothing."""
    ends = torch.tensor([0, *lengths]).cumsum(0)
    row = some(int(ends[-1]) + left, heads, groups, rows=1)
    scale = 0.3
    own = found(row, scale, cu_seq_lens_q=ends.to(torch.int32))
    for first, last in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        query, key, value = (x[:, :, first:last] for x in row[:3])
        expected = exact((query, key, value, row[3][:, first:last]), scale)
        parts = [own[0][:, first:last], *(x[:, :, first:last] for x in own[1:])]
        for x, alone in zip(parts, expected, strict=True):
            assert (x - alone).norm() <= 2e-6 * alone.norm().clamp_min(1e-3)
    assert not own[0][:, ends[-1] :].any()
    assert not any(x[:, :, ends[-1] :].any() for x in own[1:])


@pytest.mark.parametrize("lengths", [(1,), (1, 1, 2), (31, 32, 33), (300, 5, 256), (7, 90)])
@pytest.mark.parametrize("left", [0, 9])
def test_samples_in_one_row_are_as_each_alone(lengths: tuple[int, ...], left: int) -> None:
    assert_each_alone(lengths, left)


@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (8, 8), (8, 2)])
def test_samples_in_one_row_have_any_heads(heads: int, groups: int) -> None:
    assert_each_alone((3, 40), 4, heads, groups)


# Operations, as torch.compile sees them


def test_operations_are_what_they_are_declared_to_be() -> None:
    """Also with symbolic shapes; strides too, of outputs that are laid out otherwise than inputs."""
    for heads, groups, T in ((4, 2, 40), (3, 3, 20)):
        query, key, value, grad_BTHD = some(T, heads, groups, 8)
        grad = grad_BTHD.transpose(1, 2)
        opcheck(attention._attend, (query, key, value, 0.3))
        opcheck(attention._attend, (query.detach().contiguous().requires_grad_(), key, value, 0.3))
        opcheck(attention._backward, (query.detach(), key.detach(), value.detach(), grad, 0.3))


def test_operations_on_a_row_are_what_they_are_declared_to_be() -> None:
    query, key, value, grad_BTHD = some(64, 4, 2, 8, rows=1)
    ends = torch.tensor([0, 10, 13, 60], dtype=torch.int32)
    opcheck(packed.attend, (query, key, value, ends, 0.3))
    inputs = (query.detach(), key.detach(), value.detach())
    opcheck(packed.attend_backward, (*inputs, grad_BTHD.transpose(1, 2), ends, 0.3))


@pytest.mark.parametrize(("outputs", "apart"), [(12, False), (6, False), (6, True)])
def test_operations_of_lora_are_what_they_are_declared_to_be(outputs: int, apart: bool) -> None:
    """More outputs than inputs go another way than fewer; then B may lie apart from the weights."""
    x_MI, weight_NK = torch.randn(7, 8, requires_grad=True), torch.randn(outputs, 8 if apart else 8 + 5)
    added_NR = torch.randn(outputs, 5) if apart else torch.empty(0)
    sizes, ranks, scales = [outputs // 3, outputs - outputs // 3], [2, 3], [0.5, 2.0]
    ups = [torch.randn(size, rank, requires_grad=True) for size, rank in zip(sizes, ranks, strict=True)]
    down_RI = torch.randn(5, 8, requires_grad=True)
    opcheck(lora_linear._lora, (x_MI, weight_NK, added_NR, down_RI, ups, scales))
    given = (torch.randn(7, outputs), x_MI.detach(), torch.randn(7, 5), weight_NK, added_NR, down_RI.detach())
    for for_input in (True, False):
        opcheck(lora_linear._backward, (*given, sizes, ranks, scales, for_input))


# A model


def llama(**own: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, **own)).train()


def test_a_model_with_a_mask_of_padding_or_a_cache_computes_the_same() -> None:
    model, given = llama(), batch(9, 12)
    ids_BT, mask_BT = given["input_ids"], torch.tensor([[0] * 3 + [1] * 9, [1] * 12])

    def seen() -> list[Tensor]:
        full = model(input_ids=ids_BT, attention_mask=mask_BT)
        step = model(
            input_ids=ids_BT[:, -1:], past_key_values=model(input_ids=ids_BT[:, :-1]).past_key_values
        )
        return [full.logits[mask_BT.bool()], step.logits]

    plain = seen()
    with Attention().on(work(model)):
        own = seen()
    for one, other in zip(own, plain, strict=True):
        torch.testing.assert_close(one, other)


def test_an_error_within_gives_the_model_its_own_attention_back() -> None:
    model = llama()
    with pytest.raises(KeyError), Attention().on(work(model)):
        assert model.config._attn_implementation != "sdpa"
        raise KeyError
    assert model.config._attn_implementation == "sdpa"
    with watched() as seen:
        learn(model, batch(9, 12))
    assert OURS not in seen.called


@pytest.mark.parametrize("kind", ["eager", "flex_attention"])
def test_attention_that_was_chosen_is_left_alone(kind: str) -> None:
    model = llama(attn_implementation=kind)
    assert Attention().why_not(work(model)) == f"the model's attention is {kind}"


def test_other_devices_have_their_own() -> None:
    assert "this device" in Attention().why_not(work(llama().to("meta")))
