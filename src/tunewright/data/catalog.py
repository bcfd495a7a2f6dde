"""Folders to files: what a path to a folder, or to datasets listed in its ``dataset_info.json``, stands for.

``dataset_info.json`` is LLaMA-Factory's list of datasets; its keys mean here what they mean there.
"""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tunewright.core.errors import DataError, Problem, UserError, nearest
from tunewright.core.paths import inside
from tunewright.data.readers import EXTENSIONS, absent, check_file, extension, unopened
from tunewright.data.rows import Source

INFO = "dataset_info.json"
FORMATTINGS = {"alpaca": "alpaca", "sharegpt": "sharegpt", "openai": "messages"}

_MEDIA = ("images", "videos", "audios")
_PREFERENCE = ("chosen", "rejected", "kto_tag")
_REMOTE = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")

Entry = dict[str, Any]


def sources(paths: Iterable[Source]) -> list[Source]:
    """Replace each source that is a folder by the files it stands for; each file is one that can be read.

    ``folder`` is every supervised text dataset of its ``dataset_info.json`` that has a local file, or,
    without that list, every file with a known extension; ``folder:name1,name2`` (also
    ``folder/dataset_info.json:name1,name2``) is the named ones. What a source says itself about format,
    columns and tags overrules the list.

    Raises:
        DataError: unknown or remote datasets, folders without data, files that are absent, empty or of an
            unknown kind; all of them together.
    """
    found: list[Source] = []
    problems: list[Problem] = []
    for source in paths:
        try:
            found += _expand(source)
        except DataError as error:
            problems += error.problems
        except OSError as error:
            problems.append(unopened(source.path, error))
    problems += [problem for source in found for problem in _unusable(source.path)]
    if problems:
        raise DataError(problems)
    return found


def _unusable(path: Path) -> tuple[Problem, ...]:
    try:
        check_file(path)
    except DataError as error:
        return error.problems
    except OSError as error:
        return (unopened(path, error),)
    return ()


def _expand(source: Source) -> list[Source]:
    place, names = _split(source.path)
    if place.is_dir():
        place = place / INFO
    elif place.name != INFO or not place.is_file():
        return [source]
    if not place.is_file():
        return _plain_folder(source, place.parent, names)
    entries = _entries(place)
    return _named(source, place, entries, names) if names else _all(source, place, entries)


def _split(path: Path) -> tuple[Path, list[str]]:
    """``folder:a,b`` as the folder and its names. A path that exists as it is written has no names."""
    head, colon, tail = str(path).rpartition(":")
    if path.exists() or not colon or not Path(head).exists():
        return path, []
    return Path(head), [name.strip() for name in tail.split(",")]


def _plain_folder(source: Source, folder: Path, names: list[str]) -> list[Source]:
    if names:
        what = f"no {INFO} here that would list {', '.join(names)}"
        raise DataError(Problem(str(folder), what, "name the file itself"))
    files = _files(folder)
    if not files:
        raise DataError(Problem(str(folder), "no data file in this folder", f"use {', '.join(EXTENSIONS)}"))
    return [replace(source, path=file) for file in files]


def _files(place: Path) -> list[Path]:
    """A file itself, or a folder's data files, sorted."""
    if not place.is_dir():
        return [place]
    return sorted(p for p in place.iterdir() if p.is_file() and extension(p) and not p.name.startswith("."))


def _entries(info: Path) -> dict[str, Entry]:
    try:
        entries = json.loads(info.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        what = f"not JSON that can be read ({str(error)[:200]})"
        raise DataError(Problem(str(info), what, "mend the file")) from error
    if not isinstance(entries, dict):
        what = "not an object, expected dataset names and entries"
        raise DataError(Problem(str(info), what, "mend the file"))
    problems = [p for name, entry in entries.items() if (p := _misshapen(info, name, entry))]
    if problems:
        raise DataError(problems)
    return entries


def _misshapen(info: Path, name: str, entry: Any) -> Problem | None:
    """The problem of an entry whose fields have the wrong types."""
    where = _place(info, name)
    if not isinstance(entry, dict):
        return Problem(where, "not an object, expected an entry with a file_name", "mend the entry")
    for key in ("file_name", "formatting"):
        if not isinstance(entry.get(key, ""), str):
            return Problem(where, f"{key} is {_shown(entry[key])}, expected text", "mend the entry")
    for key in ("columns", "tags"):
        inner = entry.get(key, {})
        if not isinstance(inner, dict) or not all(isinstance(v, str) for v in inner.values()):
            return Problem(where, f"{key} is {_shown(inner)}, expected an object of texts", "mend the entry")
    return None


def _shown(value: Any) -> str:
    """A value of the list's, short enough for one line."""
    try:
        text = repr(value)
    except RecursionError:
        return "nested too deeply"
    return text if len(text) <= 100 else f"{text[:100]}..."


def _local(info: Path, name: str, entry: Entry) -> Path | None:
    """The entry's file, None if it names none; DataError if it is outside the folder, which no list may do."""
    file_name = entry.get("file_name")
    return _inside(info, name, file_name) if file_name else None


def _inside(info: Path, name: str, file_name: str) -> Path:
    try:
        return inside(info.parent, file_name, _place(info, name))
    except UserError as error:
        raise DataError(error.problems) from None


def _place(info: Path, name: str) -> str:
    """Where an entry is, on one line whatever its name."""
    return f"{info}: {name if name.isprintable() else ascii(name)}"


def _all(source: Source, info: Path, entries: dict[str, Entry]) -> list[Source]:
    found: list[Source] = []
    for name, entry in entries.items():
        if _is_supervised_text(entry) and (place := _readable(info, name, entry)):
            found += _of_entry(source, info, name, entry, place)
    if not found:
        what = "no dataset with a local file of supervised text"
        raise DataError(Problem(str(info), what, "download one, or name a dataset: folder:name"))
    return found


def _readable(info: Path, name: str, entry: Entry) -> Path | None:
    """The entry's file, if the folder has it."""
    try:
        place = _local(info, name, entry)
    except DataError:  # as of no use as a remote one; told if it is named
        return None
    return place if place and place.exists() else None


def _is_supervised_text(entry: Entry) -> bool:
    special = {*_MEDIA, *_PREFERENCE} & entry.get("columns", {}).keys()
    return not entry.get("ranking") and not special


def _named(source: Source, info: Path, entries: dict[str, Entry], names: list[str]) -> list[Source]:
    found: list[Source] = []
    problems: list[Problem] = []
    for name in names:
        try:
            found += _one(source, info, entries, name)
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    return found


def _one(source: Source, info: Path, entries: dict[str, Entry], name: str) -> list[Source]:
    if name not in entries:
        known = filter(str.isprintable, entries)
        raise DataError(Problem(str(info), f"no dataset is called {name!r}", nearest(name, known)))
    entry = entries[name]
    place = _local(info, name, entry)
    if place is None:
        raise DataError(_not_local(_place(info, name), entry))
    if not place.exists():
        raise DataError(absent(place))
    return _of_entry(source, info, name, entry, place)


def _not_local(where: str, entry: Entry) -> Problem:
    remote = next((f"{key} {_shown(entry[key])}" for key in _REMOTE if entry.get(key)), "nothing")
    return Problem(where, f"no local file (it names {remote})", "download it first and set its file_name")


def _of_entry(source: Source, info: Path, name: str, entry: Entry, place: Path) -> list[Source]:
    columns = dict(entry.get("columns", {}))
    format_ = _format(_place(info, name), entry)
    if format_ == "alpaca" and columns.keys() == {"prompt"}:
        # LLaMA-Factory's way to write pretraining text: a prompt that nothing answers.
        format_, columns = "text", {"text": columns["prompt"]}
    fields: dict[str, Any] = {
        "format": format_ if source.format == "auto" else source.format,
        "columns": tuple({**columns, **dict(source.columns)}.items()),
        "tags": tuple({**entry.get("tags", {}), **dict(source.tags)}.items()),
    }
    files = [_inside(info, name, str(file.relative_to(info.parent))) for file in _files(place)]
    return [replace(source, path=file, **fields) for file in files]


def _format(where: str, entry: Entry) -> str:
    formatting = entry.get("formatting", "alpaca")
    if formatting not in FORMATTINGS:
        what = f"unknown formatting {_shown(formatting)}"
        raise DataError(Problem(where, what, nearest(formatting, FORMATTINGS)))
    return FORMATTINGS[formatting]
