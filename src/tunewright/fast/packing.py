"""A batch's samples one after another in one row, without padding; none sees another.

All that works on tokens one by one then works on real ones only. The row is filled up to one of few lengths: matrix
kernels are made anew for every new shape, which for short runs costs more than padding does.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tunewright.core.errors import ModelError
from tunewright.core.words import Words
from tunewright.data.tokens import LENGTH
from tunewright.fast import Batch, Technique, Work, quietly
from tunewright.fast.attention import Attention, base_model
from tunewright.models import anatomy, likelihood
from tunewright.models.announce import ROUTER

_TO_A_DOUBLING, _LEAST_STEP = 8, 16
"""Lengths of a row between one and twice that one, and how far they are apart at least."""
_NAME = "packing"


class Packing(Technique):
    """Needs attention that knows where samples end: that of technique ``attention``."""

    idea = Words(
        "Samples follow one another in one row without padding; none sees another.",
        "样本首尾相接排成一行，没有填充，彼此不可见。",
    )

    def why_not(self, work: Work) -> str:
        """Every token must be treated alike, but for its sample and its place in it."""
        if reason := Attention().why_not(work):
            return reason
        if anatomy.output_head(work.model) is None:
            return "the model has no output layer"
        if getattr(work.model, ROUTER, None) is not None:
            return "adapters are chosen for each sample"
        if _NAME not in work.found:
            work.found[_NAME] = _agrees(work)
        return "" if work.found[_NAME] else "the model does not keep samples in one row apart"

    @contextmanager
    def on(self, work: Work) -> Iterator[None]:
        """Losses come in the same order as of the padded batch."""
        with Attention().on(work), likelihood.laid_out_by(work.model, _packed):
            yield


def _packed(model: Any, batch: Batch) -> Batch:
    fits = LENGTH in batch and int(batch[LENGTH].max()) <= reach(model)
    return in_one_row(batch) if fits else batch


def reach(model: Any) -> float:
    """Tokens that every layer sees back to the first of; of longer samples, their ends do not tell who sees whom."""
    config = base_model(model).config.get_text_config()
    windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return min((window for window in windows if window), default=math.inf)


def filled(tokens: int) -> int:
    """The length of a row of so many tokens: an eighth longer at most, if it is not short."""
    step = max(_LEAST_STEP, (1 << (tokens - 1).bit_length()) // (2 * _TO_A_DOUBLING))
    return -(-tokens // step) * step


def in_one_row(batch: Batch, owners: Sequence[int] = (), counts: Sequence[int] = ()) -> dict[str, Tensor]:
    """The batch of B samples as one row [1, M], :func:`filled` up.

    ``cu_seq_lens_q`` int32 [B + 1] says where each begins, and where the last ends. With ``owners`` and ``counts`` [B]
    a sample's first tokens are left out, so many, since its owner's are the same; ``prefixes`` int64 [B, 2] says where
    those lie in the row, and how many they are.
    """
    lengths_B = batch[LENGTH].cpu()  # so that no length is asked of a GPU
    device, width = batch["input_ids"].device, batch["input_ids"].shape[1]
    skipped_B = torch.tensor(counts) if counts else torch.zeros_like(lengths_B)
    ends_S1 = F.pad((lengths_B - skipped_B).cumsum(0), (1, 0))
    tokens = int(ends_S1[-1])
    places_BT = torch.arange(width).expand(len(lengths_B), -1)
    kept_BT = (places_BT < lengths_B[:, None]) & (places_BT >= skipped_B[:, None])
    kept_M = kept_BT.flatten().nonzero()[:, 0].to(device)
    row = {
        name: F.pad(x_BT.flatten()[kept_M], (0, filled(tokens) - tokens), value=fill)[None]
        for name, x_BT, fill in (
            ("input_ids", batch["input_ids"], 0), ("labels", batch["labels"], likelihood.IGNORED),
            ("position_ids", places_BT.to(device), 0),
        )
    }  # fmt: skip
    if counts:
        row["prefixes"] = torch.stack([ends_S1[list(owners)], skipped_B], 1).to(device)
    return {**row, "cu_seq_lens_q": ends_S1.to(device, torch.int32)}


def _agrees(work: Work) -> bool:
    """Whether two samples in one row have the losses that they have side by side."""
    plain = work.plainly
    if LENGTH not in plain.batch:
        return False
    try:
        with quietly(work.model, plain.batch), Attention().on(work):
            return plain.agrees(likelihood.looked_through(work.model, in_one_row(plain.batch)).losses_N)
    except (
        TypeError,
        ValueError,
        ModelError,
    ):  # the architecture, or a prompt before each row, knows no ends
        return False
