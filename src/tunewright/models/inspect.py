"""What can be known of a model without loading it."""

from math import prod
from pathlib import Path

from tunewright.models import files, intact
from tunewright.models.load import ModelSource


def parameter_count(source: ModelSource) -> int | None:
    """Parameters stored in the model's safetensors files, read from their headers; None if not local."""
    if source.folder is None:
        return None
    headers = map(files.safetensors_header, intact.weight_files(source.folder))
    return sum(int(prod(entry["shape"])) for header in headers for entry in header.values())


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
    config = files.json_object(source.folder / "config.json")
    length = config.get("max_position_embeddings", config.get("n_positions"))
    return length if isinstance(length, int) and length else None
