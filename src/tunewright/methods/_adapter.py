"""An adapter folder in PEFT's format, told from its files before PEFT reads it."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from tunewright.core.errors import ModelError, Problem
from tunewright.models import files, intact

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OWN = "TUNEWRIGHT"
"""The ``peft_type`` in the folders of the methods that are ours."""
PREFIX = "base_model.model."
_FACTOR = re.compile(r"\.lora_(?:embedding_)?A(?:\.|$)")
_PLAIN = re.compile(r"\^?(?:\w|-|\\?\.)+\$?")
_SIZES = (
    "r", "init_r", "target_r", "num_virtual_tokens", "oft_block_size", "boft_block_size", "boft_block_num",
    "block_size", "n_frequency", "num_vectors", "vector_length", "adapter_len", "token_dim",
    "num_layers", "num_attention_heads", "num_transformer_submodules", "encoder_num_layers",
)  # fmt: skip
_ENCODER, _WIDER = "encoder_hidden_size", 64
"""The width of a network that made the weights and is not among them: at most so many times their longest side."""
PATTERNS = ("target_modules", "exclude_modules", "feedforward_modules")
_UNSUPPORTED = ("megatron_config", "layer_replication")


def config(folder: Path) -> dict[str, Any]:
    """What adapter_config.json says, which is an object; ModelError if it is none."""
    path = folder / CONFIG
    intact.check_place(folder, path)
    return files.json_object(path)


def check(folder: Path, types: tuple[str, ...]) -> dict[str, Any]:
    """The config of an adapter of one of these types. ModelError with everything that speaks against loading it."""
    found_config = config(folder)
    tensors = header(folder)
    if not tensors:
        files.refuse(folder / WEIGHTS, "holds no weights")
    sides = [side for entry in tensors.values() for side in entry["shape"]]
    found = [
        *_kind(found_config, types),
        *_numbers(found_config, max(sides, default=0)),
        *_names(found_config),
    ]
    if "LORA" in types:
        found += _lora(found_config, max(_ranks(folder).values()))
    if found:
        raise ModelError(Problem(str(folder / CONFIG), what, fix) for what, fix in found)
    return found_config


def base(folder: Path) -> str:
    """The base model that another tool's adapter names; ModelError if it names none."""
    name = config(folder).get("base_model_name_or_path")
    if not isinstance(name, str) or not name or "://" in name:
        what = f"base_model_name_or_path is {str(name)[:80]!r}, expected a folder or a hub id"
        raise ModelError(Problem(str(folder / CONFIG), what, "write the base model there"))
    return name


def header(folder: Path) -> dict[str, dict[str, Any]]:
    """The tensors of the adapter's weights."""
    path = folder / WEIGHTS
    if not path.exists():
        what = "no adapter_model.safetensors; pickled weights (.bin) can run code and are not read"
        files.refuse(folder, what, "save the adapter as safetensors")
    intact.check_place(folder, path)
    return files.safetensors_header(path)


def misfits(expected: Mapping[str, Any], there: Mapping[str, Any], own: str = "") -> list[str]:
    """What is wrong with the names and shapes in a file's header, against the tensors that there should be.

    Names besides those that are expected are only wrong if they hold ``own``.
    """
    both = set(expected) & set(there)
    missing = sorted(set(expected) - set(there))
    strange = sorted(name for name in set(there) - set(expected) if own in name)
    misshapen = sorted(name for name in both if list(expected[name].shape) != there[name]["shape"])
    found = [f"lacks {len(missing)} of {len(expected)} weights: {missing[0]}"] if missing else []
    found += [f"{len(strange)} weights are for modules that the base lacks: {strange[0]}"] if strange else []
    return found + ([f"{len(misshapen)} weights have another shape: {misshapen[0]}"] if misshapen else [])


def modules(folder: Path, prefix: str) -> list[str]:
    """The names of the adapted modules as the weights have them; ``prefix`` begins the adapter's own names."""
    found = (
        name[len(PREFIX) :].partition(f".{prefix}") for name in header(folder) if name.startswith(PREFIX)
    )
    return sorted({module for module, dot, _ in found if dot})


def _ranks(folder: Path) -> dict[str, int]:
    """Each LoRA-adapted module's rank."""
    ranks = {}
    for name, entry in header(folder).items():
        if name.startswith(PREFIX) and (found := _FACTOR.search(name)) and entry["shape"]:
            ranks[name[len(PREFIX) : found.start()]] = entry["shape"][0]
    if not ranks:
        files.refuse(folder / WEIGHTS, "holds no LoRA weights")
    return ranks


def _kind(config: dict[str, Any], types: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    if config.get("peft_type") not in types:
        what = f"an adapter of the type {str(config.get('peft_type'))[:80]!r}, expected {' or '.join(types)}"
        yield what, files.AGAIN
    mapping = config.get("auto_mapping")
    library = mapping.get("parent_library") if isinstance(mapping, dict) else mapping
    if library is not None and not str(library).startswith("transformers."):
        what = f"wants to run its own Python code (auto_mapping names {str(library)[:80]!r})"
        yield what, "read that code, then drop auto_mapping"
    yield from ((f"{key} is not supported", "drop that key") for key in _UNSUPPORTED if config.get(key))


def _numbers(config: dict[str, Any], longest: int) -> Iterator[tuple[str, str]]:
    """No number that memory is taken by may be larger than any side of the weights."""
    # LoKr's rank is no side of anything where a factor is small enough to be whole.
    for key in set(_SIZES) - ({"r"} if config.get("peft_type") == "LOKR" else set()):
        yield from _too_long(config, key, longest)
    yield from _too_long(config, _ENCODER, _WIDER * longest)


def _too_long(config: dict[str, Any], key: str, most: int) -> Iterator[tuple[str, str]]:
    value = config.get(key)
    if value is not None and (type(value) is not int or not 0 <= value <= most):
        what = f"{key} is {str(value)[:40]!r}, the sides of its weights allow {most} at most"
        yield what, files.AGAIN


def _lora(config: dict[str, Any], most: int) -> Iterator[tuple[str, str]]:
    """Ranks no larger than the weights have them, and scales that are numbers."""
    patterns = {key: config.get(key) or {} for key in ("rank_pattern", "alpha_pattern")}
    for key, pattern in patterns.items():
        if not isinstance(pattern, dict):
            yield f"{key} is {type(pattern).__name__}, expected an object", files.AGAIN
            return
    for rank in (config.get("r"), *patterns["rank_pattern"].values()):
        if type(rank) is not int or not 1 <= rank <= most:
            yield f"a rank of {str(rank)[:40]!r}, its weights have at most {most}", files.AGAIN
    for number in (config.get("lora_alpha"), config.get("lora_dropout"), *patterns["alpha_pattern"].values()):
        if type(number) not in (int, float) or not 0 <= number < 1e6:
            yield f"a scale or dropout of {str(number)[:40]!r}, expected a number", files.AGAIN


def _names(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Module names, which PEFT takes for patterns; a pattern can be made to search for ever."""
    if not isinstance(config.get("target_modules"), (str, list, NoneType)):
        yield "target_modules is neither a list nor a pattern", files.AGAIN
    keys = (
        "rank_pattern", "alpha_pattern", "modules_to_save", "layers_pattern", "target_modules",
        "exclude_modules", "feedforward_modules", "target_parameters",
    )  # fmt: skip
    for key in keys:
        value = config.get(key) or []
        if key in PATTERNS and isinstance(value, str):
            continue  # the weights say what it found
        for name in (
            [value] if isinstance(value, str) else value if isinstance(value, (list, dict)) else [None]
        ):
            if not isinstance(name, str) or not _PLAIN.fullmatch(name):
                yield f"{key} has {str(name)[:80]!r}, expected names of modules", "write the names out"
