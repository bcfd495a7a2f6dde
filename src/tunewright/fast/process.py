"""How the process itself is set for computing on a CPU: memory that is kept, threads that have a core, no denormals.

glibc gives large blocks back to the system when they are freed, and the next ones are filled with zeros anew, page by
page: on a CPU that is a first-order cost of training, where every layer makes and drops the same blocks at each step.
Kept, they are reused.
"""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from tunewright.core.machine import cores
from tunewright.core.words import Words
from tunewright.fast import Technique, Work, _bf16_attention, _native, arena
from tunewright.models import wide

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4  # of glibc's malloc.h
_KEEP = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1, _TOP_PAD: 64 << 20}
_GIVE_BACK = {_MMAP_MAX: 65536, _TRIM_THRESHOLD: 32 << 20, _TOP_PAD: 128 << 10, _MMAP_THRESHOLD: 32 << 20}
_MADV_DONTNEED = 4
_TOLD_UNITS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")
_MAPS, _WEIGHTS = Path("/proc/self/maps"), ".safetensors"
_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


class Process(Technique):
    """Set while training runs, and set back after it."""

    idea = Words(
        "Freed memory is kept for the next step; as many threads as there are cores; no denormals.",
        "释放的内存留给下一步复用；线程数等于可用核数；不计算非规格化数。",
    )

    def why_not(self, work: Work) -> str:
        """It is for CPUs, where memory comes from glibc."""
        if work.device.type != "cpu":
            return "the device has its own allocator"
        return "" if _libc() else "the C library is not glibc"

    @contextmanager
    def on(self, work: Work) -> Iterator[None]:
        """Process-wide: other threads' allocations are kept, too."""
        libc, threads = _libc(), torch.get_num_threads()
        torch.set_flush_denormal(True)
        torch.set_num_threads(min(threads, cores()))
        _set(libc, _KEEP)
        try:
            yield
        finally:
            _set(libc, _GIVE_BACK)
            libc.malloc_trim(0)
            torch.set_num_threads(threads)
            torch.set_flush_denormal(False)


def _libc() -> Any:
    """The C library, if it is the one whose settings these are."""
    if platform.libc_ver()[0] != "glibc":
        return None
    libc = ctypes.CDLL(None)
    libc.malloc_trim.argtypes = [ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


def _set(libc: Any, options: dict[int, int]) -> None:
    for option, value in options.items():
        libc.mallopt(option, value)


def huge_pages() -> str:
    """always, madvise or never; empty where that is not known."""
    with suppress(OSError):
        return _PAGES.read_text().partition("[")[2].partition("]")[0]
    return ""


def mapped_files() -> list[range]:
    """Addresses of files of weights: what lies there is read from its file when it is needed."""
    if not _MAPS.exists():
        return []
    lines = [line.split() for line in _MAPS.read_text().splitlines() if line.endswith(_WEIGHTS)]
    return [range(*(int(part, 16) for part in line[0].split("-"))) for line in lines]


def let_go_of_files() -> None:
    """Weights that are mapped from a file and were copied elsewhere no longer count as this process's memory.

    Pages that nothing has written are dropped; where they are needed after all they are read again. Nor do those that
    were converted as they were read, and have been freed.
    """
    if not (libc := _libc()):
        return
    first = last = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        bounds, _, rest = line.partition(" ")
        if "-" in bounds:
            ours = rest.endswith(_WEIGHTS)
            first, last = (int(part, 16) for part in bounds.split("-")) if ours else (0, 0)
        elif last and bounds == "Anonymous:" and rest.split()[0] == "0":
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_DONTNEED)
    libc.malloc_trim(0)


def settings() -> dict[str, Any]:
    """What a training would compute with here, for ``tunewright doctor``."""
    flags = _native.cpu_flags()
    return {
        "threads": min(torch.get_num_threads(), cores()),
        "keeps freed memory": bool(_libc()),
        "huge pages": huge_pages() or "unknown",
        "matrix units": [name for name in _TOLD_UNITS if name in flags],
        "bf16 products": "in fp32" if not wide.why_not() else "the processor's own",
        "own code for attention": _bf16_attention.prepare() or "yes",
        "large tensors apart": arena.prepare() or "yes",
    }
