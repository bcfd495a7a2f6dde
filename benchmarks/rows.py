"""The rows of a workload as tokens, with plain transformers: what is learned is the last answer and its end."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

IGNORED = -100
Tree = dict[str, Any]


def read(path: str | Path) -> list[Tree]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows: Sequence[Tree]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def split(row: Tree) -> Tree:
    """The row as prompt and completion, which is how TRL is told to learn the answer only."""
    return {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}


def talks(row: Tree) -> list[Tree]:
    """The row's conversations: one, or the prompt with each of two answers."""
    if "messages" in row:
        return [row]
    return [{"messages": [*row["prompt"], *row[side]]} for side in ("chosen", "rejected")]


def encode(tokenizer: Any, rows: Sequence[Tree], max_length: int) -> Iterator[Tree]:
    """``input_ids`` and ``labels`` (not shifted, -100 where nothing is learned) of each row, cut at ``max_length``.

    The answer begins where the generation prompt ends. White space that the template puts after it is not learned.
    """
    for row in rows:
        prompt, whole = (
            tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=asked)
            for turns, asked in ((row["messages"][:-1], True), (row["messages"], False))
        )
        if not whole.startswith(prompt):
            raise ValueError("the chat template renders a prompt otherwise when its answer follows")
        coded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        start, end = len(prompt), len(whole.rstrip())
        labels = [
            token if first >= start and first < end else IGNORED
            for token, (first, _) in zip(coded["input_ids"], coded["offset_mapping"], strict=True)
        ]
        yield {"input_ids": coded["input_ids"][:max_length], "labels": labels[:max_length]}


def facts(tokenizer: Any, rows: Sequence[Tree], max_length: int) -> Tree:
    """Counts that speed and work are told by: tokens, supervised tokens, and the sum of squared lengths."""
    coded = list(encode(tokenizer, [talk for row in rows for talk in talks(row)], max_length))
    lengths = [len(sample["input_ids"]) for sample in coded]
    learned = sum(label != IGNORED for sample in coded for label in sample["labels"][1:])
    squares = sum(length**2 for length in lengths)
    return {"rows": len(rows), "tokens": sum(lengths), "supervised": learned, "squares": squares}
