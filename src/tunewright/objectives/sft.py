"""Supervised fine-tuning: next-token cross-entropy on the assistant's words only (Ouyang et al. 2022)."""

from collections.abc import Iterable, Iterator
from itertools import compress
from typing import Any

import numpy as np
from pydantic import Field
from torch import Tensor

from tunewright.core.config import Config as BaseConfig
from tunewright.core.errors import Problem
from tunewright.core.units import chunks
from tunewright.core.words import Words
from tunewright.data.rows import Row
from tunewright.data.template import Tokens
from tunewright.models.likelihood import token_losses
from tunewright.objectives import Batch, Facts, Sample, origin
from tunewright.objectives import _noise as noise
from tunewright.objectives._causal import Causal


class Config(BaseConfig):
    """How tokens count, and noise against learning by heart."""

    dft: bool = False
    """Whether a token counts by how likely it already is, so that what surprises does not pull hard (Wu et al. 2025)."""
    neftune: float = Field(0.0, ge=0)
    """Noise on the embeddings while training, alpha in Jain et al. 2023; 5 is usual, 0 is none."""


class Sft(Causal):
    """Learns the assistant turns of conversations; everything else is context."""

    facts = Facts(
        idea=Words(
            "The next token of the assistant's answers is learned; all else is context.",
            "学习助手回答的下一个词元，其余内容只作上下文。",
        ),
        formula="−Σ log π(yₜ | x, y₍<ₜ₎) / |y|; with dft each term is weighted by its own probability",
        dials=Words(
            "lr and epochs; neftune 5 where data are few and answers short; dft where the model already answers well and shall not forget.",
            "学习率与轮数；数据少、回答短时可取 neftune 5；模型已答得不错、不希望遗忘时用 dft。",
        ),
        watch=Words(
            "The held-out loss; when it rises while the training loss falls, stop earlier or take fewer parameters.",
            "留出损失；若训练损失下降而它上升，应提前停止或减少训练参数。",
        ),
        when=Words("There are answers to imitate.", "有可供模仿的回答时。"),
        paper="Ouyang et al. 2022, arXiv:2203.02155; dft: arXiv:2508.05629; neftune: arXiv:2310.05914",
    )

    def encode(self, rows: Iterable[Row]) -> Iterator[Sample | Problem]:
        """``input_ids`` int32 [T] and ``learned`` uint8 [T], one sample a row."""
        for some in chunks(rows, 500):
            usable = [not _unfit(row) for row in some]
            tokens = iter(self.codec.encode_many(list(compress(some, usable))))
            for row, fits in zip(some, usable, strict=True):
                yield self._sample(row, next(tokens)) if fits else Problem(row.where, *_unfit(row))

    @property
    def is_changing(self) -> bool:
        """With NEFTune."""
        return bool(self.config.neftune)

    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Mean cross-entropy in nats per supervised token, or what the options make of it."""
        with noise.on_embeddings(model, self.config.neftune, batch):
            losses_N = token_losses(model, batch)
        if not (self.config.dft and model.training):
            return losses_N.mean(), {}
        return (losses_N * (-losses_N.detach()).exp()).mean(), {}

    def _sample(self, row: Row, tokens: Tokens | Problem) -> Sample | Problem:
        if isinstance(tokens, Problem):
            return tokens
        if not any(tokens.learned[1:]):
            what = f"no assistant token is left within max_length {self.codec.max_length}"
            return Problem(row.where, what, "raise data.max_length or shorten the row")
        ids, learned = np.array(tokens.ids, np.int32), np.array(tokens.learned, np.uint8)
        return {"input_ids": ids, "learned": learned, **origin(row.where)}


def _unfit(row: Row) -> tuple[str, ...]:
    """What keeps sft from learning from a row, and the fix; nothing if it can."""
    if not row.messages:
        return "a plain text, but sft learns conversations", "use objective: pretrain"
    if not row.answered:
        return "two answers to choose from, but sft learns one", "use objective: dpo"
    if row.liked is False:
        return "an answer that was judged bad, but sft learns all", "use objective: kto, or leave the row out"
    return ()
