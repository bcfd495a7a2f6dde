"""How likely a model finds the tokens it is taught: the one place where hidden states become losses."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn import functional as F

IGNORED = -100
"""The label of a position that is not learned."""
PACKED = ("position_ids", "cu_seq_lens_q")
"""What a batch has besides, whose samples follow one another in one row."""
Losses = Callable[[Any, Mapping[str, Tensor]], Tensor]
_WAY = "tunewright_losses"


def token_losses(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Cross-entropy in nats [N] (fp32) of the N labels that are not :data:`IGNORED`, row by row.

    ``batch`` has ``input_ids`` and ``labels`` [B, T]; labels are already shifted. No attention mask is given: with
    right padding under causal attention no real token sees a padded one.
    """
    way: Losses = vars(model).get(_WAY, plain)
    return way(model, batch)


def plain(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """By way of all logits [B, T, V]."""
    logits_BTV = model(**given(batch), use_cache=False).logits
    kept = batch["labels"] != IGNORED
    return F.cross_entropy(logits_BTV[kept].float(), batch["labels"][kept], reduction="none")


def given(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of a batch the model itself is given."""
    return {name: batch[name] for name in ("input_ids", *PACKED) if name in batch}


@contextmanager
def computed_by(model: Any, change: Callable[[Losses], Losses]) -> Iterator[None]:
    """Within, :func:`token_losses` of this model goes the way that ``change`` makes of the one before."""
    before: Losses | None = vars(model).get(_WAY)
    vars(model)[_WAY] = change(before or plain)
    try:
        yield
    finally:
        vars(model).pop(_WAY)
        if before is not None:
            vars(model)[_WAY] = before
