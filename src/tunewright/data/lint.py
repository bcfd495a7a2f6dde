"""What is wrong with rows, before anything is trained on them, and what they look like as a whole.

A row comes out as it went in or as one Problem: the first of its faults. Not checked: facts, language,
near-duplicates.
"""

import json
import re
import sys
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from hashlib import blake2b
from itertools import accumulate, chain
from typing import Any

from tunewright.core.errors import Problem, nearest
from tunewright.data import formats
from tunewright.data.rows import ROLES, Message, Row, Source

Fault = tuple[str, str]
"""What was found and expected, and the fix."""

# C0 without tab, line feed and carriage return; DEL; C1; the replacement character; lone surrogates.
_SUSPECT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd\ud800-\udfff]")
_CJK = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]")

_FILL_IN = "fill it in or leave the row out"

# Templates write tools out with code that recurses, far from an empty stack.
_DEEPEST_TOOLS = 64

# Which roles may come after which; "" is the beginning. Several tools may answer one turn.
_NEXT = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


def check(rows: Iterable[Row | Problem]) -> Iterator[Row | Problem]:
    """Pass good rows and Problems on; a bad row becomes a Problem. Only prose may stand there twice."""
    seen = _Seen()
    for row in rows:
        if isinstance(row, Problem):
            yield row
            continue
        fault = _fault(row) or (None if row.prose else seen.fault(row))
        yield Problem(row.where, *fault) if fault else row


def _fault(row: Row) -> Fault | None:
    return next((fault for rule in _RULES if (fault := rule(row))), None)


def _nothing(row: Row) -> Fault | None:
    if row.messages or not _blank(row.text):
        return None
    what = "the text is only white space" if row.text else "the row is empty, expected turns or a text"
    return what, _FILL_IN


def _unknown_role(row: Row) -> Fault | None:
    for turn, message in enumerate(row.messages, 1):
        if message.role not in ROLES:
            return f"turn {turn} has the unknown role {message.role!r}", nearest(message.role, ROLES)
    return None


def _order(row: Row) -> Fault | None:
    before = ""
    for turn, message in enumerate(row.messages, 1):
        if message.role not in _NEXT[before]:
            found = f"{message.role} after {before}" if before else f"{message.role} at the beginning"
            what = f"turn {turn} is {found}, expected {' or '.join(_NEXT[before])}"
            return what, "merge turns of one role, add the one that is missing"
        before = message.role
    if before in ("", "assistant") or (before == "user" and (row.compares or row.label)):
        return None
    return f"the last turn is {before}, expected assistant", "add the answer or drop the last turn"


def _empty_turn(row: Row) -> Fault | None:
    for turn, message in enumerate(row.messages, 1):
        if _blank(message.content):
            found = "only white space" if message.content else "empty"
            return (
                f"turn {turn} ({message.role}) is {found}, expected text",
                _FILL_IN,
            )
    return None


def _no_choice(row: Row) -> Fault | None:
    if not row.compares:
        return None
    for side, answer in (("chosen", row.chosen), ("rejected", row.rejected)):
        if _blank(answer):
            return (
                f"the {side} answer is {'only white space' if answer else 'empty'}, expected text",
                _FILL_IN,
            )
    if row.chosen.strip() == row.rejected.strip():
        return "the chosen and the rejected answer are the same", "leave the row out: it teaches nothing"
    return None


def _blank(text: str) -> bool:
    return not text or text.isspace()


def _bad_character(row: Row) -> Fault | None:
    for name, text in _texts(row):
        if found := _SUSPECT.search(text):
            code = ord(found[0])
            what = f"{name} holds {_character(code)} U+{code:04X} at character {found.start() + 1}"
            return what, "remove it" if code < 0xD800 else "fetch the text again with the right encoding"
    return None


def _texts(row: Row) -> Iterator[tuple[str, str]]:
    for turn, message in enumerate(row.messages, 1):
        yield f"turn {turn} ({message.role})", message.content
    yield "the text", row.text
    yield "the chosen answer", row.chosen
    yield "the rejected answer", row.rejected
    yield "tools", row.tools
    yield "family", row.family


def _character(code: int) -> str:
    if code == 0xFFFD:
        return "the replacement character"
    return "the lone surrogate" if code >= 0xD800 else "the control character"


def _bad_tools(row: Row) -> Fault | None:
    return _tools_fault(row.tools) if row.tools else None


@lru_cache(maxsize=256)
def _tools_fault(text: str) -> Fault | None:
    """What keeps a template from writing the tools out. Many rows of a file have the same."""
    fix = "write the tools as a JSON list of objects"
    try:
        tools = json.loads(text, parse_constant=_no_json)
        whole = json.dumps(tools, ensure_ascii=False)
    except (ValueError, RecursionError) as error:
        return f"tools is not JSON that can be read ({error})", fix
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        return "tools is not a list of objects", fix
    if _depth(tools) > _DEEPEST_TOOLS:
        return f"tools is nested deeper than {_DEEPEST_TOOLS} levels", fix
    if found := _SUSPECT.search(whole):  # an escape such as \\ud800 is seen only once it is read
        return f"tools holds {_character(ord(found[0]))} U+{ord(found[0]):04X}", "remove it"
    return None


def _no_json(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _depth(value: Any) -> int:
    """Levels of lists and objects, found level by level."""
    depth, level = 0, [value]
    while level := [x for x in level if isinstance(x, list | dict)]:
        depth += 1
        level = [y for x in level for y in (x.values() if isinstance(x, dict) else x)]
    return depth


_RULES: tuple[Callable[[Row], Fault | None], ...] = (
    _nothing,
    _unknown_role,
    _order,
    _empty_turn,
    _no_choice,
    _bad_character,
    _bad_tools,
)


class _Seen:
    """The rows there have been, as 8-byte hashes, each with where it first was, in about 130 bytes a row."""

    def __init__(self) -> None:
        self._places: dict[int, int] = {}
        self._files: dict[str, int] = {}

    def fault(self, row: Row) -> Fault | None:
        """The fault of being the same as an earlier row; remembers the row if it is not."""
        key = _fingerprint(row)
        place = self._places.get(key)
        if place is None:
            self._places[key] = self._place(row.where)
            return None
        return f"same as {self._where(place)}", "leave one of them out"

    def _place(self, where: str) -> int:
        """File and line in one number. A where without a line counts as a file, at line 0."""
        file, _, line = where.rpartition(":")
        if not (file and line.isdecimal() and len(line) < 10):
            file, line = where, "0"
        return self._files.setdefault(file, len(self._files)) << 32 | int(line)

    def _where(self, place: int) -> str:
        file = next(name for name, index in self._files.items() if index == place >> 32)
        line = place & 0xFFFFFFFF
        return f"{file}:{line}" if line else file


def _fingerprint(row: Row) -> int:
    """Hash of what is trained on. Checked text holds no U+001F, so that turns cannot run into one another."""
    turns = chain.from_iterable((message.role, message.content) for message in row.messages)
    verdict = "" if row.liked is None else str(row.liked)
    text = "\x1f".join((row.text, *turns, row.tools, row.chosen, row.rejected, verdict, row.label))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True, slots=True)
class Spread:
    """Smallest, middle, 95th-percentile and largest value; the inner two are right to three digits."""

    smallest: int = 0
    median: int = 0
    p95: int = 0
    largest: int = 0

    def __str__(self) -> str:
        return f"{self.smallest} least, {self.median} median, {self.p95} p95, {self.largest} most"


@dataclass(frozen=True, slots=True)
class LintReport:
    """What :func:`lint` found. Statistics are of the good rows.

    ``roles`` counts turns by role and ``turns`` spreads turns per conversation; ``characters`` spreads the
    length of answers (assistant turns, and the texts of text rows); ``cjk`` is the share of rows, 0 to 1,
    with Chinese, Japanese or Korean characters; ``families`` counts rows by family, where they have one.
    """

    rows: int
    good: int
    problems: tuple[Problem, ...]
    roles: Mapping[str, int]
    turns: Spread
    characters: Spread
    cjk: float
    families: Mapping[str, int]

    def lines(self) -> list[str]:
        """A summary for people, without the problems themselves."""
        text = [f"rows: {self.rows} ({self.good} good, {len(self.problems)} with a problem)"]
        if self.roles:
            text.append(f"turns: {_counts(self.roles)}; per conversation {self.turns}")
        if self.good:
            text.append(f"answer characters: {self.characters}")
            text.append(f"Chinese, Japanese or Korean: {self.cjk:.0%} of rows")
        if self.families:
            text.append(f"families: {_counts(self.families)}")
        return text


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def lint(sources: Iterable[Source]) -> LintReport:
    """Read and check every row of the sources (folders too, see :func:`tunewright.data.formats.sources`).

    Raises:
        DataError: a source that cannot be read at all.
    """
    tally = Tally()
    for item in check(chain.from_iterable(map(formats.read, formats.sources(sources)))):
        tally.add(item)
    return tally.report()


class Tally:
    """Counts for a report, in memory that does not grow with the rows (but for the problems)."""

    def __init__(self) -> None:
        self.good = self.cjk = 0
        self.problems: list[Problem] = []
        self.roles: Counter[str] = Counter()
        self.families: Counter[str] = Counter()
        self.turns, self.characters = _Lengths(), _Lengths()

    def watch(self, rows: Iterable[Row | Problem]) -> Iterator[Row | Problem]:
        """Pass everything on and count it on the way."""
        for item in rows:
            self.add(item)
            yield item

    def add(self, item: Row | Problem) -> None:
        """Count one checked row or problem."""
        if isinstance(item, Problem):
            self.problems.append(item)
            return
        self.good += 1
        self.cjk += any(_is_cjk(text) for text in (item.text, *(m.content for m in item.messages)))
        if item.family:
            self.families[item.family] += 1
        if item.messages:
            self._add_turns(item.messages)
        else:
            self.characters.add(len(item.text))

    def _add_turns(self, messages: tuple[Message, ...]) -> None:
        self.turns.add(len(messages))
        for message in messages:
            self.roles[message.role] += 1
            if message.role == "assistant":
                self.characters.add(len(message.content))

    def facts(self) -> dict[str, Any]:
        """The report as JSON values, with the number of problems in place of the problems."""
        return {**asdict(replace(self.report(), problems=())), "problems": len(self.problems)}

    def report(self) -> LintReport:
        """What was counted so far."""
        return LintReport(
            rows=self.good + len(self.problems),
            good=self.good,
            problems=tuple(self.problems),
            roles=dict(self.roles),
            turns=self.turns.spread(),
            characters=self.characters.spread(),
            cjk=self.cjk / self.good if self.good else 0.0,
            families=dict(self.families),
        )


def _is_cjk(text: str) -> bool:
    return not text.isascii() and _CJK.search(text) is not None


class _Lengths:
    """A histogram of lengths. Above 999 only three digits are kept, so that it stays small."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()
        self._smallest, self._largest = sys.maxsize, 0

    def add(self, length: int) -> None:
        self._smallest, self._largest = min(self._smallest, length), max(self._largest, length)
        step = 10 ** max(0, len(str(length)) - 3)
        self._counts[length // step * step] += 1

    def spread(self) -> Spread:
        if not self._counts:
            return Spread()
        return Spread(self._smallest, self._share(0.5), self._share(0.95), self._largest)

    def _share(self, share: float) -> int:
        """The smallest length that at least this share of all lengths does not exceed."""
        lengths = sorted(self._counts)
        passed = list(accumulate(self._counts[length] for length in lengths))
        return lengths[bisect_left(passed, share * passed[-1])]
