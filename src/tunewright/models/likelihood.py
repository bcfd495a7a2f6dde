"""How likely a model finds the tokens it is taught, and what it makes of them: where hidden states become numbers."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tunewright.models import anatomy

IGNORED = -100
"""The label of a position that is not learned."""
PACKED = ("position_ids", "cu_seq_lens_q", "prefixes")
"""What a batch has besides, whose samples follow one another in one row."""
Batch = Mapping[str, Tensor]
Losses = Callable[[Any, Batch], Tensor]
Layout = Callable[[Any, Batch], Batch]
_FEW = 128
"""Labels that two ways are compared at: logits of whole rows may take more than training does."""
_LARGE = 1000.0
"""Logits as large as no output layer makes them: what caps logits shows at these."""
_AT_ONCE, _LOGITS = 128, 1 << 23
"""Rows of logits that are made together where none is kept, and logits in them."""
_WAY, _LAYOUT, _ENDS = "tunewright_losses", "tunewright_layout", "tunewright_head_ends"


def token_losses(model: Any, batch: Batch) -> Tensor:
    """Cross-entropy in nats [N] (fp32) of the N labels that are not :data:`IGNORED`, row by row.

    ``batch`` has ``input_ids`` and ``labels`` [B, T]; labels are already shifted. No attention mask is given: with
    right padding under causal attention no real token sees a padded one.
    """
    way: Losses = vars(model).get(_WAY, plain)
    return way(model, _laid_out(model, batch))


def states(model: Any, batch: Batch) -> Tensor:
    """Hidden states [N, D] where a label is not :data:`IGNORED`, row by row: what the output layer would be given.

    The labels themselves do not matter, and no logits are made.
    """
    laid_out = _laid_out(model, batch)
    return hidden_states(model, laid_out)[laid_out["labels"] != IGNORED]


def words(model: Any, batch: Batch) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Rows [N, ...] where a label is not :data:`IGNORED`, and what makes logits [n, V] of some of them.

    So logits of all need not be held; they are where a model changes them after its output layer.
    """
    if not _ends_with_head(model, batch):
        laid_out = _laid_out(model, batch)
        logits_BTV = model(**given(laid_out), use_cache=False).logits
        return logits_BTV[laid_out["labels"] != IGNORED], lambda rows: rows
    head = anatomy.output_head(model)
    assert isinstance(head, nn.Module), "a language model has an output layer"  # noqa: S101 our own bug
    return states(model, batch), head


def _ends_with_head(model: Any, batch: Batch) -> bool:
    """Found out once, by all of the batch that is announced, and without drawing: a run that goes on finds out again."""
    if _ENDS not in vars(model):
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                vars(model)[_ENDS] = comes_last(model, batch)
        finally:
            model.train(was_training)
    found: bool = vars(model)[_ENDS]
    return found


def comes_last(model: Any, batch: Batch) -> bool:
    """Whether the model gives what its output layer gives; what it does to small logits may not show."""
    return anatomy.output_head(model) is not None and looked_through(model, thinned(batch, 1)).ends_with_head


@dataclass(frozen=True)
class Looked:
    """What one pass of a model with an output layer shows."""

    states_BTD: Tensor
    """:func:`hidden_states`."""
    losses_N: Tensor
    """As :func:`plain`."""
    ends_with_head: bool
    """Whether logits are left as the output layer makes them, these and large ones."""


def looked_through(model: Any, batch: Batch) -> Looked:
    """Logits are made only where a label is: for few labels, as :func:`thinned` leaves them."""
    head: Any = anatomy.output_head(model)
    kept_BT, make = batch["labels"] != IGNORED, head.forward
    seen = list[Tensor]()

    def take(states_BTD: Tensor) -> Tensor:
        states_BTD = _own(states_BTD, batch)
        logits_NV = make(states_BTD[kept_BT])
        large_V = torch.linspace(-_LARGE, _LARGE, logits_NV.shape[1]).to(logits_NV)
        seen.extend((states_BTD, torch.cat([logits_NV, large_V[None]])))
        # Each is a row of its own: a method may cut off what comes before a row's tokens.
        return seen[1][:, None].clone()

    after_MV = computed(model, take, batch).logits[:, 0]
    states_BTD, before_MV = seen
    losses_N = F.cross_entropy(after_MV[:-1].float(), batch["labels"][kept_BT], reduction="none")
    return Looked(states_BTD, losses_N, torch.equal(after_MV, before_MV.to(after_MV)))


def is_plain(model: Any) -> bool:
    """Whether losses of this model go by way of all logits."""
    return _WAY not in vars(model)


def plain(model: Any, batch: Batch) -> Tensor:
    """By way of all logits [B, T, V]."""
    logits_BTV = model(**given(batch), use_cache=False).logits
    kept = batch["labels"] != IGNORED
    return F.cross_entropy(logits_BTV[kept].float(), batch["labels"][kept], reduction="none")


def in_parts(model: Any, batch: Batch) -> Tensor:
    """As :func:`plain`, some rows at a time where nothing comes after the output layer: for passes without a gradient,
    which keep nothing of logits.
    """
    if not _ends_with_head(model, batch):
        return plain(model, batch)
    head: Any = anatomy.output_head(model)
    kept_BT = batch["labels"] != IGNORED
    states_ND, labels_N = hidden_states(model, batch)[kept_BT], batch["labels"][kept_BT]
    rows = min(_AT_ONCE, max(1, _LOGITS // int(model.config.get_text_config().vocab_size)))
    parts = zip(torch.split(states_ND, rows), torch.split(labels_N, rows), strict=True)
    return torch.cat([_cross_entropy(head(x_nD), y_n) for x_nD, y_n in parts])


def _cross_entropy(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """As torch's [N], in fp32; of what it makes on the way nothing but one copy of the logits is there at a time."""
    own_NV = logits_NV.float()
    own_NV = own_NV.sub_(own_NV.amax(1, keepdim=True))
    chosen_N = own_NV.gather(1, labels_N[:, None])[:, 0]
    return own_NV.exp_().sum(1).log() - chosen_N


def thinned(batch: Batch, few: int = _FEW) -> Batch:
    """The batch with no more than so many of its labels, from its first row to its last."""
    labels_BT = batch["labels"].clone()
    learned = (labels_BT != IGNORED).flatten().nonzero()[:, 0]
    every = max(1, -(-len(learned) // few))
    left_out = torch.arange(len(learned), device=learned.device) % every != 0
    labels_BT.view(-1)[learned[left_out]] = IGNORED
    return {**batch, "labels": labels_BT}


def given(batch: Batch) -> dict[str, Tensor]:
    """What of a batch the model itself is given."""
    return {name: batch[name] for name in ("input_ids", *PACKED) if name in batch}


def hidden_states(model: Any, batch: Batch) -> Tensor:
    """What the output layer would be given [B, T, D] at the batch's tokens; it computes nothing."""
    seen: list[Tensor] = []

    def take(states_BTD: Tensor) -> Tensor:
        seen.append(states_BTD)
        return states_BTD.new_zeros(1, 1, 1)

    computed(model, take, batch)
    return _own(seen[0], batch)


def _own(states_BTD: Tensor, batch: Batch) -> Tensor:
    """Of the batch's tokens; a method may put prompts of its own before them."""
    return states_BTD[:, -batch["input_ids"].shape[1] :]


def computed(model: Any, forward: Callable[[Tensor], Tensor], batch: Batch) -> Any:
    """The model's own output, with ``forward`` in place of its output layer's."""
    head = anatomy.output_head(model)
    assert isinstance(head, nn.Module), "a language model has an output layer"  # noqa: S101 our own bug
    own = vars(head).get("forward")
    vars(head)["forward"] = forward
    try:
        return model(**given(batch), use_cache=False)
    finally:
        del vars(head)["forward"]
        if own is not None:
            vars(head)["forward"] = own


@contextmanager
def computed_by(model: Any, losses: Losses) -> Iterator[None]:
    """Within, :func:`token_losses` of this model goes this way."""
    with _set(model, _WAY, losses):
        yield


@contextmanager
def laid_out_by(model: Any, layout: Layout) -> Iterator[None]:
    """Within, this model is given what ``layout`` makes of a batch; labels stay in the same order."""
    with _set(model, _LAYOUT, layout):
        yield


def layout(model: Any) -> Layout | None:
    """How batches are laid out for this model now, if not as they are."""
    found: Layout | None = vars(model).get(_LAYOUT)
    return found


def _laid_out(model: Any, batch: Batch) -> Batch:
    own = layout(model)
    return own(model, batch) if own else batch


@contextmanager
def _set(model: Any, name: str, value: Any) -> Iterator[None]:
    before = vars(model).get(name)
    vars(model)[name] = value
    try:
        yield
    finally:
        vars(model).pop(name)
        if before is not None:
            vars(model)[name] = before
