"""Samples in one row on a GPU: what PyTorch's kernel is asked for, where it is not, and on a GPU what it gives.

Where there is none, a stand-in of plain sums takes the kernel's place below ``varlen_attn``, and gives what the kernel does:
nothing of use where no sample lies.
"""

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from techniques import SHAPE, batch, learn, watched, work
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.attention import varlen
from transformers import LlamaConfig, LlamaForCausalLM

from tunewright.data.tokens import LENGTH
from tunewright.fast import _causal, _flash_attention, attention
from tunewright.fast import _packed_attention as packed
from tunewright.fast.packing import Packing
from tunewright.fast.shared_prompts import SharedPrompts

SCALE = 0.3
KERNEL, BACKWARD = "torch_attn::_varlen_attn", "torch_attn::_varlen_attn_backward"
MODULE = SimpleNamespace(is_causal=True, num_key_value_groups=2, training=True)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def samples(bounds: Tensor, *tensors: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
    """Where each lies, and its part of tensors [M, H or G, D] as [1, H or G, T, D]."""
    for first, last in itertools.pairwise(bounds.tolist()):
        if last > first:
            yield slice(first, last), [x[first:last].transpose(0, 1)[None] for x in tensors]


def forwards(
    query: Tensor, key: Tensor, value: Tensor, begin: Tensor, begin_keys: Tensor, most: int, most_keys: int,
    causal: bool, scale: float, window: list[int], gqa: bool = False, *others: object,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    assert torch.equal(begin, begin_keys)
    assert begin.dtype == torch.int32
    assert max(begin.diff().tolist()) <= most == most_keys
    assert (causal, window, gqa) == (True, [-1, 0], query.shape[1] != key.shape[1])
    out = torch.full_like(query, torch.nan)
    for where, parts in samples(begin, query, key, value):
        out[where] = _causal.forward(*parts, scale)[0][0].transpose(0, 1)
    return out, query.new_zeros(query.shape[1], len(query)), torch.zeros(2, dtype=torch.uint64)


def backwards(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor, begin: Tensor,
    begin_keys: Tensor, most: int, most_keys: int, causal: bool, chance: Tensor, scale: float, window: list[int],
) -> tuple[Tensor, ...]:  # fmt: skip
    made = tuple(torch.full_like(x, torch.nan) for x in (query, key, value))
    for where, parts in samples(begin, query, key, value, grad):
        for whole, part in zip(made, _causal.backward(*parts, scale), strict=True):
            whole[where] = part[0].transpose(0, 1)
    return made


@pytest.fixture
def kernel() -> Iterator[None]:
    assert varlen  # it defines both
    with torch.library._scoped_library("torch_attn", "IMPL") as library:
        library.impl("_varlen_attn", forwards, "CPU")
        library.impl("_varlen_attn_backward", backwards, "CPU")
        yield


@pytest.fixture
def taken(kernel: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU counts as a GPU to attention."""
    monkeypatch.setattr(attention, "_on_cpu", lambda tensor_or_work: False)
    monkeypatch.setattr(_flash_attention, "why_not", lambda device, dtype: "")
    monkeypatch.setattr(_flash_attention, "_KINDS", (torch.float32, torch.float64))


def some(heads: int, groups: int, tokens: int, width: int = 8, **kind: Any) -> list[Tensor]:
    """Query, key and value [1, H or G, M, D], laid out as models have them, and the output's gradient [1, M, H, D]."""
    torch.manual_seed(0)
    made = [torch.randn(1, tokens, n, width, **kind) for n in (heads, groups, groups, heads)]
    return [*(x.transpose(1, 2).requires_grad_() for x in made[:3]), made[3]]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2)])
@pytest.mark.parametrize("left", [0, 5])
def test_each_sample_sees_itself_alone(
    kernel: None, heads: int, groups: int, left: int, compiled: bool
) -> None:
    """As by the code for a CPU, also where the row is filled up."""
    ends = torch.tensor([0, 5, 17, 18, 27], dtype=torch.int32)
    *given, grad = some(heads, groups, 27 + left)
    grad[:, 27:] = 0
    own = _flash_attention.attention
    way = torch.compile(own, backend="aot_eager", dynamic=True, fullgraph=True) if compiled else own
    outs = [f(*given, ends, SCALE) for f in (way, packed.attention)]
    torch.testing.assert_close(outs[0][:, :27], outs[1][:, :27])
    assert outs[0].isfinite().all()
    for mine, expected in zip(*(torch.autograd.grad(out, given, grad) for out in outs), strict=True):
        torch.testing.assert_close(mine, expected)


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).train()


def test_training_by_it_is_training(taken: None) -> None:
    """Packed batches have the losses and gradients of padded ones, and those all of one length as well."""
    model = llama()
    for given in (batch(9, 40, 17, 3), batch(12, 12)):
        with Packing().on(work(model)), watched() as seen:
            losses_N, grads = learn(model, given)
        assert {KERNEL, BACKWARD} <= set(seen.called)
        expected_N, expected = learn(model, given)
        torch.testing.assert_close(losses_N, expected_N)
        for name, grad in expected.items():
            torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-6)


def test_it_is_asked_for_only_where_samples_are_in_one_row(taken: None) -> None:
    model = llama()
    with attention.Attention().on(work(model)), watched() as seen:
        learn(model, batch(9, 12))
    assert KERNEL not in seen.called
    assert not [name for name in seen.called if name.startswith("tunewright::")]


@pytest.mark.parametrize("odd", ["dropout", "wide heads", "odd heads", "wider values"])
def test_what_the_kernel_has_no_code_for_goes_by_a_mask(taken: None, odd: str) -> None:
    width = {"wide heads": 256, "odd heads": 12}.get(odd, 8)
    query, key, value, _ = some(4, 2, 20, width)
    if odd == "wider values":
        value = some(4, 2, 20, 16)[2]
    ends = torch.tensor([0, 6, 20], dtype=torch.int32)
    dropout = 1e-9 if odd == "dropout" else 0.0
    with watched() as seen:
        out, _ = attention.attention(MODULE, query, key, value, None, dropout, SCALE, cu_seq_lens_q=ends)
    assert KERNEL not in seen.called
    expected = F.scaled_dot_product_attention(
        query, key, value, packed.mask(ends, 20), scale=SCALE, enable_gqa=True
    )
    torch.testing.assert_close(out, expected.transpose(1, 2))


def test_every_tensor_is_where_the_row_is() -> None:
    """Shapes on a GPU that is not there, forwards alone: what mixes devices is told."""
    with FakeTensorMode(), torch.no_grad():
        *given, _ = some(4, 2, 32, device="cuda", dtype=torch.bfloat16)
        ends = torch.tensor([0, 5, 30], dtype=torch.int32, device="cuda")
        out, _ = attention.attention(MODULE, *given, None, scaling=SCALE, cu_seq_lens_q=ends)
    assert (out.shape, out.device.type) == ((1, 32, 4, 8), "cuda")


def test_a_kernel_that_does_not_compute_is_told_in_its_own_words() -> None:
    _flash_attention._says.cache_clear()
    told = _flash_attention._says(torch.device("cpu"), torch.float32)  # PyTorch has it for no CPU
    assert told.startswith("PyTorch's kernel for samples in one row says: ")
    assert "_flash_attention_forward" in told
    _flash_attention._says.cache_clear()


def test_a_kernel_that_computes_is_asked_once(kernel: None) -> None:
    _flash_attention._says.cache_clear()
    with watched() as seen:
        assert _flash_attention._says(torch.device("cpu"), torch.float32) == ""
        assert _flash_attention._says(torch.device("cpu"), torch.float32) == ""
    assert seen.called.count(KERNEL) == seen.called.count(BACKWARD) == 1
    _flash_attention._says.cache_clear()


def test_numbers_that_it_is_not_for_are_told() -> None:
    assert "16-bit" in _flash_attention.why_not(torch.device("cuda"), torch.float32)


def test_other_devices_are_told() -> None:
    assert "this device" in _flash_attention.why_not(torch.device("mps"), torch.bfloat16)
    model = llama().to("meta")
    for technique in (attention.Attention(), Packing(), SharedPrompts()):
        assert "this device" in technique.why_not(work(model))


@needs_gpu
@pytest.mark.parametrize(("heads", "groups", "width"), [(4, 4, 64), (9, 3, 64), (4, 2, 128), (2, 1, 192)])
def test_on_a_gpu_it_is_as_near_to_exact_as_plain_attention(heads: int, groups: int, width: int) -> None:
    ends = torch.tensor([0, 5, 300, 301, 420], dtype=torch.int32)
    *given, grad = some(heads, groups, 512, width)
    grad[:, 420:] = 0

    def computed(dtype: torch.dtype, way: Any) -> list[Tensor]:
        inputs = [x.detach().to("cuda", dtype).requires_grad_() for x in given]
        out = way(*inputs, ends.cuda(), SCALE)
        return [
            out.detach()[:, :420].double().cpu(),
            *(x.double().cpu() for x in torch.autograd.grad(out, inputs, grad.to("cuda", dtype))),
        ]

    def masked(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, scale: float) -> Tensor:
        mask = packed.mask(ends, query.shape[2])
        out = F.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=True)
        return out.transpose(1, 2)

    ways = computed(torch.bfloat16, _flash_attention.attention), computed(torch.bfloat16, masked)
    for own, other, exact in zip(*ways, computed(torch.float64, masked), strict=True):
        assert (own - exact).norm() <= 1.1 * (other - exact).norm()


@needs_gpu
def test_on_a_gpu_samples_are_packed() -> None:
    model = llama().to("cuda", torch.bfloat16)
    given = {name: x if name == LENGTH else x.cuda() for name, x in batch(9, 40, 17, 3).items()}
    assert Packing().why_not(work(model, given)) == ""
    expected_N, _ = learn(model, given)
    with Packing().on(work(model, given)), watched() as seen:
        losses_N, _ = learn(model, given)
    assert {KERNEL, BACKWARD} <= set(seen.called)
    torch.testing.assert_close(losses_N, expected_N, rtol=5e-2, atol=5e-2)
