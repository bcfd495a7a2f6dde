"""What several rows of a batch begin with goes through the model once: a prompt, or instructions that all rows have."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate, pairwise, takewhile
from typing import Any

import numpy as np

from tunewright.core.errors import ModelError
from tunewright.core.words import Words
from tunewright.data.tokens import LENGTH
from tunewright.fast import Batch, Plain, Technique, Work, look
from tunewright.fast._lower_blocks import frozen
from tunewright.fast.attention import Attention, base_model
from tunewright.fast.packing import Packing, in_one_row, reach
from tunewright.models import likelihood

_LEAST = 8
"""Fewer tokens are not worth the order they cost."""
_WORTH = 0.15
"""Of the tokens of the shortest rows, where no two have a prompt in common: of less, too little is saved on long ones."""
_DROPS = ("attention_dropout", "attn_pdrop")


class SharedPrompts(Technique):
    """Needs samples in one row: that of technique ``packing``."""

    idea = Words(
        "What several samples begin with goes through the model once, such as a prompt with two answers; each sees it.",
        "多条样本相同的开头（如同一提示的两个回答）只通过模型一次，各样本都能看到它。",
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
        """Skipping blocks gains more than sharing what goes through them; and rows must begin alike: the shortest tell,
        since what those have in common is the most of them.
        """
        if work.epochs > 1 and frozen(work.model):
            return "the frozen blocks' states are kept by sample"
        if work.answers:
            return ""
        first = next(work.batches())
        alike = _is_of_rows(first) and sum(shared(first)[1]) >= _WORTH * int(first[LENGTH].sum())
        return "" if alike else "samples do not begin alike"

    @contextmanager
    def on(self, work: Work) -> Iterator[None]:
        """Losses come in the same order as of the padded batch."""
        before = likelihood.layout(work.model)

        def laid_out(model: Any, batch: Batch) -> Batch:
            if _is_of_rows(batch) and int(batch[LENGTH].max()) <= reach(model):
                # Also where no two are alike: blocks are compiled for one layout.
                return in_one_row(batch, *shared(batch))
            return before(model, batch) if before else batch

        work.portion.share(True)
        try:
            with Attention().on(work), likelihood.laid_out_by(work.model, laid_out):
                yield
        finally:
            work.portion.share(False)


def _is_of_rows(batch: Batch) -> bool:
    """Whether tokens are learned, of rows whose lengths are known."""
    return LENGTH in batch and "labels" in batch and batch["labels"].shape == batch["input_ids"].shape


def shared(batch: Batch) -> tuple[list[int], list[int]]:
    """For each row, which row has the tokens that it begins with, and how many those are: none for that row itself.

    None of them is learned in the row that leaves them to another. Rows are looked at in the order of a dictionary. One
    leaves what it can to the row that has the tokens of those before it, or has its own from there on, whichever saves
    more in all.
    """
    ids_BT = batch["input_ids"].cpu().numpy()
    labels_BT, lengths_B = batch["labels"].cpu().numpy(), batch[LENGTH].cpu().numpy()
    order = sorted(range(len(ids_BT)), key=lambda row: ids_BT[row].astype(">u4").tobytes())
    before_learned_B = np.argmax(labels_BT != likelihood.IGNORED, 1)
    free = np.minimum(before_learned_B, lengths_B - 1)[order].tolist()
    alike = [_alike(ids_BT[one], ids_BT[after]) for one, after in pairwise(order)] + [0]
    owners, counts = list(range(len(order))), [0] * len(order)
    owner, with_owner = order[0], 0
    for place, row in enumerate(order):
        count = min(with_owner, free[place], int(lengths_B[owner]))
        if count >= max(_LEAST, _saved(alike[place:-1], free[place + 1 :], with_owner)):
            owners[row], counts[row] = owner, count
            with_owner = min(with_owner, alike[place])
        else:
            owner, with_owner = row, alike[place]
    return owners, counts


def _alike(one: np.ndarray, other: np.ndarray) -> int:
    """How many first tokens are the same."""
    differ = np.flatnonzero(one != other)
    return int(differ[0]) if len(differ) else len(one)


def _saved(alike: list[int], free: list[int], already: int) -> int:
    """What rows can leave to the one before them all, beside what they leave anyway: of ``free`` tokens each, when
    ``alike`` are the same in each and the one before it.
    """
    # In this order none is more like a row before it than all between them are.
    least = accumulate(alike, min)
    gains = takewhile(lambda gain: gain[0] > already, zip(least, free, strict=True))
    return sum(min(some, most) - min(already, most) for some, most in gains)


def _agrees(work: Work) -> bool:
    """Whether two samples that begin alike have the losses that they have side by side."""

    def compare(batch: Batch) -> bool:
        both = {name: x.repeat(2, *[1] * (x.dim() - 1)) for name, x in batch.items()}
        begun = int(batch[LENGTH][0]) // 2
        both["labels"] = both["labels"].clone()
        both["labels"][:, :begun] = likelihood.IGNORED
        both["labels"][:, begun] = 0
        plain = Plain.of(work.model, both)
        row = in_one_row(plain.batch, [0, 0], [0, begun])
        with Attention().on(work):
            return plain.agrees(likelihood.looked_through(work.model, row).losses_N)

    try:
        return look(work, compare)
    except (TypeError, ValueError, ModelError):  # as of samples in one row
        return False
