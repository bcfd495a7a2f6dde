"""Files of any common shape to rows: Alpaca, ShareGPT, OpenAI messages, prompt and completion, text.

Two answers to one question are read, too. Images, audio and video come out as Problems, never as rows with a part
missing.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

from tunewright.core.errors import DataError, Problem, nearest
from tunewright.data import preferences, readers
from tunewright.data.catalog import sources
from tunewright.data.fields import (
    MISSING,
    Fields,
    RowError,
    kind_of,
    object_of,
    parsed,
    short,
    text_of,
    wrong,
)
from tunewright.data.rows import ROLES, Message, Row, Source

__all__ = ["COLUMNS", "FORMATS", "TAGS", "read", "sources"]

FORMATS = ("auto", "alpaca", "sharegpt", "messages", "prompt-completion", "text", "plain")
COLUMNS = (
    *("prompt", "query", "response", "system", "history", "messages", "tools", "text", "family"),
    *("images", "videos", "audios", "chosen", "rejected", "kto_tag", "margin", "label"),
)
TAG_ROLES = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "system_tag": "system",
    "observation_tag": "tool",
    "function_tag": "assistant",
}
TAGS = ("role_tag", "content_tag", *TAG_ROLES)

ROLE_NAMES = {role: role for role in ROLES} | {
    "human": "user",
    **dict.fromkeys(("gpt", "bot", "chatgpt", "function_call"), "assistant"),
    "observation": "tool",
}
PAIRS = (
    ("prompt", "completion"),
    ("question", "answer"),
    ("instruction", "response"),
    ("prompt", "response"),
    ("问", "答"),
)
PROMPTS = tuple(dict.fromkeys(prompt for prompt, _ in PAIRS))
RESPONSES = tuple(dict.fromkeys((*(response for _, response in PAIRS), "output")))
CONVERSATIONS = ("conversations", "messages")

_MEDIA = ("images", "videos", "audios")
_MULTIMODAL = "multimodal content is not supported"


def read(source: Source) -> Iterator[Row | Problem]:
    """Stream a file's rows; a row that cannot be used comes out as the Problem it has.

    Raises:
        DataError: already at the call: the file is absent, empty or of an unknown kind, or the source
            names a format, column or tag that does not exist.
    """
    _check_names(source)
    try:
        rows = _prose(source) if _is_prose(source, readers.check_file(source.path)) else _shaped(source)
        first = next(rows, None)
    except OSError as error:
        raise DataError(readers.unopened(source.path, error)) from error
    if first is None:
        raise DataError(readers.empty(source.path))
    return chain((first,), rows)


def _check_names(source: Source) -> None:
    """DataError with every unknown format, column and tag name of a source."""
    asked = (
        ("format", {source.format: ""}, FORMATS),
        ("column", dict(source.columns), COLUMNS),
        ("tag", dict(source.tags), TAGS),
    )
    problems = [
        Problem(str(source.path), f"unknown {kind} {name!r}", nearest(name, known))
        for kind, names, known in asked
        for name in names
        if name not in known
    ]
    if problems:
        raise DataError(problems)


def _is_prose(source: Source, ending: str) -> bool:
    """Whether the file is read as paragraphs; a ``.txt`` file may as well hold one JSON object a line."""
    is_txt = ending.removesuffix(".gz") == ".txt"
    if source.format == "plain" and not is_txt:
        what = f"format 'plain' cannot read {ending}"
        raise DataError(Problem(str(source.path), what, "use format 'text'"))
    if source.format == "auto":
        return is_txt and not readers.is_jsonl(source.path)
    return is_txt and source.format in ("plain", "text")


def _prose(source: Source) -> Iterator[Row | Problem]:
    for item in readers.paragraphs(source.path):
        yield item if isinstance(item, Problem) else Row(f"{source.path}:{item[0]}", text=item[1], prose=True)


def _shaped(source: Source) -> Iterator[Row | Problem]:
    shape = _Shape(source)
    for item in readers.records(source.path):
        yield item if isinstance(item, Problem) else shape.row(*item)


class _Shape:
    """How the records of one source become rows."""

    def __init__(self, source: Source) -> None:
        self.path, self.format = source.path, source.format
        self.columns, self.tags = dict(source.columns), dict(source.tags)
        tagged = {self.tags[tag]: role for tag, role in TAG_ROLES.items() if tag in self.tags}
        self.roles = ROLE_NAMES | tagged
        self.media = frozenset(self.columns.get(name, name) for name in _MEDIA)
        own = ((self.columns.get(side, key) for key in keys) for side, keys in preferences.SIDES.items())
        self.preference = frozenset(chain.from_iterable(own))

    def row(self, line: int, value: Any) -> Row | Problem:
        """The record as a row, or what is wrong with it."""
        where = f"{self.path}:{line}"
        try:
            return self._row(where, Fields(object_of(value), self.columns))
        except RowError as bad:
            return Problem(where, bad.what, bad.fix)

    def _row(self, where: str, fields: Fields) -> Row:
        if held := fields.filled(self.media):
            raise RowError(f"{held}: {_MULTIMODAL}", "leave the row out, or train on its text only")
        return self._compared(where, fields) if fields.filled(self.preference) else self._read(where, fields)

    def _compared(self, where: str, fields: Fields) -> Row:
        """A row with two answers; one that it has besides stays."""
        sides = {side: self._side(fields, side, keys) for side, keys in preferences.SIDES.items()}
        row = self._read(where, fields, answered=False) if _asks(fields) else Row(where, tools=fields.tools())
        own = row.messages[len(row.prompt) :]
        prompt, fault = preferences.asked(sides["chosen"], sides["rejected"], list(row.prompt))
        if fault:
            raise RowError(fault, "give both answers to one question")
        for side, turns in sides.items():
            if turns[-1].role != "assistant":
                raise RowError(f"{side} ends with a turn of {turns[-1].role}", "end it with the answer")
        chosen, rejected = (turns[-1].content for turns in sides.values())
        margin = fields.margin()
        return replace(row, messages=(*prompt, *own), chosen=chosen, rejected=rejected, margin=margin)

    def _side(self, fields: Fields, side: str, keys: tuple[str, ...]) -> list[Message]:
        key, value = fields.find(side, *keys)
        if value is MISSING:
            raise wrong(side, value, "an answer beside the other one")
        value = parsed(value) if isinstance(value, str) and value.startswith(("[", "{")) else value
        if not isinstance(value, str | list | dict) or value == []:
            raise wrong(key, value, "an answer or a conversation")
        return preferences.turns(value, lambda turn: self._any_turn(key, turn))

    def _any_turn(self, key: str, turn: Any) -> Message:
        """A turn of either dialect."""
        shares = isinstance(turn, dict) and "from" in turn
        return self._turn(key, turn, *(("from", "value") if shares else ("role", "content")))

    def _read(self, where: str, fields: Fields, answered: bool = True) -> Row:
        name = _detect(fields) if self.format == "auto" else self.format
        if name == "text":
            text, family = fields.text("text", "text"), fields.optional("family", "family")
            return Row(where, text=text, family=family, label=fields.label())
        turns = _TURNS[name](self, fields) if answered or name in _CONVERSED else self._question(fields)
        system = fields.optional("system", "system")
        if system and not (turns and turns[0].role == "system"):
            turns.insert(0, Message("system", system))
        family, liked = fields.optional("family", "family"), fields.verdict()
        return Row(
            where, tuple(turns), tools=fields.tools(), family=family, liked=liked, label=fields.label()
        )

    def alpaca(self, fields: Fields) -> list[Message]:
        return self._exchange(fields, ("instruction",), ("output",))

    def pair(self, fields: Fields) -> list[Message]:
        whole = [pair for pair in PAIRS if pair[0] in fields.record and pair[1] in fields.record]
        if not whole or "prompt" in self.columns or "response" in self.columns:
            return self._exchange(fields, PROMPTS, RESPONSES)
        return self._exchange(fields, whole[0][:1], whole[0][1:])

    def sharegpt(self, fields: Fields) -> list[Message]:
        return self._turns(fields, CONVERSATIONS, "from", "value")

    def messages(self, fields: Fields) -> list[Message]:
        return self._turns(fields, CONVERSATIONS[::-1], "role", "content")

    def _exchange(
        self, fields: Fields, prompts: tuple[str, ...], responses: tuple[str, ...]
    ) -> list[Message]:
        """Earlier turns, then one question and its answer; either may be a text or a list of turns."""
        asked, answer = self._asked(fields, prompts), self._spoken(*fields.find("response", *responses))
        return [*asked, *(answer or [Message("assistant", fields.text("response", *responses))])]

    def _question(self, fields: Fields) -> list[Message]:
        """What was asked, with an answer of its own if there is one beside the two to choose from."""
        answer = fields.optional("response", *RESPONSES)
        return [*self._asked(fields, PROMPTS), *([Message("assistant", answer)] if answer else [])]

    def _asked(self, fields: Fields, prompts: tuple[str, ...]) -> list[Message]:
        if turns := self._spoken(*fields.find("prompt", *prompts)):
            return [*_history(fields), *turns]
        question, query = fields.text("prompt", *prompts), fields.optional("query", "input")
        return [*_history(fields), Message("user", f"{question}\n\n{query}" if query else question)]

    def _spoken(self, key: str, value: Any) -> list[Message]:
        """The turns of a list; none of anything else."""
        value = parsed(value) if isinstance(value, str) and value.startswith("[{") else value
        if not (isinstance(value, list) and value and isinstance(value[0], dict)):
            return []
        return [self._any_turn(f"{key}[{at}]", turn) for at, turn in enumerate(value)]

    def _turns(self, fields: Fields, own: tuple[str, ...], role: str, content: str) -> list[Message]:
        key, turns = fields.list("messages", *own)
        role, content = self.tags.get("role_tag", role), self.tags.get("content_tag", content)
        return [self._turn(f"{key}[{at}]", turn, role, content) for at, turn in enumerate(turns)]

    def _turn(self, where: str, turn: Any, role_key: str, content_key: str) -> Message:
        if not isinstance(turn, dict):
            raise wrong(where, turn, "an object")
        if turn.get("tool_calls"):
            what = f"field '{where}.tool_calls' is not supported"
            raise RowError(what, "write the call into the turn's content")
        role = text_of(f"{where}.{role_key}", turn.get(role_key, MISSING))
        if role not in self.roles:
            what = f"field '{where}.{role_key}' is {short(role)}, expected a known role"
            raise RowError(what, nearest(role[:60], self.roles))
        return Message(self.roles[role], _content(f"{where}.{content_key}", turn.get(content_key, MISSING)))


_TURNS: dict[str, Callable[[_Shape, Fields], list[Message]]] = {
    "alpaca": _Shape.alpaca,
    "sharegpt": _Shape.sharegpt,
    "messages": _Shape.messages,
    "prompt-completion": _Shape.pair,
}


_CONVERSED = ("sharegpt", "messages")


def _asks(fields: Fields) -> bool:
    """Whether a question stands beside the answers."""
    return fields.has("prompt", *PROMPTS) or fields.has("messages", *CONVERSATIONS)


def _detect(fields: Fields) -> str:
    """The format that a record's keys speak of; a known but incomplete one rather than none."""
    record, columns = fields.record, fields.columns
    if fields.has("messages", *CONVERSATIONS) or "messages" in columns:
        return _dialect(fields.find("messages", *CONVERSATIONS)[1])
    if "text" in columns:
        return "text"
    if "instruction" in record and "output" in record:
        return "alpaca"
    whole = any(prompt in record and response in record for prompt, response in PAIRS)
    if whole or "prompt" in columns or "response" in columns:
        return "prompt-completion"
    if "text" in record:
        return "text"
    return _detect_incomplete(record)


def _detect_incomplete(record: dict[str, Any]) -> str:
    if any(key in record for key in CONVERSATIONS):
        return "sharegpt"
    if "instruction" in record:
        return "alpaca"
    if any(key in record for key in (*PROMPTS, *RESPONSES)):
        return "prompt-completion"
    found = ", ".join(short(key) for key in list(record)[:8]) or "none"
    expected = "instruction and output, conversations, messages, prompt and completion, or text"
    raise RowError(f"no known field; found {found}, expected {expected}", "name the fields with columns")


def _dialect(turns: Any) -> str:
    """ShareGPT or messages, by the keys of the first turn."""
    turns = parsed(turns) if isinstance(turns, str) else turns
    first = turns[0] if isinstance(turns, list) and turns else None
    return "messages" if isinstance(first, dict) and ("role" in first or "content" in first) else "sharegpt"


def _history(fields: Fields) -> list[Message]:
    if not fields.has("history", "history"):
        return []
    turns: list[Message] = []
    key, pairs = fields.list("history", "history")
    for at, pair in enumerate(pairs):
        if not isinstance(pair, list) or len(pair) != 2:
            raise wrong(f"{key}[{at}]", pair, "a list of question and answer")
        question, answer = (text_of(f"{key}[{at}]", text) for text in pair)
        turns += (Message("user", question), Message("assistant", answer))
    return turns


def _content(key: str, value: Any) -> str:
    """A turn's text, which may come in parts."""
    if not isinstance(value, list):
        return text_of(key, value)
    return "".join(_part(f"{key}[{at}]", part) for at, part in enumerate(value))


def _part(where: str, part: Any) -> str:
    if not isinstance(part, dict):
        raise wrong(where, part, "an object")
    kind = part.get("type", "text")
    if kind == "text":
        key = "value" if "value" in part else "text"
        return text_of(f"{where}.{key}", part.get(key, MISSING))
    kind = kind if isinstance(kind, str) else kind_of(kind)
    found = f"field '{where}' is of type {short(kind)}, expected 'text'"
    if any(word in kind for word in ("image", "video", "audio", "file")):
        raise RowError(f"{found}: {_MULTIMODAL}", "leave the row out, or keep its text only")
    raise RowError(found, "write it into the text, or leave the part out")
