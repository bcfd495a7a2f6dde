"""Attention by code for bf16: as near to float64 as PyTorch's own, at any lengths, and what happens without."""

import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from techniques import watched
from torch import Tensor
from torch.library import opcheck

from tunewright.fast import _bf16_attention, _native, attention, process

LACKING = _native.why_not("_bf16_attention")
needs_code = pytest.mark.skipif("the processor" in LACKING, reason=LACKING)
MODULE = SimpleNamespace(is_causal=True, num_key_value_groups=2, training=True)
SCALE = 0.2
FP32, NOTHING = 2.4e-6, 1e-12
"""What sums in fp32 are off by, in any order: all there is to see where a gradient is nothing in float64, as of one token."""


def some(lengths: Sequence[int], heads: int, groups: int, width: int, left: int = 0, size: float = 1) -> Any:
    """Query, key, value [1, H or G, M, D] and the output's gradient [1, H, M, D], laid out as models have them."""
    torch.manual_seed(0)
    tokens = sum(lengths) + left
    made = (torch.randn(1, tokens, n, width).bfloat16() for n in (heads, groups, groups, heads))
    query, key, value, grad = (x.transpose(1, 2) for x in made)
    return query * size, key, value, grad


Prefixes = Sequence[tuple[int, int]]


def by_formula(
    given: Any, lengths: Sequence[int], dtype: torch.dtype, prefixes: Prefixes = ()
) -> list[Tensor]:
    """Output and gradients, each sample alone, after what it goes on from, in such numbers by PyTorch."""
    query, key, value = (x.detach().to(dtype).requires_grad_() for x in given[:3])
    repeats, outs = query.shape[1] // key.shape[1], []
    bounds = itertools.pairwise(itertools.accumulate(lengths, initial=0))
    for (first, last), (source, count) in zip(bounds, prefixes or [(0, 0)] * len(lengths), strict=True):
        before, own = slice(source, source + count), slice(first, last)
        q, k, v = (torch.cat([x[:, :, before], x[:, :, own]], 2) for x in (query, key, value))
        k, v = (x.repeat_interleave(repeats, 1) for x in (k, v))
        outs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE)[:, :, count:])
    out = torch.cat(outs, 2)
    return [
        out.detach(),
        *torch.autograd.grad(out, (query, key, value), given[3][:, :, : sum(lengths)].to(dtype)),
    ]


def ours(given: Any, lengths: Sequence[int], prefixes: Prefixes = ()) -> list[Tensor]:
    query, key, value = (x.detach().requires_grad_() for x in given[:3])
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0)
    shared = torch.tensor(prefixes) if prefixes else None
    out = _bf16_attention.in_a_row(query, key, value, ends, SCALE, shared).transpose(1, 2)
    return [out.detach(), *torch.autograd.grad(out, (query, key, value), given[3])]


def assert_as_near_as_plain(given: Any, lengths: Sequence[int], prefixes: Prefixes = ()) -> None:
    exact, plain = (by_formula(given, lengths, kind, prefixes) for kind in (torch.float64, torch.bfloat16))
    whole = sum(lengths)
    for own, expected, other in zip(ours(given, lengths, prefixes), exact, plain, strict=True):
        error, allowed = ((x[:, :, :whole] - expected[:, :, :whole]).norm() for x in (own, other))
        assert error <= (1.1 * allowed if expected.norm() > NOTHING else FP32)
        assert not own[:, :, whole:].any()


SHARED = (90, 1, 40, 70, 33, 5), ((0, 0), (0, 64), (0, 90), (0, 0), (131, 65), (131, 7))


@needs_code
@pytest.mark.parametrize("lengths", [(1,), (1, 2, 31, 32, 33, 63, 64, 65, 1), (300, 5, 129), (500,)], ids=str)
def test_any_lengths(lengths: tuple[int, ...]) -> None:
    assert_as_near_as_plain(some(lengths, 3, 1, 64, left=9), lengths)


@needs_code
@pytest.mark.parametrize("width", _bf16_attention._WIDTHS)
@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (3, 3), (4, 1), (6, 2)])
def test_any_heads(heads: int, groups: int, width: int) -> None:
    assert_as_near_as_plain(some((70, 100), heads, groups, width), (70, 100))


@needs_code
@pytest.mark.parametrize("width", _bf16_attention._WIDTHS)
@pytest.mark.parametrize(
    ("lengths", "prefixes"),
    [SHARED, ((64, 64), ((0, 0), (0, 64))), ((1, 1), ((0, 0), (0, 1))), ((200, 3), ((0, 0), (0, 199)))],
    ids=str,
)
def test_samples_go_on_from_tokens_of_others(
    lengths: tuple[int, ...], prefixes: tuple[tuple[int, int], ...], width: int
) -> None:
    assert_as_near_as_plain(some(lengths, 6, 2, width, left=7), lengths, prefixes)


@needs_code
def test_scores_that_leave_one_key_all_the_attention() -> None:
    assert_as_near_as_plain(some((150,), 2, 1, 64, size=100), (150,))


@needs_code
def test_sums_do_not_depend_on_threads() -> None:
    given, threads = some(SHARED[0], 4, 2, 64), torch.get_num_threads()
    try:
        found = [(torch.set_num_threads(n), ours(given, *SHARED))[1] for n in (1, 2, 3)]
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@needs_code
def test_matrix_products_before_and_after_are_not_disturbed() -> None:
    """The tiles of PyTorch's own kernels are set as they were."""
    one, other = torch.randn(300, 100).bfloat16(), torch.randn(100, 200).bfloat16()
    before, given = one @ other, some((65,), 2, 1, 64)
    ours(given, (65,))
    assert torch.equal(one @ other, before)


@needs_code
def test_operations_are_what_they_are_declared_to_be() -> None:
    query, key, value, grad = some((40, 13), 4, 2, 32, left=5)
    ends, prefixes = torch.tensor([0, 40, 53], dtype=torch.int32), torch.tensor([[0, 0], [0, 20]])
    for shared in (None, prefixes):
        opcheck(_bf16_attention.attend, (query.requires_grad_(), key, value, ends, shared, SCALE))
        made = _bf16_attention.attend(query.detach(), key, value, ends, shared, SCALE)
        opcheck(
            _bf16_attention.attend_backward,
            (query.detach(), key, value, *made, grad, ends, shared, SCALE),
        )


@needs_code
@pytest.mark.parametrize("in_one_row", [True, False])
def test_models_reach_it(in_one_row: bool) -> None:
    """A batch of two is two samples in a row; layouts that are no row's are copied."""
    _bf16_attention.prepare()
    given = some((50, 50), 4, 2, 32)
    expected = by_formula(given, (50, 50), torch.float64)
    more = {"cu_seq_lens_q": torch.tensor([0, 50, 100], dtype=torch.int32)} if in_one_row else {}
    shape = (1, 100) if in_one_row else (2, 50)
    rows = (x.transpose(1, 2).reshape(*shape, -1, 32).transpose(1, 2) for x in given)
    query, key, value, grad = (x.contiguous() for x in rows)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    with watched() as seen:
        out, _ = (
            attention.attention(MODULE, *leaves, None, scaling=SCALE)
            if not more
            else attention.attention(MODULE, *leaves, None, scaling=SCALE, **more)
        )
        found = [out.transpose(1, 2), *torch.autograd.grad(out, leaves, grad.transpose(1, 2))]
    assert {"tunewright::bf16_attention", "tunewright::bf16_attention_backward"} <= set(seen.called)
    for own, exact in zip(found, expected, strict=True):
        flat = own.transpose(1, 2).reshape(1, 100, -1, 32).transpose(1, 2)
        assert (flat - exact).norm() < 6e-3 * exact.norm()


@needs_code
def test_other_heads_and_other_numbers_go_another_way() -> None:
    _bf16_attention.prepare()
    query, *_ = some((5,), 1, 1, 48)
    assert not _bf16_attention.fits(query)
    assert not _bf16_attention.fits(torch.randn(1, 1, 5, 64))
    ends = torch.tensor([0, 5])
    with pytest.raises(ValueError, match="48"):
        _bf16_attention.attend(query, query, query, ends, None, SCALE)


# Without


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Any:
    """Asked as the first time on a machine."""
    monkeypatch.setenv("TUNEWRIGHT_CACHE", str(tmp_path))
    monkeypatch.setattr(_native, "BUILT", set())
    monkeypatch.setattr(_native, "library", _native.library.__wrapped__)
    return _native.why_not.__wrapped__


@pytest.mark.parametrize(
    ("compiler", "said"), [("no-such-compiler", "no C++ compiler"), ("false", "compiler says: 1")]
)
@needs_code
def test_without_a_compiler_that_works(
    anew: Any, monkeypatch: Any, tmp_path: Any, compiler: str, said: str
) -> None:
    monkeypatch.setenv("CXX", compiler)
    assert said in anew("_bf16_attention")
    assert not _bf16_attention.fits(some((5,), 1, 1, 64)[0])
    assert not list(tmp_path.rglob("*.*"))


def test_without_instructions_for_bf16(anew: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(_native, "cpu_flags", lambda: {"avx2", "avx512f"})
    assert anew("_bf16_attention") == "the processor has no avx512_bf16"


@needs_code
def test_without_matrix_units_it_is_as_near(anew: Any, monkeypatch: Any) -> None:
    """What a processor with units has besides, AVX-512, is enough."""
    without = _native.cpu_flags() - set(_native._UNITS)
    monkeypatch.setattr(_native, "cpu_flags", lambda: without)
    assert anew("_bf16_attention") == ""
    assert_as_near_as_plain(some((300, 5, 129), 4, 2, 64, left=9), (300, 5, 129))
    assert anew("_amx_products") == "the processor has no amx_bf16"


@needs_code
def test_a_c_compiler_will_do(anew: Any, monkeypatch: Any) -> None:
    """Some libraries set CXX to gcc."""
    monkeypatch.setenv("CXX", "gcc")
    assert anew("_bf16_attention") == ""


@needs_code
def test_it_is_built_once(anew: Any, monkeypatch: Any, tmp_path: Any) -> None:
    assert anew("_bf16_attention") == ""
    (built,) = tmp_path.rglob("*.*")
    changed = built.stat().st_mtime_ns
    monkeypatch.setattr(_native, "_build", lambda *given: pytest.fail("built again"))
    assert anew("_bf16_attention") == ""
    assert built.stat().st_mtime_ns == changed


def test_doctor_says_what_attention_is_computed_by() -> None:
    assert process.settings()["own code for attention"] == (LACKING or "yes")
