"""What a plan is for: so many devices of a kind, or the machine at hand."""

import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunewright.advise.configs import table
from tunewright.core import machine
from tunewright.core.errors import HardwareError, Problem, nearest
from tunewright.core.units import human_bytes, own_bytes, parse_bytes

_GB, _BILLION = 1 << 30, 1e9
_FLEET = re.compile(r"\s*(?:(\d{1,6})\s*[x×*]\s*)?(\S.*?)\s*")
_SIZE = re.compile(r"[\d.]+ *[kmgt]i?b", re.IGNORECASE)
_MOST = 100_000
_UNITS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "asimd")
"""Instruction sets that training gains from, best first."""
_PATIENCE = 10
"""Seconds for the driver to tell what there is."""
_FREE = ("nvidia-smi", "--query-gpu=name,memory.free", "--format=csv,noheader,nounits")


@dataclass(frozen=True)
class Device:
    """One accelerator, or a whole machine without any."""

    name: str
    memory: int
    """Bytes."""
    rate: float
    """Dense matrix products in ``precision``: operations a second."""
    bandwidth: float
    """Of its memory, bytes a second."""
    link: float
    """To the others in a node, one way, bytes a second."""
    utilisation: float
    """Share of ``rate`` that training reaches."""
    process: int
    """Bytes that a process holds beside the model."""
    bf16: bool = True
    here: bool = False
    """Whether it is the machine at hand."""
    is_host: bool = False
    """Whether its memory is the host's own."""


@dataclass(frozen=True)
class Fleet:
    """``count`` equal devices, in nodes of ``node``."""

    count: int
    device: Device
    node: int = 1
    between: float = 0.0
    """Bandwidth between nodes, for each device and one way, bytes a second."""

    @property
    def memory(self) -> int:
        """Bytes of all of them."""
        return self.count * self.device.memory

    def __str__(self) -> str:
        return f"{self.count} x {self.device.name} of {human_bytes(self.device.memory)}"


def parse(text: str) -> Fleet:
    """``8xH200``, ``H100`` or ``1x24GB``, the names as in devices.yaml.

    Raises:
        HardwareError: no such device, with the nearest name; no number of them.
    """
    found = _FLEET.fullmatch(text)
    count = int(found[1] or 1) if found else 0
    if not found or not 0 < count <= _MOST:
        raise HardwareError(Problem("devices", f"{text!r} names no devices", "write them like 8xH200"))
    facts = table("devices.yaml")
    return Fleet(count, _device(found[2], facts), min(count, facts["node"]), facts["between"] * _BILLION)


def _device(text: str, facts: Mapping[str, Any]) -> Device:
    name = named(text, facts["devices"])
    if name:
        return _made(name, int(facts["devices"][name]["memory"] * _GB), facts["devices"][name], facts)
    if _SIZE.fullmatch(text) and (size := parse_bytes(text)):
        return _made("a device", size, facts["unnamed"], facts)
    fix = nearest(text.upper(), facts["devices"])
    raise HardwareError(
        Problem("devices", f"no device is called {text!r}", f"{fix}; or give its memory: 1x24GB")
    )


def named(text: str, known: Mapping[str, Any]) -> str:
    """The device of the table that a name means, as people and drivers write it; empty if there is none.

    Of several it is the one that shares most words, then the first: ``A100`` is the smaller one.
    """
    same = [name for name in known if _words(name, "") == _words(text, "")]
    wanted = set(_words(text, " ").split())
    meant = [name for name in known if _words(name, " ").split()[-2 if name.endswith("GB") else -1] in wanted]
    shared = {name: len(wanted & set(_words(name, " ").split())) for name in meant}
    return next(iter(same), None) or max(shared, key=lambda name: shared[name], default="")


def _words(name: str, between: str) -> str:
    return re.sub(r"[^A-Z0-9]+", between, name.upper())


def _made(name: str, memory: int, sheet: Mapping[str, Any], facts: Mapping[str, Any]) -> Device:
    return Device(
        name, memory, sheet["rate"] * 1e12, sheet["bandwidth"] * _BILLION, sheet["link"] * _BILLION,
        facts["utilisation"]["device"], int(facts["process"]["device"] * _GB), sheet.get("bf16", True),
    )  # fmt: skip


def limited(fleet: Fleet, memory: int) -> Fleet:
    """The fleet with at most so many bytes on each device."""
    device = Device(**{**vars(fleet.device), "memory": min(memory, fleet.device.memory)})
    return Fleet(fleet.count, device, fleet.node, fleet.between)


def here() -> Fleet:
    """The machine at hand: its GPUs if the driver tells of any, else processor and memory as measured.

    The first call on a machine without GPUs measures it with torch, in seconds; what was found is kept.
    """
    facts = table("devices.yaml")
    gpus = _gpus()
    if gpus:
        sheets = facts["devices"]
        told, free = gpus[0]
        name = named(told, sheets)
        device = _made(name or told, free, sheets.get(name, facts["unnamed"]), facts)
        device = Device(**{**vars(device), "here": True})
        return Fleet(len(gpus), device, len(gpus))
    from tunewright.advise.measured import rates

    found, process = rates(), int(facts["process"]["here"] * _GB)
    name = (
        f"{machine.processor()} ({machine.cores()} cores{''.join(f', {u}' for u in instruction_sets()[:1])})"
    )
    share = facts["utilisation"]["here"]
    device = Device(
        name, free_memory(), found.bf16, found.copy, found.copy, share, process, here=True, is_host=True
    )
    return Fleet(1, device)


def _gpus() -> list[tuple[str, int]]:
    """Names and free bytes, as NVIDIA's driver tells them; torch would take seconds to say the same."""
    if shutil.which(_FREE[0]) is None:
        return []
    try:
        told = subprocess.run(_FREE, capture_output=True, timeout=_PATIENCE, check=True, text=True).stdout  # noqa: S603
    except (OSError, subprocess.SubprocessError):  # a driver that does not answer trains nothing either
        return []
    rows = (line.rpartition(",") for line in told.splitlines())
    return [(name.strip(), int(free) << 20) for name, _, free in rows if free.strip().isdecimal()]


def instruction_sets() -> list[str]:
    """Those of the processor that training gains from, best first."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    flags = set(text.split())
    return [unit for unit in _UNITS if unit in flags]


def free_memory() -> int:
    """Bytes that a process can take in this one's place: what is free or its own, within its container's and its own limits."""
    return min(machine.available_memory() + own_bytes(), machine.own_limit())
