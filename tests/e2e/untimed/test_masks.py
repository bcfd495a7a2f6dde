"""Assistant masks of real tokenizers, checked token by token against text laid out by hand."""

from itertools import islice

import pytest
from transformers import AutoTokenizer

from tunewright.data import formats, lint
from tunewright.data.rows import Message, Row, Source
from tunewright.data.template import ChatCodec

Piece = tuple[str, bool]


def chatml(messages: tuple[Message, ...]) -> list[Piece]:
    pieces: list[Piece] = []
    for m in messages:
        said = m.role == "assistant"
        pieces += [(f"<|im_start|>{m.role}\n", False), (f"{m.content}<|im_end|>", said), ("\n", False)]
    return pieces


def llama2(messages: tuple[Message, ...]) -> list[Piece]:
    pieces: list[Piece] = []
    for m in messages:
        if m.role == "assistant":
            pieces.append((f" {m.content.strip()} </s>", True))
        else:
            pieces.append((f"<s>[INST] {m.content.strip()} [/INST]", False))
    return pieces


def expected_mask(tokenizer, pieces: list[Piece]) -> tuple[list[int], list[int]]:
    """Tokens of the whole text; learned are those that begin inside a piece the assistant said."""
    text = "".join(words for words, _ in pieces)
    said = [flag for words, flag in pieces for _ in words]
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return encoding["input_ids"], [int(said[a]) if b > a else 0 for a, b in encoding["offset_mapping"]]


def real_rows(folder, count: int) -> list[Row]:
    """Single turns in both languages, and conversations of several turns."""
    names = ("llamafactory-data/data/alpaca_en_demo.json", "llamafactory-data/data/alpaca_zh_demo.json",
             "medicalgpt-data/data/sft/sharegpt_zh_1K_format.jsonl")  # fmt: skip
    rows: list[Row] = []
    for name in names:
        good = (r for r in lint.check(formats.read(Source(folder / "data" / name))) if isinstance(r, Row))
        rows += islice(good, count // len(names) + 1)
    return rows[:count]


@pytest.mark.parametrize(
    ("tokenizer", "template", "layout"),
    [("qwen-151k", "auto", chatml), ("qwen-151k", "chatml", chatml), ("llama2-32k", "llama2", llama2)],
)
def test_only_the_assistants_words_and_end_token_are_learned(shared_fixtures, tokenizer, template, layout):
    codec = ChatCodec(
        AutoTokenizer.from_pretrained(shared_fixtures / "tokenizers" / tokenizer),
        template,
        max_length=1 << 20,
    )
    rows = real_rows(shared_fixtures, 50)
    assert len(rows) == 50
    assert any(len(row.messages) > 2 for row in rows)
    for row in rows:
        ids, learned = expected_mask(codec.tokenizer, layout(row.messages))
        tokens = codec.encode(row)
        assert tokens.ids == ids, row.where
        assert tokens.learned == learned, row.where


@pytest.mark.parametrize(("tokenizer", "template", "end"), [("qwen-151k", "auto", "<|im_end|>"),
                                                            ("llama2-32k", "llama2", "</s>")])  # fmt: skip
def test_what_is_learned_decodes_to_the_answers(shared_fixtures, tokenizer, template, end):
    codec = ChatCodec(
        AutoTokenizer.from_pretrained(shared_fixtures / "tokenizers" / tokenizer),
        template,
        max_length=1 << 20,
    )
    for row in real_rows(shared_fixtures, 50):
        tokens = codec.encode(row)
        words = codec.tokenizer.decode(
            [i for i, said in zip(tokens.ids, tokens.learned, strict=True) if said]
        )
        answers = [m.content.strip() for m in row.messages if m.role == "assistant"]
        assert [part.strip() for part in words.split(end)[:-1]] == answers
        assert codec.tokenizer.convert_tokens_to_ids(end) in codec.stop_ids
