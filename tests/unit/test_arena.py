"""Memory of large tensors apart: what is taken is whole and its own, what is freed is used again, and nothing is lost."""

import mmap
import random
import threading
from pathlib import Path

import pytest
import torch
from techniques import work
from torch import nn

from tunewright import fast
from tunewright.fast import arena, process
from tunewright.fast.arena import Arena

LACKING = arena.prepare()
needs_arena = pytest.mark.skipif(bool(LACKING), reason=LACKING)
MODEL = nn.Linear(2, 2)
MB = 1 << 20


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def block(megabytes: float) -> torch.Tensor:
    return torch.empty(int(megabytes * MB), dtype=torch.uint8)


@needs_arena
def test_large_tensors_lie_there_and_small_ones_do_not() -> None:
    with Arena().on(work(MODEL)):
        before = arena.told().taken
        small, large = block(1 / 32), block(3)
        assert arena.told().taken == before + 3 * MB
        assert large.data_ptr() % 64 == 0
        del large
        assert arena.told().taken == before
    assert len(small) == MB // 32


@needs_arena
def test_a_whole_stage_lies_there_and_its_training_does_not_end_it() -> None:
    before = arena.told().taken
    with arena.around({"packing": False}):
        loaded = block(2)
        with Arena().on(work(MODEL)):
            learned = block(3)
        measured = block(4)
        assert arena.told().taken == before + 9 * MB
        del learned
    after = block(5)
    assert arena.told().taken == before + 6 * MB
    assert len(loaded) + len(measured) + len(after) == 11 * MB


@needs_arena
def test_what_is_free_can_be_let_go_of_before_the_stage_ends() -> None:
    with arena.around(True):
        kept, gone = block(64).fill_(1), block(256).fill_(1)
        del gone
        held = resident()
        arena.let_go()
        assert held - resident() > 200 * MB
        assert int(kept[-1]) == 1
        again = block(256).fill_(2)
        del again
        assert held - resident() < 20 * MB
    arena.let_go()  # where there is none it does nothing


@pytest.mark.parametrize("switches", [False, {"arena": False}])
def test_switched_off_it_is_for_no_part_of_a_stage(switches: fast.Switches) -> None:
    before = arena.told().taken if not LACKING else 0
    with arena.around(switches):
        held = block(2)
        assert LACKING or arena.told().taken == before
    assert len(held) == 2 * MB


@needs_arena
def test_tensors_that_come_and_go_keep_what_was_written_into_them() -> None:
    """Random sizes in random order: no two share a byte, and what is free becomes whole again."""
    draw = random.Random(0)
    with Arena().on(work(MODEL)):
        before, held = arena.told().taken, list[tuple[int, torch.Tensor]]()
        for number in range(600):
            if held and draw.random() < 0.5:
                mark, tensor = held.pop(draw.randrange(len(held)))
                assert bool((tensor == mark).all())
            else:
                held.append((number % 251, block(1 + 5 * draw.random()).fill_(number % 251)))
        assert all(bool((tensor == mark).all()) for mark, tensor in held)
        assert arena.told().taken >= before + sum(len(tensor) for _, tensor in held)
        reach = arena.told().reach
        held.clear()
        del tensor
        assert arena.told().taken == before
        whole = block((reach - before) / MB - 64)
        assert arena.told().reach == reach
        assert len(whole) > 0


@needs_arena
def test_the_same_step_again_needs_no_more_memory_however_many_small_blocks_stay() -> None:
    lasting, reaches = [], []
    with Arena().on(work(MODEL)):
        for step in range(12):
            held = [block(20 + step % 3) for _ in range(4)]
            lasting += [torch.zeros(12_000) for _ in range(20)]
            del held[1], held[0]
            held.append(block(50))
            reaches.append(arena.told().reach)
            held.clear()
    assert len(set(reaches[2:])) == 1


@needs_arena
def test_what_else_is_mapped_does_not_lie_in_its_way() -> None:
    with Arena().on(work(MODEL)):
        more = arena.told().reach / MB + 64
        first = block(more)
        others = [mmap.mmap(-1, 64 * MB) for _ in range(4)]
        second = block(more + 64)
        reach = arena.told().reach
        del first, second
        whole = block(2 * more)
        assert arena.told().reach == reach
    assert len(whole) == int(2 * more * MB)
    assert len(others) == 4


@needs_arena
def test_what_outlives_it_stays_valid_and_is_given_back_later() -> None:
    with Arena().on(work(MODEL)):
        kept = block(9).fill_(7)
        taken = arena.told().taken
    assert bool((kept == 7).all())
    block(9).fill_(3)
    assert bool((kept == 7).all())
    del kept
    assert arena.told().taken == taken - 9 * MB
    with Arena().on(work(MODEL)):
        assert bool((block(9).fill_(5) == 5).all())


@needs_arena
@pytest.mark.skipif(process.huge_pages() != "madvise", reason="huge pages are not to be asked for here")
def test_they_are_in_huge_pages() -> None:
    with Arena().on(work(MODEL)):
        at, within, flags = block(4).data_ptr(), False, list[str]()
        for line in Path("/proc/self/smaps").read_text().splitlines():
            bounds = line.split()[0]
            if "-" in bounds:
                first, last = (int(part, 16) for part in bounds.split("-"))
                within = first <= at < last
            elif within and line.startswith("VmFlags"):
                flags = line.split()
    assert "hg" in flags


@needs_arena
def test_threads_may_take_and_drop_at_once() -> None:
    wrong = []

    def churn(mark: int) -> None:
        for _ in range(100):
            tensor = block(1.5).fill_(mark)
            if not bool((tensor == mark).all()):
                wrong.append(mark)

    with Arena().on(work(MODEL)):
        before = arena.told().taken
        threads = [threading.Thread(target=churn, args=(mark,)) for mark in range(1, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert arena.told().taken == before
    assert not wrong


@needs_arena
def test_the_most_that_was_in_use_is_told_since_it_was_asked_last() -> None:
    with Arena().on(work(MODEL)):
        before = arena.told().taken
        arena.told()
        del_me = block(8)
        del del_me
        assert arena.told().most == before + 8 * MB
        assert arena.told().most == before


@needs_arena
def test_more_than_there_is_is_torchs_own_error() -> None:
    with (
        Arena().on(work(MODEL)),
        pytest.raises(RuntimeError, match=r"can't allocate memory|not enough memory"),
    ):
        torch.empty(1 << 60, dtype=torch.uint8)


def test_it_is_for_cpus() -> None:
    elsewhere = work(nn.Linear(2, 2, device="meta"))
    assert Arena().why_not(elsewhere) == "the device has its own allocator"
