"""What can be known of a model without loading it."""

from math import prod

from tunewright.models import files, intact
from tunewright.models.load import ModelSource


def parameter_count(source: ModelSource) -> int | None:
    """Parameters stored in the model's safetensors files, read from their headers; None if not local."""
    if source.folder is None:
        return None
    headers = map(files.safetensors_header, intact.weight_files(source.folder))
    return sum(int(prod(entry["shape"])) for header in headers for entry in header.values())


def context_length(source: ModelSource) -> int | None:
    """The most tokens the model can attend to, by its config; None if it does not say."""
    if source.folder is None:
        return None
    config = files.json_object(source.folder / "config.json")
    length = config.get("max_position_embeddings", config.get("n_positions"))
    return length if isinstance(length, int) and length else None
