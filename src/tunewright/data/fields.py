"""One record of a data file, seen through the source's column names; what is wrong with a row ends its reading."""

import json
from math import isfinite
from typing import Any

from tunewright.data import preferences

MISSING = object()
_KINDS = {
    str: "text",
    list: "a list",
    dict: "an object",
    bool: "true or false",
    int: "a number",
    float: "a number",
}


class RowError(Exception):
    """Ends the reading of one row: what was found and expected, and the fix."""

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what)
        self.what, self.fix = what, fix


class Fields:
    """One record seen through the source's column names; wrong types leave as :class:`RowError`."""

    __slots__ = ("columns", "record")

    def __init__(self, record: dict[str, Any], columns: dict[str, str]) -> None:
        self.record, self.columns = record, columns

    def find(self, name: str, *own: str) -> tuple[str, Any]:
        """Key and value of the column ``name``: the mapped key, else the first of ``own`` not null."""
        if name in self.columns:
            own = (self.columns[name],)
        elif self.columns:
            # {"prompt": "input"} takes "input" away from where it would be looked for by itself
            own = tuple(key for key in own if key not in self.columns.values())
        present = [key for key in own if key in self.record]
        key = next((key for key in present if self.record[key] is not None), "")
        key = key or next(iter(present), " or ".join(own) or name)
        return key, self.record.get(key, MISSING)

    def has(self, name: str, *own: str) -> bool:
        """Whether the column holds anything: neither missing, null nor empty."""
        value = self.find(name, *own)[1]
        return value is not MISSING and value not in (None, "", [])

    def filled(self, keys: frozenset[str]) -> str:
        """One of the file's own keys that holds anything, else ``""``."""
        held = () if keys.isdisjoint(self.record) else sorted(keys & self.record.keys())
        return next((key for key in held if self.record[key] not in (None, "", [])), "")

    def text(self, name: str, *own: str) -> str:
        """The column's text, which must be there."""
        key, value = self.find(name, *own)
        return text_of(key, value)

    def optional(self, name: str, *own: str) -> str:
        """Text that may be missing or null, which is ``""``."""
        key, value = self.find(name, *own)
        return "" if value is None or value is MISSING else text_of(key, value)

    def list(self, name: str, *own: str) -> tuple[str, list[Any]]:
        """The key and a list; cells of CSV hold it as JSON text."""
        key, value = self.find(name, *own)
        found = parsed(value) if isinstance(value, str) else value
        if not isinstance(found, list):
            raise wrong(key, value, "a list")
        return key, found

    def verdict(self) -> bool | None:
        """Whether the answer was judged good; None if nothing says so."""
        value = self.find("kto_tag", *preferences.VERDICTS)[1]
        return value if isinstance(value, bool) else None

    def label(self) -> str:
        """The name of a class; a number is its own name."""
        key, value = self.find("label", "label")
        if value is None or value is MISSING:
            return ""
        if not isinstance(value, str | int):
            raise wrong(key, value, "the name or the number of a class")
        return str(int(value)) if isinstance(value, int) else value

    def margin(self) -> float:
        """How much better the chosen answer is; 0 where nothing says so."""
        key, value = self.find("margin", "margin")
        if value is None or value is MISSING:
            return 0.0
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
            raise wrong(key, value, "a number")
        return float(value)

    def tools(self) -> str:
        """Tool definitions as JSON text."""
        key, value = self.find("tools", "tools")
        if value is MISSING or value in (None, [], {}):
            return ""
        if not isinstance(value, str | list | dict):
            raise wrong(key, value, "a list or its JSON text")
        return value if isinstance(value, str) else _dumped(key, value)


def parsed(text: str) -> Any:
    """What JSON text says; other text as it is."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _dumped(key: str, value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except RecursionError:
        raise RowError(f"field {short(key)} is nested too deeply", "write it flatter") from None


def kind_of(value: Any) -> str:
    """What messages call such a value."""
    if value is None or value is MISSING:
        return "null" if value is None else "missing"
    return _KINDS.get(type(value), f"a value of type {type(value).__name__}")


def wrong(key: str, value: Any, expected: str) -> RowError:
    """The error that a field is not what was expected."""
    fix = "add the field or map it with columns" if value is MISSING else "mend the row"
    return RowError(f"field {short(key)} is {kind_of(value)}, expected {expected}", fix)


def short(text: str) -> str:
    """Quoted, escaped and short enough for one line."""
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def text_of(key: str, value: Any) -> str:
    """The value, a text."""
    if not isinstance(value, str):
        raise wrong(key, value, "text")
    return value


def object_of(value: Any) -> dict[str, Any]:
    """The value, a record."""
    if not isinstance(value, dict):
        raise RowError(f"the row is {kind_of(value)}, expected an object", "write each row as {...}")
    return value
