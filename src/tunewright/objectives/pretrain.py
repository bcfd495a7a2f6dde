"""Causal language modelling on running text, packed into full blocks (Radford 2018; Brown et al. 2020)."""

from collections.abc import Iterable, Iterator

import numpy as np
from pydantic import Field

from tunewright.core.config import Config as BaseConfig
from tunewright.core.errors import Problem
from tunewright.core.units import chunks
from tunewright.core.words import Words
from tunewright.data.rows import Row
from tunewright.data.tokens import ORIGIN
from tunewright.objectives import Facts, Sample, line_of
from tunewright.objectives._causal import Causal


class Config(BaseConfig):
    """How texts are laid out."""

    block: int = Field(256, ge=8)
    """Tokens in a block; at most data.max_length."""
    across: bool = False
    """Whether texts share blocks, and attention reaches into the text before, as GPT-3 was trained."""


class Pretrain(Causal):
    """Texts, each ended by the end token, in blocks; a longer text goes on in the next block.

    A sample is of one text, so that attention never reaches into another; technique ``packing`` puts many in one row.
    """

    wants = "texts"
    facts = Facts(
        idea=Words("The next token of running text is learned.", "学习连续文本的下一个词元。"),
        formula="−Σ log π(xₜ | x₍<ₜ₎) / |x|",
        dials=Words(
            "block up to data.max_length; lr a tenth of what the model was made with; across: true if texts are shorter than a few dozen tokens and speed counts more than clean borders.",
            "block 最大为 data.max_length；学习率取模型预训练时的十分之一；文本只有几十个词元、更看重速度时用 across: true。",
        ),
        watch=Words(
            "The held-out loss of the domain; and that of what the model knew before, which rises when it forgets.",
            "领域文本的留出损失；以及模型原有知识的留出损失，遗忘时后者会上升。",
        ),
        when=Words("A domain or a language the model has read little of.", "模型很少读到的领域或语言。"),
        paper="Radford et al. 2018; Gururangan et al. 2020, arXiv:2004.10964",
    )

    def encode(self, rows: Iterable[Row]) -> Iterator[Sample | Problem]:
        """``input_ids`` int32 [T] and ``learned`` uint8 [T]: blocks, of which the last of a text may be shorter."""
        block = min(self.config.block, self.codec.max_length)
        ids, lines, before = np.empty(0, np.int32), np.empty(0, np.int64), Row("")
        for row, more in self._ids(rows):
            if not self._goes_on(before, row):
                yield from _rest(ids, lines)
                ids, lines = ids[:0], lines[:0]
            ids = np.concatenate([ids, more])
            lines = np.concatenate([lines, np.full(len(more), line_of(row.where))])
            whole = len(ids) // block * block
            for start in range(0, whole, block):
                yield _sample(ids[start : start + block], lines[start : start + block])
            ids, lines, before = ids[whole:], lines[whole:], row
        yield from _rest(ids, lines)

    def _goes_on(self, before: Row, row: Row) -> bool:
        """Whether a row may see the one before it: paragraphs of one file are one text."""
        return self.config.across or (before.prose and row.prose and _file(before) == _file(row))

    def _ids(self, rows: Iterable[Row]) -> Iterator[tuple[Row, np.ndarray]]:
        """Each row's token ids and the end token; the tokenizer is faster on many texts at a time."""
        end = [self.codec.tokenizer.eos_token_id]
        for some in chunks(rows, 1000):
            texts = [row.text or self.codec.render(row.messages, row.tools) for row in some]
            encoded = self.codec.tokenizer(texts, add_special_tokens=False)["input_ids"]
            yield from ((row, np.array(ids + end, np.int32)) for row, ids in zip(some, encoded, strict=True))


def _file(row: Row) -> str:
    return row.where.rpartition(":")[0]


def _rest(ids: np.ndarray, lines: np.ndarray) -> Iterator[Sample]:
    if len(ids) > 1:  # one token alone has nothing to learn
        yield _sample(ids, lines)


def _sample(ids: np.ndarray, lines: np.ndarray) -> Sample:
    return {"input_ids": ids, "learned": np.ones(len(ids), np.uint8), ORIGIN: lines[[0, -1]]}
