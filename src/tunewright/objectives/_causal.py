"""What causal language-model objectives share: padding and next-token cross-entropy."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunewright.models.likelihood import IGNORED, token_losses
from tunewright.objectives import Batch, Objective, Sample


def pad(samples: Sequence[Sample], pad_id: int) -> Batch:
    """``input_ids`` and ``labels`` [B, T], right-padded; labels are already shifted: position t holds token
    t+1 where that token is learned, else -100.
    """
    longest = max(len(s["input_ids"]) for s in samples)
    ids_BT = np.full((len(samples), longest), pad_id, dtype=np.int64)
    labels_BT = np.full((len(samples), longest), IGNORED, dtype=np.int64)
    for i, sample in enumerate(samples):
        ids, learned = sample["input_ids"], sample["learned"]
        ids_BT[i, : len(ids)] = ids
        labels_BT[i, : len(ids) - 1] = np.where(learned[1:] > 0, ids[1:], IGNORED)
    return {"input_ids": torch.from_numpy(ids_BT), "labels": torch.from_numpy(labels_BT)}


class Causal(Objective):
    """Next-token cross-entropy wherever a sample's ``learned`` says so; a subclass says what samples are."""

    is_likelihood = True

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Right-padded ``input_ids`` and shifted ``labels`` [B, T]."""
        return pad(samples, self.codec.pad_id)

    def weight(self, batch: Batch) -> float:
        """Supervised tokens."""
        return float((batch["labels"] != IGNORED).sum())

    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Mean cross-entropy in nats per supervised token."""
        return token_losses(model, batch).mean(), {}
