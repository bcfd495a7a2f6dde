"""Conversations to tokens, knowing which of them the assistant said.

A template that marks the assistant's words with ``{% generation %}`` is believed. For others the words are
found in the rendered text: what a turn adds to the conversation before it, generation prompt included.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib import resources
from typing import Any, NamedTuple

from jinja2 import TemplateError

from tunewright.core import store
from tunewright.core.errors import DataError, ModelError, Problem, nearest
from tunewright.data import template_check
from tunewright.data.rows import Message, Row

_MARK = "\u2060tunewright\u2060"
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>")


Spans = list[tuple[int, int]]
"""Half-open ranges of characters, in order."""


class Tokens(NamedTuple):
    """``ids`` [T] and, for each, 1 where the model must learn to say it."""

    ids: list[int]
    learned: list[int]


def template_names() -> list[str]:
    """The templates a recipe may name."""
    folder = resources.files("tunewright.data") / "templates"
    return sorted(p.name.removesuffix(".jinja") for p in folder.iterdir() if p.name.endswith(".jinja"))


def _name_one() -> str:
    return f"name one: {', '.join(template_names())}"


@contextmanager
def _its_own_errors() -> Iterator[None]:
    """Whatever goes wrong in a template is an error of the template."""
    try:
        yield
    except TemplateError:
        raise
    except Exception as error:
        raise TemplateError(f"{type(error).__name__}: {error}") from error


def _named(name: str, tokenizer: Any) -> str:
    """A shipped template; its end-of-turn marker becomes the model's own end token if it lacks the marker."""
    if name not in template_names():
        raise ModelError(Problem("data.template", f"there is no template {name!r}",
                                 nearest(name, ["auto", *template_names()])))  # fmt: skip
    text = (resources.files("tunewright.data") / "templates" / f"{name}.jinja").read_text("utf-8")
    for marker in _TURN_ENDS:
        if marker not in tokenizer.get_vocab():
            text = text.replace(marker, "{{ eos_token }}")
    return text


class ChatCodec:
    """A tokenizer with its chat template and a longest length.

    ``tokenizer`` is a fast Hugging Face tokenizer; it is changed: a named template becomes its own, so that
    what is saved beside an adapter says how the adapter was trained. ModelError if its own template cannot be
    trusted: it runs for ever, fills the memory or reaches for Python's insides.
    """

    def __init__(self, tokenizer: Any, template: str = "auto", max_length: int = 1024) -> None:
        if template != "auto":
            tokenizer.chat_template = _named(template, tokenizer)
        else:
            template_check.check(tokenizer.chat_template, _name_one())
        self.tokenizer = tokenizer
        self.max_length = max_length

    def key(self) -> dict[str, Any]:
        """What decides which tokens a row becomes."""
        return {
            "tokenizer": store.sha256_json(self.tokenizer.backend_tokenizer.to_str()),
            "special": {name: str(token) for name, token in self.tokenizer.special_tokens_map.items()},
            "template": self.tokenizer.chat_template,
            "max_length": self.max_length,
        }

    @property
    def has_template(self) -> bool:
        """Whether conversations can be rendered."""
        return bool(self.tokenizer.chat_template)

    def require_template(self) -> None:
        """ModelError if there is none."""
        if not self.has_template:
            raise ModelError(Problem("data.template", "the model's tokenizer has no chat template",
                                     _name_one()))  # fmt: skip

    @cached_property
    def _marks_generation(self) -> bool:
        return (
            "{% generation" in self.tokenizer.chat_template
            or "{%- generation" in self.tokenizer.chat_template
        )

    def render(self, messages: tuple[Message, ...], tools: str = "", prompt: bool = False) -> str:
        """The conversation as text; with ``prompt`` it ends where the assistant begins to speak.

        Raises jinja2's TemplateError if the template refuses it.
        """
        self.require_template()
        turns = [{"role": m.role, "content": m.content} for m in messages]
        with _its_own_errors():
            text = self.tokenizer.apply_chat_template(
                turns, tools=_tools(tools), tokenize=False, add_generation_prompt=prompt
            )
        return str(text)

    def prompt(self, messages: tuple[Message, ...], tools: str = "") -> list[int]:
        """Token ids after which the model answers; DataError if the template refuses the conversation."""
        try:
            text = self.render(messages, tools, prompt=True)
        except TemplateError as error:
            what = f"the chat template refuses the conversation: {error}"
            raise DataError(Problem("data.template", what, _name_one())) from error
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode(self, row: Row) -> Tokens:
        """A conversation's tokens, cut at ``max_length``; DataError if the template refuses it."""
        tokens = self.encode_many([row])[0]
        if isinstance(tokens, Problem):
            raise DataError(tokens)
        return tokens

    def encode_many(self, rows: Sequence[Row]) -> list[Tokens | Problem]:
        """Many conversations' tokens, the tokenizer at work on all at once; a Problem for what it refuses."""
        rendered = [self._rendered(row) for row in rows]
        texts = [item[0] for item in rendered if not isinstance(item, Problem)]
        encoding = self._tokenized(texts)
        return [
            item if isinstance(item, Problem) else self._cut(*next(encoding), item[1]) for item in rendered
        ]

    def _rendered(self, row: Row) -> tuple[str, Spans] | Problem:
        try:
            return self._text_and_spans(row)
        except TemplateError as error:
            return Problem(
                row.where, f"the chat template refuses the row: {error}", "change the row or template"
            )
        except DataError as error:
            return error.problems[0]

    def _tokenized(self, texts: list[str]) -> Iterator[tuple[list[int], Spans]]:
        """For each text its token ids and their character offsets."""
        if not texts:
            return iter(())
        encoding = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        return zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)

    def _cut(self, ids: list[int], offsets: Spans, spans: Spans) -> Tokens:
        return Tokens(ids[: self.max_length], _inside(offsets[: self.max_length], spans))

    def _text_and_spans(self, row: Row) -> tuple[str, Spans]:
        """The rendered text and the half-open character spans that the assistant said."""
        if self._marks_generation:
            return self._marked(row)
        text = self.render(row.messages, row.tools)
        return text, self._found(row, text)

    def _marked(self, row: Row) -> tuple[str, Spans]:
        from transformers.utils.chat_template_utils import render_jinja_template

        turns = [{"role": m.role, "content": m.content} for m in row.messages]
        with _its_own_errors():
            rendered, spans = render_jinja_template(
                conversations=[turns], tools=_tools(row.tools), chat_template=self.tokenizer.chat_template,
                return_assistant_tokens_mask=True, **self.tokenizer.special_tokens_map,
            )  # fmt: skip
        return rendered[0], list(spans[0])

    def _found(self, row: Row, text: str) -> Spans:
        spans, cursor = [], 0
        for i, message in enumerate(row.messages):
            if message.role != "assistant":
                continue
            start, end = self._turn(row, i, text, cursor)
            spans.append((start, end))
            cursor = end
        return spans

    def _turn(self, row: Row, i: int, text: str, cursor: int) -> tuple[int, int]:
        """Where turn ``i`` stands in ``text``, its end-of-turn token included, white space after it not."""
        before = self.render(row.messages[:i], row.tools, prompt=True)
        through = self.render(row.messages[: i + 1], row.tools)
        if text.startswith(through) and through.startswith(before):
            return len(before), len(before) + len(self._trim(through[len(before) :]))
        # Some templates rewrite earlier turns (they drop old reasoning); then see where a mark would stand.
        marked = (*row.messages[:i], Message("assistant", _MARK), *row.messages[i + 1 :])
        head, _, tail = self.render(marked, row.tools).partition(_MARK)
        if not (text.startswith(head) and text.endswith(tail)):
            raise DataError(
                Problem(row.where, f"turn {i + 1} is not found in what the chat template makes of it")
            )
        start, end = len(head), len(text) - len(tail)
        ending = next((t for t in self._endings if text[end:].lstrip().startswith(t)), "")
        return start, text.index(ending, end) + len(ending)

    @cached_property
    def _endings(self) -> list[str]:
        added = [t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special]
        return sorted({*added, self.tokenizer.eos_token or ""} - {""}, key=len, reverse=True)

    def _trim(self, words: str) -> str:
        bare = words.rstrip()
        return bare if bare.endswith(tuple(self._endings)) else words

    @cached_property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer: the tokenizer's end token and whatever the template ends a turn with."""
        stops = {self.tokenizer.eos_token_id} - {None}
        if self.has_template:
            whole = ChatCodec(self.tokenizer, max_length=1 << 30)
            probe = whole.encode(Row("", (Message("user", "a"), Message("assistant", "b"))))
            if not any(probe.learned):
                what = "the chat template leaves out what the assistant says"
                raise ModelError(Problem("data.template", what, _name_one()))
            last = max(i for i, said in enumerate(probe.learned) if said)
            if probe.ids[last] in self.tokenizer.all_special_ids or self._is_marker(probe.ids[last]):
                stops.add(probe.ids[last])
        return sorted(stops)

    def _is_marker(self, token: int) -> bool:
        return token in self.tokenizer.added_tokens_decoder

    @property
    def pad_id(self) -> int:
        """The id that fills short rows; never learned, so any id will do."""
        tokenizer = self.tokenizer
        return int(
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
        )


def _tools(tools: str) -> Any:
    return json.loads(tools) if tools else None


def _inside(offsets: Spans, spans: Spans) -> list[int]:
    """1 for each token that begins within a span; ``offsets`` and ``spans`` are both in order."""
    learned, k = [], 0
    for start, end in offsets:
        while k < len(spans) and spans[k][1] <= start:
            k += 1
        learned.append(int(k < len(spans) and spans[k][0] <= start and end > start))
    return learned
