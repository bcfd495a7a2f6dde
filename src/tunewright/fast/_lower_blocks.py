"""The frozen lowest blocks of a decoder: what they make of samples, and what stands in for them afterwards."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tunewright.data.tokens import LENGTH, SAMPLE
from tunewright.fast import Batch
from tunewright.fast._kept_states import KeptStates
from tunewright.models import anatomy
from tunewright.models.announce import listening

Forward = Callable[..., Any]
_TOGETHER = 4096
"""Tokens, padding included, that go through the blocks at a time; never what training takes at a time, which may be
another number when a run goes on.
"""
_TOKENS, _ENDS = ("input_ids", "return_dict"), "cu_seq_lens_q"
_OWN = ("forward", "_compiled_call_impl")
"""What a block may have of its own that decides how it computes: a compiled one would run what was compiled."""


def frozen(model: Any) -> list[nn.Module]:
    """The blocks before the first one that is trained."""
    stack = [block for _, block in anatomy.blocks(model)]
    trained = [any(p.requires_grad for p in block.parameters()) for block in stack]
    return stack[: [*trained, True].index(True)]


def decoder(model: Any) -> nn.Module:
    """What runs the blocks one after another, from tokens to the last hidden states."""
    name, _ = anatomy.blocks(model)[0]
    found: nn.Module = model.get_submodule(name.rpartition(".")[0].rpartition(".")[0])
    return found


def samples_seen(batch: Batch, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[int]:
    """The samples that a decoder is called for, if it is given the batch's tokens and nothing else; or none.

    They may follow one another in one row. A mask, a cache or a wish for all hidden states would make the blocks give
    something else.
    """
    ids_BT, given = args[0] if args else kwargs.get("input_ids"), set(_TOKENS)
    if ids_BT is None or SAMPLE not in batch:
        return []
    if _ENDS in kwargs:
        given |= {_ENDS, "position_ids"}
        if not _in_a_row(batch, ids_BT, kwargs[_ENDS]):
            return []
    elif ids_BT is not batch.get("input_ids"):
        return []
    others = [*args[1:], *(v for name, v in kwargs.items() if name not in given)]
    alone = all(other is None or other is False for other in others)
    samples: list[int] = batch[SAMPLE].tolist()
    return samples if alone and len(samples) == len(batch["input_ids"]) else []


def _in_a_row(batch: Batch, ids_1M: Tensor, ends: Tensor | None) -> bool:
    """Whether a row is the batch's samples, whole, and what fills it up."""
    if ends is None or ends.diff().tolist() != batch[LENGTH].tolist():
        return False
    rows = [ids_T[:length] for ids_T, length in zip(batch["input_ids"], batch[LENGTH].tolist(), strict=True)]
    return torch.equal(ids_1M[0, : int(ends[-1])], torch.cat(rows))


def states(output: Any) -> Tensor:
    """The hidden states [B, T, D] in what a block returns: alone, or first of several."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


class LowerBlocks:
    """The frozen blocks of a model, and what was kept of them."""

    batch: Batch

    def __init__(self, model: Any, kept: KeptStates) -> None:
        self.model, self.kept, self.batch = model, kept, {}
        self.frozen, self.decoder = frozen(model), decoder(model)
        self._upper = [block for _, block in anatomy.blocks(model)][len(self.frozen) :]
        self._made: Any = None
        self._others: tuple[None, ...] | None = None

    @torch.no_grad()
    def compute(self, batches: Iterable[Batch]) -> None:
        """Keep the states of all samples in these batches. The blocks above are left out.

        The bits of a sample's states depend on the rows and the padding beside it. They are those of samples that
        follow one another in these batches, wherever one batch ends and the next begins.
        """

        def keep(block: nn.Module, args: Any, output: Any) -> None:
            self._made = output

        hook = self.frozen[-1].register_forward_hook(keep)
        try:
            with _replaced(self.frozen), _replaced(self._upper, lambda plain: lambda *_, **__: self._made):
                for rows in _together(batches):
                    self.decoder(
                        input_ids=pad_sequence(list(rows.values()), batch_first=True), use_cache=False
                    )
                    self.kept.add(list(rows), list(map(len, rows.values())), states(self._made))
        finally:
            hook.remove()
        self._others = (None,) * (len(self._made) - 1) if isinstance(self._made, tuple) else None
        self._made = None

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Within, they give what was kept wherever a forward pass is over announced samples."""
        hooks = [
            self.decoder.register_forward_pre_hook(self._before, with_kwargs=True),
            self.decoder.register_forward_hook(self._after, always_call=True),
        ]
        try:
            with _replaced(self.frozen, self._or_kept), listening(self.model, self):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _before(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        samples = samples_seen(self.batch, args, kwargs)
        if not samples or not self.kept.holds(samples):
            return
        ids_BT = args[0] if args else kwargs["input_ids"]
        read = self.kept.row if _ENDS in kwargs else self.kept.read
        states_BTD = read(samples, ids_BT.shape[1]).to(ids_BT.device)
        self._made = states_BTD if self._others is None else (states_BTD, *self._others)

    def _after(self, *_: Any) -> None:
        self._made = None

    def _or_kept(self, plain: Forward) -> Forward:
        return lambda *args, **kwargs: plain(*args, **kwargs) if self._made is None else self._made


def _together(batches: Iterable[Batch]) -> Iterator[dict[int, Tensor]]:
    """The tokens [T] of samples by their number, as many at a time as go through the blocks together."""
    rows: dict[int, Tensor] = {}
    longest = 0
    for batch in batches:
        lengths = batch[LENGTH].tolist()
        for sample, length, ids_T in zip(batch[SAMPLE].tolist(), lengths, batch["input_ids"], strict=True):
            longest = max(longest, length)
            if rows and longest * (len(rows) + 1) > _TOGETHER:
                yield rows
                rows, longest = {}, length
            rows[sample] = ids_T[:length]
    if rows:
        yield rows


@contextmanager
def _replaced(
    blocks: Sequence[nn.Module], make: Callable[[Forward], Forward] = lambda plain: plain
) -> Iterator[None]:
    """The forward passes of these blocks are made from their plain ones, and not compiled."""
    own = [{name: vars(block).get(name) for name in _OWN if name in vars(block)} for block in blocks]
    for block in blocks:
        vars(block)["forward"] = make(block.forward)
        vars(block).pop("_compiled_call_impl", None)
    try:
        yield
    finally:
        for block, before in zip(blocks, own, strict=True):
            del vars(block)["forward"]
            vars(block).update(before)
