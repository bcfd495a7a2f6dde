"""Causal language modelling on running text, packed into full blocks (Radford 2018; Brown et al. 2020)."""

from collections.abc import Iterable, Iterator

import numpy as np
from pydantic import Field

from tunewright.core.config import Config as BaseConfig
from tunewright.core.errors import Problem
from tunewright.core.units import chunks
from tunewright.data.rows import Row
from tunewright.data.tokens import ORIGIN
from tunewright.objectives import Sample, line_of
from tunewright.objectives._causal import Causal


class Config(BaseConfig):
    """How texts are laid out."""

    block: int = Field(256, ge=8)
    """Tokens in a packed block; at most data.max_length."""


class Pretrain(Causal):
    """Texts, each ended by the end token, follow one another in blocks of equal length.

    As in GPT-3, attention may reach into the text before within a block; the end token tells them apart.
    """

    wants_conversations = False

    def encode(self, rows: Iterable[Row]) -> Iterator[Sample | Problem]:
        """``input_ids`` int32 [block] and ``learned`` uint8 [block]; the last block may be shorter."""
        block = min(self.config.block, self.codec.max_length)
        ids, lines = np.empty(0, np.int32), np.empty(0, np.int64)
        for more, their_lines in self._ids(rows):
            ids, lines = np.concatenate([ids, more]), np.concatenate([lines, their_lines])
            whole = len(ids) // block * block
            for start in range(0, whole, block):
                yield _block(ids[start : start + block], lines[start : start + block])
            ids, lines = ids[whole:], lines[whole:]
        if len(ids) > 1:
            yield _block(ids, lines)

    def _ids(self, rows: Iterable[Row]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Token ids of many texts at a time, since the tokenizer is faster on many; and each one's line."""
        end = [self.codec.tokenizer.eos_token_id]
        for some in chunks(rows, 1000):
            texts = [row.text or self.codec.render(row.messages, row.tools) for row in some]
            encoded = self.codec.tokenizer(texts, add_special_tokens=False)["input_ids"]
            lines = [line_of(row.where) for row in some]
            counts = [len(ids) + 1 for ids in encoded]
            yield (
                np.array([token for ids in encoded for token in ids + end], np.int32),
                np.repeat(lines, counts),
            )


def _block(ids: np.ndarray, lines: np.ndarray) -> Sample:
    return {"input_ids": ids, "learned": np.ones(len(ids), np.uint8), ORIGIN: lines[[0, -1]]}
