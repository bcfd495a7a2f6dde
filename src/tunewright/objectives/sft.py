"""Supervised fine-tuning: next-token cross-entropy on the assistant's words only (Ouyang et al. 2022)."""

from collections.abc import Iterable, Iterator

import numpy as np

from tunewright.core.config import Config as BaseConfig
from tunewright.core.errors import Problem
from tunewright.core.units import chunks
from tunewright.data.rows import Row
from tunewright.data.template import Tokens
from tunewright.objectives import Sample, origin
from tunewright.objectives._causal import Causal


class Config(BaseConfig):
    """Supervised fine-tuning has no options of its own."""


class Sft(Causal):
    """Learns the assistant turns of conversations; everything else is context."""

    def encode(self, rows: Iterable[Row]) -> Iterator[Sample | Problem]:
        """``input_ids`` int32 [T] and ``learned`` uint8 [T], one sample a row."""
        for some in chunks(rows, 500):
            spoken = [row for row in some if row.messages]
            tokens = iter(self.codec.encode_many(spoken))
            for row in some:
                yield self._sample(row, next(tokens) if row.messages else None)

    def _sample(self, row: Row, tokens: Tokens | Problem | None) -> Sample | Problem:
        if isinstance(tokens, Problem):
            return tokens
        if tokens is None:
            return Problem(row.where, "a plain text, but sft learns conversations", "use objective: pretrain")
        if not any(tokens.learned[1:]):
            what = f"no assistant token is left within max_length {self.codec.max_length}"
            return Problem(row.where, what, "raise data.max_length or shorten the row")
        ids, learned = np.array(tokens.ids, np.int32), np.array(tokens.learned, np.uint8)
        return {"input_ids": ids, "learned": learned, **origin(row.where)}
