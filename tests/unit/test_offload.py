"""Activations that wait elsewhere: the same bits, memory within the budget, and nothing left behind."""

import gc
import os
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from activations import MODELS, TOKENS, assert_same, counted, learn, make, tokens, work
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from tunewright.core.errors import StorageError
from tunewright.fast._spill_file import SpillFile
from tunewright.fast.checkpointing import Checkpointing
from tunewright.fast.offload import Offload

KIB = 1 << 10


@pytest.fixture
def x() -> Tensor:
    """256 KiB."""
    return torch.randn(256, 256, generator=torch.Generator().manual_seed(0), requires_grad=True)


def left_in(folder: Path) -> list[str]:
    """The files in a folder, and those that are open there without a name."""
    opened = []
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # that of the listing itself
            opened.append(str(link.readlink()))
    return [*map(str, folder.rglob("*.*")), *(name for name in opened if name.startswith(str(folder)))]


# The same numbers


@pytest.mark.parametrize("budget", [0, 2_000_000])
@pytest.mark.parametrize("kind", MODELS)
def test_loss_and_gradients_are_those_of_plain_training(kind: str, budget: int, tmp_path: Path) -> None:
    model = make(kind)
    plain = learn(model)
    with Offload(budget).on(work(model, tmp_path)):
        for _ in range(2):
            assert_same(learn(model), plain)
    assert_same(learn(model), plain)


def test_with_checkpointing_the_inputs_of_blocks_are_moved(tmp_path: Path) -> None:
    model = make("lora with dropout")
    plain = learn(model)
    job = work(model, tmp_path)
    with Offload(0).on(job) as shelf, Checkpointing(0).on(job) as selection:
        assert_same(learn(model), plain)
        loss = model(input_ids=tokens(), labels=tokens(), use_cache=False).loss
        moved = shelf.away
        assert_same(learn(model), plain)
        assert selection.chosen(TOKENS)
        assert loss.requires_grad
    with Offload(0).on(job) as shelf:
        loss = model(input_ids=tokens(), labels=tokens(), use_cache=False).loss
        assert loss.requires_grad
        assert 0 < moved < shelf.away / 2


def test_views_come_back_with_their_strides_and_share_one_copy(tmp_path: Path, x: Tensor) -> None:
    model = nn.Linear(2, 2)
    with Offload(0).on(work(model, tmp_path)) as shelf:
        whole = x * 1
        views = [whole.t(), whole[1:, ::2], whole.view(128, 512)]
        kept = [shelf.pack(view) for view in views]
        assert shelf.away == 256 * KIB
        for view, packed in zip(views, kept, strict=True):
            back = shelf.unpack(packed)
            assert torch.equal(back, view)
            assert (back.stride(), back.storage_offset()) == (view.stride(), view.storage_offset())
            assert back.data_ptr() != view.data_ptr()


def test_a_gradient_that_is_a_kept_tensor_outlives_the_next_pass(tmp_path: Path, x: Tensor) -> None:
    class Ready(torch.autograd.Function):
        """Its gradient is formed forwards, as that of a loss may be."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x * 2)
            return (x * x).sum()

        @staticmethod
        def backward(ctx: Any, _: Tensor) -> Tensor:
            return ctx.saved_tensors[0]

    other = torch.ones_like(x).requires_grad_()
    with Offload(0).on(work(nn.Linear(2, 2), tmp_path)):
        Ready.apply(x).backward()
        Ready.apply(other).backward()
        assert torch.equal(x.grad, x.detach() * 2)
    assert torch.equal(x.grad, x.detach() * 2)


# What it saves


@pytest.mark.parametrize("kind", MODELS)
def test_memory_stays_within_the_budget(kind: str, tmp_path: Path) -> None:
    model = make(kind)
    with counted(model) as kept:
        learn(model)
    budget = kept() // 3
    with Offload(budget).on(work(model, tmp_path)) as shelf:
        loss = model(input_ids=tokens(), labels=tokens(), use_cache=False).loss
        assert budget - 200 * KIB < shelf.here <= budget
        assert shelf.away > kept() / 3
        loss.backward()
        assert shelf.here == shelf.away == 0


def test_what_is_moved_is_freed(tmp_path: Path, x: Tensor) -> None:
    with Offload(0).on(work(nn.Linear(2, 2), tmp_path)):
        inner = x.exp()
        freed = weakref.ref(inner)
        out = inner.sin().sum()
        del inner
        assert freed() is None
        out.backward()
    assert torch.equal(x.grad, x.detach().exp().cos() * x.detach().exp())


def test_what_stays_is_freed_without_a_backward_pass(tmp_path: Path, x: Tensor) -> None:
    """An exponential keeps its own output, which has the exponential for its origin."""
    with Offload(0).on(work(nn.Linear(2, 2), tmp_path)):
        small = x[:1].clone().exp()
        storage = StorageWeakRef(small.untyped_storage())
        del small
        assert storage.expired()


def test_parameters_and_small_tensors_stay(tmp_path: Path) -> None:
    model = nn.Linear(256, 256)
    with Offload(0).on(work(model, tmp_path)) as shelf:
        out = model(torch.ones(32, 256, requires_grad=True)).exp()  # 32 KiB; the weight has 256
        assert shelf.away == 0
        model.weight.data = model.weight.data.clone()
        out = model(out)
        assert shelf.away == 0
        out.sum().backward()


def test_nothing_is_moved_where_all_fits(tmp_path: Path) -> None:
    model = make()
    with Offload().on(work(model, tmp_path)) as shelf:
        loss = model(input_ids=tokens(), labels=tokens(), use_cache=False).loss
        assert shelf.here > 1_000_000
        assert shelf.away == 0
        loss.backward()


# The file


def test_the_file_is_gone_at_the_end(tmp_path: Path) -> None:
    model = make()
    with Offload(0).on(work(model, tmp_path)):
        learn(model)
        assert len(left_in(tmp_path)) == 1
    assert left_in(tmp_path) == []


def test_each_pass_writes_over_the_last(tmp_path: Path) -> None:
    with SpillFile(tmp_path) as file:
        held = [file.put(torch.full((5000,), float(i)).untyped_storage()) for i in range(3)]
        end = file.end
        assert end == 3 * 20480
        again = torch.empty(0).set_(held[1].get(torch.device("cpu")), 0, (5000,), (1,))
        assert again.eq(1).all()
        held.clear()
        assert file.end == end  # one is still read
        del again
        gc.collect()
        assert file.end == 0


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    with SpillFile(tmp_path) as file:
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(StorageError, match="No space left"):
            file.put(torch.ones(5000).untyped_storage())


def test_why_not(tmp_path: Path) -> None:
    assert Offload().why_not(work(make(), tmp_path)) == ""
    assert "meta" in Offload().why_not(work(make().to("meta"), tmp_path))
