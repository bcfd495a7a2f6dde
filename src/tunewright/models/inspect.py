"""What can be known of a model without loading it."""

import json
import struct
from pathlib import Path
from typing import Any

from tunewright.core.errors import ModelError, Problem
from tunewright.models.load import ModelSource


def parameter_count(source: ModelSource) -> int | None:
    """Parameters stored in the model's safetensors files, read from their headers; None if not local."""
    if source.folder is None:
        return None
    headers = [_header(p) for p in source.folder.glob("*.safetensors")]
    return sum(_size(entry["shape"]) for header in headers for entry in header.values())


def _header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file (8 bytes of length, then JSON)."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, 100_000_000)))
        return {name: entry for name, entry in header.items() if name != "__metadata__"}
    except (struct.error, ValueError, AttributeError):
        raise ModelError(Problem(str(path), "not a safetensors file", "download it again")) from None


def _size(shape: list[int]) -> int:
    size = 1
    for dimension in shape:
        size *= dimension
    return size


def available_memory() -> int:
    """Bytes of memory that are free for a new process: the machine's, or the container's if that is less."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return min(int(line.split()[1]) * 1024, _cgroup_room())
    raise OSError("/proc/meminfo has no MemAvailable")


def _cgroup_room() -> int:
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if not limit.exists() or limit.read_text().strip() == "max":
        return 1 << 62
    return int(limit.read_text()) - int(used.read_text())


def context_length(source: ModelSource) -> int | None:
    """The most tokens the model can attend to, by its config; None if it does not say."""
    if source.folder is None:
        return None
    config = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    length = config.get("max_position_embeddings", config.get("n_positions"))
    return int(length) if length else None
