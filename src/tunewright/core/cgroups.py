"""What control groups allow this process: containers, batch systems and services set them, in one of two versions.

A group's limits hold for all groups within it, so those of every group from the process's own up to the root count.
See the kernel's documentation, admin-guide/cgroup-v1/memory.rst and admin-guide/cgroup-v2.rst.
"""

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
PLENTY = 1 << 62


def memory_room() -> int:
    """Bytes that may still be taken, those of files counted that the system would give up; plenty without a limit."""
    rooms = [
        *(_room(at, "memory.max", "memory.current", "") for at in _groups("")),
        *(_room(at, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_") for at in _groups("memory")),
    ]  # fmt: skip
    return max(0, min(rooms, default=PLENTY))


def cores() -> float:
    """Processors' worth of time; plenty without a limit."""
    quotas = [
        *(_read(at / "cpu.max").split() for at in _groups("")),
        *(f"{_read(at / 'cpu.cfs_quota_us')} {_read(at / 'cpu.cfs_period_us')}".split() for at in _groups("cpu")),
    ]  # fmt: skip
    found = (int(quota[0]) / int(quota[1]) for quota in quotas if len(quota) == 2 and quota[0].isdecimal())
    return min(found, default=float(PLENTY))


def _room(at: Path, limit: str, used: str, of_all: str) -> int:
    allowed = _read(at / limit).strip()
    if not allowed.isdecimal():  # no such file, or "max"
        return PLENTY
    files = dict(line.split() for line in _read(at / "memory.stat").splitlines())
    idle = sum(int(files.get(f"{of_all}{name}", 0)) for name in ("inactive_file", "active_file"))
    return int(allowed) - int(_read(at / used) or 0) + idle


def _groups(controller: str) -> Iterator[Path]:
    """Folders of the process's group and of all above it; ``controller`` is empty for version 2, which has them all."""
    for line in _read(OWN).splitlines():
        _, controllers, path = line.split(":", 2)
        if controller not in controllers.split(","):
            continue
        for base in (ROOT / controller,) if controller else (ROOT, ROOT / "unified"):
            own = base / path.lstrip("/")
            yield from [base] if own == base or not own.is_dir() else [own, *_above(own, base)]


def _above(own: Path, base: Path) -> list[Path]:
    return [folder for folder in own.parents if folder == base or base in folder.parents]


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
