"""What objectives on two answers share: both as one sample, and how likely a model finds each."""

import hashlib
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from tunewright.core.errors import Problem
from tunewright.core.units import chunks
from tunewright.data.rows import Row
from tunewright.data.template import Tokens
from tunewright.data.tokens import LENGTH, TASK
from tunewright.models.likelihood import IGNORED, token_losses
from tunewright.objectives import Batch, Objective, Sample, origin
from tunewright.objectives._causal import pad

NUMBER = "number"
"""The field of a sample, and of a batch, that holds a number which follows from its tokens."""
_FIRST = "first"
"""The field of a sample that holds how many of its tokens are the prompt with the first answer."""


class TwoAnswers(Objective):
    """A sample holds two conversations, one after the other, of each of which only the last answer counts."""

    rows = 2
    sides: ClassVar[tuple[str, str]]
    """What messages call the two answers."""

    @abstractmethod
    def both(self, rows: list[Row]) -> list[tuple[Row, Row] | Problem]:
        """The two conversations of every row; a Problem for one that has none to give."""

    def encode(self, rows: Iterable[Row]) -> Iterator[Sample | Problem]:
        """``input_ids`` int32 [F + S] and ``learned`` uint8 [F + S]; ``first`` says how many F is."""
        for some in chunks(rows, 250):
            found = self.both(some)
            spoken = chain.from_iterable(pair for pair in found if not isinstance(pair, Problem))
            tokens = iter(self.codec.encode_many(list(spoken)))
            for row, pair in zip(some, found, strict=True):
                yield pair if isinstance(pair, Problem) else self._sample(row, (next(tokens), next(tokens)))

    def _sample(self, row: Row, both: tuple[Tokens | Problem, Tokens | Problem]) -> Sample | Problem:
        parts, learned = [], []
        turns = sum(message.role == "assistant" for message in row.prompt) + 1
        for name, side in zip(self.sides, both, strict=True):
            if isinstance(side, Problem):
                return side
            if not any(said := _last_turn(side.learned, turns)):
                what = f"no token of the {name} answer is left within max_length {self.codec.max_length}"
                return Problem(row.where, what, "raise data.max_length or shorten the row")
            parts.append(np.array(side.ids, np.int32))
            learned.append(said)
        ids = np.concatenate(parts)
        number = int.from_bytes(hashlib.sha256(ids.tobytes()).digest()[:8], "little") >> 1
        return {
            "input_ids": ids, "learned": np.concatenate(learned), _FIRST: np.array([len(parts[0])], np.int64),
            NUMBER: np.array([number], np.int64), **self.fields(row), **origin(row.where),
        }  # fmt: skip

    def fields(self, row: Row) -> Sample:
        """What else a sample holds."""
        return {}

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """``input_ids`` and shifted ``labels`` [2B, T]: the first answers, then the second; ``number`` [B]."""
        rows = [*map(_first, samples), *map(_second, samples)]
        lengths_R = torch.tensor([len(row["input_ids"]) for row in rows])
        numbers_B = torch.tensor([int(sample[NUMBER][0]) for sample in samples])
        return {LENGTH: lengths_R, NUMBER: numbers_B, **pad(rows, self.codec.pad_id)}

    def batch(self, samples: Sequence[Sample], device: torch.device) -> Batch:
        """As for all objectives; ``task`` is of each row [2B]."""
        batch = super().batch(samples, device)
        return {**batch, TASK: batch[TASK].repeat(2)} if TASK in batch else batch

    def weight(self, batch: Batch) -> float:
        """Samples."""
        return float(len(batch[NUMBER]))


@dataclass(frozen=True)
class Answers:
    """Log-probabilities in nats of both answers of B samples, each summed over its tokens, and how many those are."""

    first_B: Tensor
    second_B: Tensor
    first_tokens_B: Tensor
    second_tokens_B: Tensor

    def per_token(self) -> tuple[Tensor, Tensor]:
        """The mean of a token, of the first and of the second answers [B]."""
        return self.first_B / self.first_tokens_B, self.second_B / self.second_tokens_B


class Pairs(TwoAnswers):
    """Learns from a chosen and a rejected answer to the same question."""

    wants = "pairs"
    sides = ("chosen", "rejected")

    def both(self, rows: list[Row]) -> list[tuple[Row, Row] | Problem]:
        """The chosen answer, then the rejected one."""
        return [
            (row.answering(row.chosen), row.answering(row.rejected)) if row.compares
            else Problem(row.where, "one answer, expected two to choose from", "give it chosen and rejected")
            for row in rows
        ]  # fmt: skip


class Preference(Pairs):
    """Moves how likely both answers are; a subclass says what is minimised."""

    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Mean over the pairs; figures of the rewards that the answers have in this objective's sense."""
        losses_B, chosen_B, rejected_B = self.losses(answers(model, batch), batch)
        won_B = (chosen_B > rejected_B).float()
        return losses_B.mean(), {
            "accuracy": float(won_B.mean()), "margin": float((chosen_B - rejected_B).mean()),
            "chosen": float(chosen_B.mean()), "rejected": float(rejected_B.mean()),
        }  # fmt: skip

    @abstractmethod
    def losses(self, found: Answers, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Losses [B], and the rewards of the chosen and of the rejected answers [B]."""


def answers(model: Any, batch: Batch) -> Answers:
    """What the model makes of both answers of a batch."""
    said_R, tokens_R = said(model, batch)
    return Answers(*said_R.chunk(2), *tokens_R.chunk(2))


def said(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probability in nats of what is learned of each row [R], and how many tokens that is [R]."""
    labels_RT = batch["labels"]
    rows_N = (labels_RT != IGNORED).nonzero()[:, 0]
    losses_N = token_losses(model, batch)
    sums_R = losses_N.new_zeros(len(labels_RT)).index_add(0, rows_N, -losses_N)
    return sums_R, torch.bincount(rows_N, minlength=len(labels_RT)).to(sums_R.dtype)


def half(batch: Batch, second: bool) -> Batch:
    """The rows of the first, or of the second answers alone."""
    rows = len(batch["labels"])
    part = slice(rows // 2, None) if second else slice(rows // 2)
    return {name: x[part] if len(x) == rows else x for name, x in batch.items()}


def _last_turn(learned: Sequence[int], turns: int) -> np.ndarray:
    """Of the tokens that the assistant says, those of the last of so many turns; none if that was cut off."""
    said = np.array(learned, np.uint8)
    starts = np.flatnonzero(np.diff(said, prepend=0) == 1)
    if len(starts) < turns:
        return np.zeros_like(said)
    said[: starts[-1]] = 0
    return said


def _first(sample: Sample) -> Sample:
    end = int(sample[_FIRST][0])
    return {name: sample[name][:end] for name in ("input_ids", "learned")}


def _second(sample: Sample) -> Sample:
    start = int(sample[_FIRST][0])
    return {name: sample[name][start:] for name in ("input_ids", "learned")}
