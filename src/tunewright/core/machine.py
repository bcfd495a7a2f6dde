"""What a run was made on and with: for manifests and reports."""

import os
import platform
import resource
from importlib import metadata
from pathlib import Path
from typing import Any

from tunewright.core import cgroups

_TOLD = ("tunewright", "torch", "transformers", "peft", "tokenizers", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """The versions of what computes."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in _TOLD}}


def hardware() -> dict[str, Any]:
    """Processor, cores, memory in bytes, accelerators."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"processor": processor(), "cores": cores(), "memory": memory, "accelerators": gpus}


def cores() -> int:
    """Cores that this process may use: fewer than there are if it is bound to some, or its container is limited."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(bound, round(cgroups.cores())))


def available_memory() -> int:
    """Bytes of memory that are free for a new process: the machine's, or the container's if that is less."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return min(int(line.split()[1]) * 1024, cgroups.memory_room())
    raise OSError("/proc/meminfo has no MemAvailable")


def own_limit() -> int:
    """Bytes that this process may hold by the limits set for it (``ulimit -v``, ``ulimit -d``); a huge number if none is."""
    limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    return min([limit for limit in limits if limit != resource.RLIM_INFINITY], default=1 << 62)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def identity() -> dict[str, Any]:
    """What floating-point sums depend on: the same on both sides, the same bits come out."""
    import torch

    gpus = hardware()["accelerators"]
    return {"processor": processor(), "threads": torch.get_num_threads(), "accelerators": gpus}


def processor() -> str:
    """The processor's name, as its maker gives it."""
    lines = _read(Path("/proc/cpuinfo")).splitlines()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
