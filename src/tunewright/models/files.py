"""Files that came from elsewhere, read with ceilings: JSON objects and the headers of safetensors files.

Every function raises ModelError naming the file. The ceilings lie far above what real models have, and so low
that reading what is refused takes less than a second and 200 MB.
"""

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, NoReturn

from tunewright.core.errors import ModelError, Problem

AGAIN = "download it again"
JSON_BYTES = 16 << 20
JSON_ITEMS = 1_000_000
_DEPTH = 64
_DIMENSIONS = 16
_LFS_POINTER = b"version https://git-lfs"
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64), **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16), **dict.fromkeys(("I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6), "F4": 4,
}  # fmt: skip


def refuse(path: Path, what: str, fix: str = AGAIN) -> NoReturn:
    """ModelError about one file."""
    raise ModelError(Problem(str(path), what, fix))


def size(path: Path, most: int) -> int:
    """The file's bytes, at most ``most`` and not those of a Git LFS pointer."""
    if not path.is_file():  # a pipe would be waited for
        refuse(path, "not there, or not a file")
    try:
        with path.open("rb") as file:
            if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                refuse(path, "a Git LFS pointer, not the file itself", "fetch it: git lfs pull")
            there = file.seek(0, 2)
    except OSError as error:
        refuse(path, f"cannot be read ({error.strerror})", "check who may read it")
    if there > most:
        refuse(path, f"{there} bytes long, at most {most} are read", "check where it comes from")
    return there


def json_object(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object."""
    size(path, JSON_BYTES)
    return _object(path, path.read_bytes())


def _object(path: Path, raw: bytes) -> dict[str, Any]:
    if items(raw) > JSON_ITEMS:
        refuse(path, f"more than {JSON_ITEMS} JSON values", "check where it comes from")
    try:
        with no_collection():
            tree = json.loads(raw, parse_constant=_constant)
    except RecursionError:
        refuse(path, "its JSON is nested too deeply", "check where it comes from")
    except ValueError as error:
        refuse(path, f"not readable as JSON, {len(raw)} bytes: {error}")
    if not isinstance(tree, dict):
        refuse(path, f"holds {type(tree).__name__}, expected a JSON object")
    if _depth(tree) > _DEPTH:
        refuse(path, "its JSON is nested too deeply", "check where it comes from")
    return tree


@contextmanager
def no_collection() -> Iterator[None]:
    """While a file is parsed or a model is made nothing becomes garbage; to look for some takes longer than either."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def items(raw: bytes) -> int:
    """At least as many as the JSON values in the text, counted without parsing them."""
    return sum(raw.count(sign) for sign in (b"{", b"[", b","))


def _constant(name: str) -> float:
    if name == "NaN":
        raise ValueError("NaN is no value that a model needs")
    return float(name)


def _depth(tree: Any) -> int:
    """How deeply lists and objects are nested, no further than is refused."""
    level, depth = [tree], 0
    while level and depth <= _DEPTH:
        level = [v for node in level for v in children(node) if isinstance(v, (dict, list))]
        depth += 1
    return depth


def children(node: Any) -> list[Any]:
    """The values right below a JSON value."""
    return list(node.values()) if isinstance(node, dict) else node if isinstance(node, list) else []


def safetensors_header(path: Path) -> dict[str, dict[str, Any]]:
    """The tensors that a safetensors file holds, once they account for every byte of it."""
    there = size(path, 1 << 62)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if there < 8 or length > there - 8:
            refuse(path, f"{there} bytes there, {max(length, 0) + 8} expected for its header alone")
        if length > JSON_BYTES:
            refuse(path, f"a header of {length} bytes, at most {JSON_BYTES} are read")
        entries = _object(path, file.read(length))
    if not isinstance(entries.pop("__metadata__", {}), dict):
        refuse(path, "its header's __metadata__ is not an object")
    _check_layout(path, entries, there - 8 - length)
    return entries


def _check_layout(path: Path, entries: dict[str, Any], room: int) -> None:
    """The tensors must lie one after the other and fill the ``room`` bytes behind the header."""
    spans = [(0, 0), *sorted(_span(path, name, entry) for name, entry in entries.items())]
    if (expected := spans[-1][1]) != room:
        refuse(path, f"{room} bytes of weights there, {expected} expected by its header")
    if any(before[1] != after[0] for before, after in pairwise(spans)):
        refuse(path, "tensors overlap or leave gaps between them")


def _span(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """Where a tensor's bytes begin and end."""
    entry = entry if isinstance(entry, dict) else {}
    bits, shape, offsets = _BITS.get(str(entry.get("dtype"))), entry.get("shape"), entry.get("data_offsets")
    if not bits or not _whole(shape) or not _whole(offsets) or len(offsets) != 2:
        refuse(path, f"its header does not say what tensor {name[:80]!r} is")
    begin, end = offsets
    if end - begin != -(-prod(shape) * bits // 8):
        refuse(path, f"tensor {name[:80]!r} has {end - begin} bytes, its shape and type ask for others")
    return begin, end


def _whole(values: Any) -> bool:
    return (
        isinstance(values, list)
        and len(values) <= _DIMENSIONS
        and all(type(v) is int and 0 <= v < 1 << 63 for v in values)
    )
