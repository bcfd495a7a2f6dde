"""Selective checkpointing: the same bits, fewer bytes, and the cheapest of them first."""

from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from activations import LAYERS, MODELS, TOKENS, assert_same, counted, learn, make, tokens, work
from counted import Counted
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from tunewright.fast._recomputation import Candidate, Meter, choose, peak
from tunewright.fast.checkpointing import PRODUCTS, Checkpointing, again
from tunewright.fast.checkpointing import kept as results_kept
from tunewright.models import anatomy


def bytes_kept(model: Any) -> int:
    with counted(model) as kept:
        learn(model)
    return kept()


def block(model: Any, number: int) -> Any:
    return anatomy.blocks(model)[number][1]


# The same numbers


@pytest.mark.parametrize("share", [0.0, 0.6])
@pytest.mark.parametrize("kind", MODELS)
def test_loss_and_gradients_are_those_of_plain_training(kind: str, share: float, tmp_path: Path) -> None:
    model = make(kind)
    plain, narrow = learn(model), learn(model, rows=2)
    budget = int(share * bytes_kept(model))
    with Checkpointing(budget).on(work(model, tmp_path)) as selection:
        assert_same(learn(model, rows=2), narrow)
        for _ in range(3):
            assert_same(learn(model), plain)
        assert_same(learn(model, rows=2), narrow)
        assert selection.chosen(TOKENS)
    assert_same(learn(model), plain)


def test_measuring_and_answering_go_the_plain_way(tmp_path: Path) -> None:
    model = make()
    with Checkpointing(0).on(work(model, tmp_path)) as selection:
        with torch.no_grad():
            model(tokens())
        model.eval()(tokens()).logits.sum().backward()
        filled = model.train()(tokens(), use_cache=True).past_key_values
        assert filled.get_seq_length() == tokens().shape[1]
        assert not selection.measured


def test_a_pass_between_forwards_and_backwards_changes_nothing(tmp_path: Path) -> None:
    """Blocks are computed again whole in the first pass, and only in parts in the second."""
    model = make()
    plain = learn(model)
    with Checkpointing(bytes_kept(model) // 3).on(work(model, tmp_path)) as selection:
        learn(model)
        assert selection.chosen(TOKENS) & {name for name, _ in anatomy.blocks(model)}
        assert not selection.chosen(TOKENS // 4)
        loss = model(input_ids=tokens(), labels=tokens(), use_cache=False).loss
        learn(model, rows=1)
        model.zero_grad()
        loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters()}
    assert_same((loss.detach(), found), plain)


# What is chosen


def candidate(name: str, seconds: float, saved: int, needed: int = 0) -> Candidate:
    return Candidate(name, name.partition(".")[0], seconds, saved, needed)


CANDIDATES = [
    candidate("0", 5.0, 100), candidate("0.attention", 1.0, 40), candidate("0.mlp", 3.5, 50),
    candidate("1", 4.0, 100), candidate("1.attention", 2.0, 40), candidate("1.mlp", 1.5, 50),
]  # fmt: skip


def names(budget: int, candidates: list[Candidate] = CANDIDATES) -> list[str]:
    return sorted(c.name for c in choose(candidates, 200, budget))


def test_the_fewest_seconds_per_byte_come_first() -> None:
    assert names(170) == ["0.attention"]
    assert names(120) == ["0.attention", "1.mlp"]
    dear = [
        candidate("2", 1.1, 45),
        candidate("3", 1.2, 60),
        candidate("4", 1.3, 40),
        candidate("5", 1.5, 100),
    ]
    assert names(60, dear) == ["3", "5"]


def test_nothing_is_computed_again_where_all_fits() -> None:
    assert names(200) == []


def test_a_block_comes_in_place_of_its_parts() -> None:
    assert names(60) == ["0.attention", "1"]
    assert names(0) == ["0", "1"]


def test_all_that_saves_anything_is_computed_again_where_nothing_fits() -> None:
    assert names(-1) == ["0", "1"]
    assert names(-1, [*CANDIDATES, candidate("2", 0.0, 0), candidate("3", 0.0, -5)]) == ["0", "1"]


def test_what_later_choices_made_needless_is_not_computed_again() -> None:
    assert names(100, [candidate("0", 1.0, 20), candidate("1", 10.0, 100)]) == ["1"]


def test_what_is_computed_again_needs_its_bytes_meanwhile() -> None:
    large = [candidate("0", 1.0, 100, 90), candidate("1", 3.0, 90, 90)]
    assert peak(200, large) == 100
    assert names(150, large) == ["0", "1"]


# What it saves


def test_what_is_kept_elsewhere_too_is_not_saved() -> None:
    meter, x = Meter(frozenset(), torch.device("cpu")), torch.ones(1000, requires_grad=True)

    def block(x: Tensor) -> Tensor:
        return meter.call("0.part", torch.exp, x).sin()  # both keep the exponential, neither its argument

    with saved_tensors_hooks(meter.pack, lambda kept: kept):
        meter.call("0", block, x)
    found, kept = meter.candidates("0")
    assert kept == 4000
    assert {c.name: (c.saved, c.needed) for c in found} == {"0": (0, 4000), "0.part": (-4000, 4000)}


@pytest.mark.parametrize("kind", MODELS)
def test_bytes_fall_as_told(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moments = count()  # by seconds the first choice may be a whole block, which is the second as well
    monkeypatch.setattr(Meter, "_now", lambda meter: float(next(moments)))
    model = make(kind)
    plain = bytes_kept(model)
    told = []
    for share in (0.9, 0.6, 0.0):
        with Checkpointing(int(share * plain)).on(work(model, tmp_path)) as selection:
            learn(model)
            found = bytes_kept(model)
        chosen = selection.chosen(TOKENS)
        told.append(sum(c.saved for c in selection.candidates(TOKENS) if c.name in chosen))
        assert plain - found == pytest.approx(told[-1], rel=1e-3)  # positions are kept once for all blocks
    assert 0 < told[0] < told[1] < told[2]
    assert chosen == {name for name, _ in anatomy.blocks(model)}


def test_fewer_tokens_have_less_computed_again(tmp_path: Path) -> None:
    model = make()
    with Checkpointing(bytes_kept(model) // 2).on(work(model, tmp_path)) as selection:
        learn(model)
        assert selection.chosen(TOKENS)
        assert not selection.chosen(TOKENS // 4)


def test_more_tokens_are_measured_anew(tmp_path: Path) -> None:
    model = make()
    with Checkpointing(0).on(work(model, tmp_path)) as selection:
        learn(model, rows=1)
        few = dict(selection.measured)
        learn(model)
    assert {m.tokens for m in few.values()} == {TOKENS // 4}
    assert {m.tokens for m in selection.measured.values()} == {TOKENS}
    for name, measured in selection.measured.items():
        assert measured.kept == pytest.approx(4 * few[name].kept, rel=0.05)


def test_every_block_and_part_is_measured(tmp_path: Path) -> None:
    model = make()
    with Checkpointing(1 << 40).on(work(model, tmp_path)) as selection:
        learn(model)
        assert selection.chosen(TOKENS) == frozenset()
    whole = [name for name, _ in anatomy.blocks(model)]
    parts = [f"{name}.{part}" for name in whole for part in ("self_attn", "mlp")]
    candidates = selection.candidates(TOKENS)
    assert sorted(c.name for c in candidates) == sorted([*whole, *parts])
    for c in candidates:
        assert 0 < c.saved < c.needed
        assert c.seconds > 0


def test_layers_without_gradients_are_not_computed_again(tmp_path: Path) -> None:
    model = make().requires_grad_(False)
    block(model, LAYERS - 1).requires_grad_(True)
    plain = learn(model)
    with Checkpointing(0).on(work(model, tmp_path)) as selection:
        learn(model)
        assert_same(learn(model), plain)
        assert selection.chosen(TOKENS) == {anatomy.blocks(model)[-1][0]}


def test_modules_get_their_own_methods_back(tmp_path: Path) -> None:
    model = make()
    mlp = block(model, 0).mlp
    own = mlp.forward = partial(mlp.forward)
    with Checkpointing(0).on(work(model, tmp_path)):
        assert mlp.forward is not own
        learn(model)
    assert [m for m in model.modules() if "forward" in vars(m)] == [mlp]
    assert mlp.forward is own


def test_a_compiled_block_computes_the_same(tmp_path: Path) -> None:
    model = make("lora with dropout")
    plain = learn(model)
    with Checkpointing(bytes_kept(model) // 2).on(work(model, tmp_path)):
        for _, layer in anatomy.blocks(model):
            layer.compile(backend="eager")
        for _ in range(2):
            assert_same(learn(model), plain)


def test_why_not(tmp_path: Path) -> None:
    model = make()
    assert Checkpointing().why_not(work(model, tmp_path)) == ""
    assert "no decoder blocks" in Checkpointing().why_not(work(torch.nn.Linear(2, 2), tmp_path))
    model.activation_checkpointing_enable()
    assert "every block" in Checkpointing().why_not(work(model, tmp_path))


def test_products_may_be_all_that_is_kept() -> None:
    """As a compiled block does that has room for them."""
    x, up, down = (torch.randn(*shape, requires_grad=True) for shape in ((4, 8), (8, 16), (16, 8)))

    def block(states: Tensor) -> Tensor:
        return (states @ up).sin().exp().cos() @ down

    def kept(way: Callable[[], Tensor]) -> int:
        with Counted() as counted:
            out = way()
            bytes_kept = counted.live
            out.sum().backward()
        return bytes_kept

    plain, gradient = kept(lambda: block(x)), up.grad
    up.grad = None
    with results_kept(PRODUCTS):
        products = kept(lambda: again(block, x))
    assert torch.equal(up.grad, gradient)
    nothing = kept(lambda: again(block, x))
    wide, out = 4 * 16 * 4, 4 * 8 * 4
    assert (nothing, products, plain) == (out, out + wide, out + 3 * wide)
