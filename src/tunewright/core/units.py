"""Numbers as people read and write them."""

import re
import resource
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")
_STATUS = Path("/proc/self/status")
_BYTES = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_SECONDS = {"s": 1, "m": 60, "h": 3600}


def human_percent(share: float) -> str:
    """``0.0123`` -> ``'1.2%'``; what is not zero never looks like it."""
    if 0 < share < 1e-4:
        return "<0.01%"
    return f"{share:.2%}" if 0 < share < 0.01 else f"{share:.1%}"


def human_perplexity(value: float) -> str:
    """Two decimals while they tell something."""
    return f"{value:.2f}" if value < 100 else human_count(value)


def human_bytes(count: float) -> str:
    """``1536`` -> ``'1.5 KB'`` (1 KB = 1,024 bytes)."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TB"


def human_seconds(seconds: float) -> str:
    """``75`` -> ``'1m15s'``."""
    if seconds < 60:
        return f"{seconds:.1f}s" if seconds < 10 else f"{seconds:.0f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"


def human_count(count: float) -> str:
    """``5_510_000`` -> ``'5.51 M'``."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= size * 0.9995:  # what rounds to 1000 is 1 of the next unit
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f}"


def parse_bytes(text: str) -> int:
    """``'24GB'``, ``'512 MiB'`` or ``'1000'`` as bytes; ValueError for anything else."""
    found = re.fullmatch(r"\s*([\d.]+)\s*([kmgt]?)i?b?\s*", text.lower())
    if not found:
        raise ValueError(f"{text!r} is not a size; write it like 24GB")
    return int(float(found[1]) * _BYTES[found[2]])


def parse_seconds(text: str) -> float:
    """``'90s'``, ``'5m'`` or ``'1.5h'`` as seconds, more than none; ValueError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh])\s*", text)
    if not found or not float(found[1]):
        raise ValueError(f"{text!r} is not a time; write it like 90s, 5m or 1.5h")
    return float(found[1]) * _SECONDS[found[2]]


def peak_memory_bytes() -> int:
    """The process's highest resident memory so far, in bytes."""
    return _status("VmHWM") or _peak_by_usage()


def resident_bytes() -> int:
    """The process's resident memory now; its highest so far where the system does not tell."""
    return _status("VmRSS") or _peak_by_usage()


def own_bytes() -> int:
    """Resident memory without pages of files, which the system may take back: what is free again once the process ends."""
    return _status("RssAnon") or resident_bytes()


def reserved_bytes() -> int:
    """Addresses for data that the process holds beyond its resident memory: a limit counts them, too."""
    return max(0, _status("VmData") - resident_bytes())


def _status(name: str) -> int:
    """Bytes that the system tells of this process under that name; 0 if it does not."""
    text = _STATUS.read_text() if _STATUS.exists() else ""
    found = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _peak_by_usage() -> int:
    """Which also counts what the process that started this one held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """The items in lists of ``size``; the last may be shorter."""
    iterator = iter(items)
    while some := list(islice(iterator, size)):
        yield some
