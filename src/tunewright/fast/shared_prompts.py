"""What several rows of a batch begin with goes through the model once: chosen and rejected, or a group's answers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from tunewright.core.errors import ModelError
from tunewright.core.words import Words
from tunewright.data.tokens import LENGTH
from tunewright.fast import Batch, Technique, Work, agrees
from tunewright.fast._lower_blocks import frozen
from tunewright.fast.attention import Attention, base_model
from tunewright.fast.packing import Packing, in_one_row, reach
from tunewright.models import likelihood

_LEAST = 8
"""Fewer tokens are not worth the order they cost."""
_DROPS = ("attention_dropout", "attn_pdrop")


class SharedPrompts(Technique):
    """Needs samples in one row: that of technique ``packing``."""

    idea = Words(
        "A prompt with several answers goes through the model once; each answer sees it.",
        "同一提示的多个回答只让提示通过模型一次，每个回答都能看到它。",
    )

    def why_not(self, work: Work) -> str:
        """A token must be the same whichever answer follows."""
        if work.device.type != "cpu":
            return "PyTorch has no kernel for samples that share tokens for this device"
        if reason := Packing().why_not(work):
            return reason
        config = base_model(work.model).config.get_text_config()
        if any(getattr(config, name, 0.0) for name in _DROPS):
            return "attention drops at random, each sample's its own"
        return "" if _agrees(work) else "the model does not let samples share what they begin with"

    def not_worth(self, work: Work) -> str:
        """Elsewhere rows hardly ever begin alike; and skipping blocks gains more than sharing what goes through them."""
        if work.epochs > 1 and frozen(work.model):
            return "the frozen blocks' states are kept by sample"
        return "" if work.answers else "every sample has a prompt of its own"

    @contextmanager
    def on(self, work: Work) -> Iterator[None]:
        """Losses come in the same order as of the padded batch."""
        before = likelihood.layout(work.model)

        def laid_out(model: Any, batch: Batch) -> Batch:
            if LENGTH in batch and int(batch[LENGTH].max()) <= reach(model):
                owners, counts = shared(batch)
                if any(counts):
                    return in_one_row(batch, owners, counts)
            return before(model, batch) if before else batch

        with Attention().on(work), likelihood.laid_out_by(work.model, laid_out):
            yield


def shared(batch: Batch) -> tuple[list[int], list[int]]:
    """For each row, which row has the tokens that it begins with, and how many those are: none for that row itself.

    None of them is learned in the row that leaves them to another.
    """
    ids_BT = batch["input_ids"].cpu().numpy()
    labels_BT, lengths_B = batch["labels"].cpu().numpy(), batch[LENGTH].cpu().numpy()
    free_B = np.minimum(
        np.argmax(labels_BT != likelihood.IGNORED, 1), lengths_B - 1
    )  # before what is learned first
    owners, counts = list(range(len(ids_BT))), [0] * len(ids_BT)
    owner = -1
    for row in sorted(owners, key=lambda i: ids_BT[i].astype(">u4").tobytes()):
        free = int(free_B[row])
        alike = 0 if owner < 0 else _alike(ids_BT[row, :free], ids_BT[owner, : lengths_B[owner]])
        if alike >= max(_LEAST, free / 2):
            owners[row], counts[row] = owner, alike
        else:
            owner = row
    return owners, counts


def _alike(one: np.ndarray, other: np.ndarray) -> int:
    """How many first tokens are the same."""
    most = min(len(one), len(other))
    differ = np.flatnonzero(one[:most] != other[:most])
    return int(differ[0]) if len(differ) else most


def _agrees(work: Work) -> bool:
    """Whether two samples that begin alike have the losses that they have side by side."""

    def compare(batch: Batch) -> bool:
        both = {name: x.repeat(2, *[1] * (x.dim() - 1)) for name, x in batch.items()}
        begun = int(batch[LENGTH][0]) // 2
        both["labels"] = both["labels"].clone()
        both["labels"][:, :begun] = likelihood.IGNORED
        both["labels"][:, begun] = 0
        few = likelihood.thinned(both)
        row = in_one_row(few, [0, 0], [0, begun])
        expected = likelihood.sampled(work.model, few)
        with Attention().on(work):
            own = likelihood.sampled(work.model, row)
        close = 1e-4 if work.model.dtype == torch.float32 else 5e-2
        return torch.allclose(own, expected, rtol=close, atol=close)

    try:
        return agrees(work, compare)
    except (TypeError, ValueError, ModelError):  # as of samples in one row
        return False
