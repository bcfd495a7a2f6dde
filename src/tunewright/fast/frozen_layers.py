"""What frozen lower blocks make of a sample is computed once and kept, so that later epochs begin above them.

With the lowest k of n blocks frozen, a step goes forwards through n - k of them; backwards it never went further. The
states come from one pass over all samples in an order of its own and not from the first epoch: a run that was killed
and goes on finds the same bits again.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tunewright.core.machine import available_memory
from tunewright.core.units import human_bytes
from tunewright.core.words import Words
from tunewright.fast import Batch, Technique, Work, look
from tunewright.fast._kept_states import KeptStates
from tunewright.fast._lower_blocks import LowerBlocks, decoder, frozen, samples_seen, states
from tunewright.models import anatomy
from tunewright.models.announce import ROUTER

_MEMORY_SHARE, _DISK_SHARE = 0.25, 0.5
"""Of what is free. The rest is for training itself, and for its checkpoints."""


class FrozenLayers(Technique):
    """For methods that leave the embeddings and the lowest blocks as they are."""

    idea = Words(
        "What the frozen lower blocks make of each sample is computed once and kept for all epochs.",
        "被冻结的底部各层对每个样本只计算一次，结果保存下来供各轮训练使用。",
    )

    def why_not(self, work: Work) -> str:
        """Below the first trained block nothing may be trained or random, or see more than a sample's tokens."""
        if not anatomy.blocks(work.model):
            return "no decoder blocks were found"
        if getattr(work.model, ROUTER, None) is not None:
            return "adapters are chosen for each sample"
        if work.changing:
            return "samples are not the same each time"
        if any(getattr(module, "gradient_checkpointing", False) for module in work.model.modules()):
            return "gradient checkpointing is on"
        if not frozen(work.model):
            return "the first decoder block is trained"
        return _unfit(work) or _no_room(work)

    def not_worth(self, work: Work) -> str:
        """Keeping them takes a pass of its own."""
        return "no sample is seen twice" if work.epochs <= 1 else ""

    @contextmanager
    def on(self, work: Work) -> Iterator[None]:
        """Training batches begin with what was kept; all others go through every block."""
        kept = KeptStates(work.folder, int(_MEMORY_SHARE * available_memory()))
        lower = LowerBlocks(work.model, kept)
        try:
            lower.compute(work.batches())
            with lower.left_out():
                yield
        finally:
            kept.close()


def _unfit(work: Work) -> str:
    """What speaks against it, found by watching one row on its way through the frozen blocks."""
    seen: dict[str, Any] = {}

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["samples"] = samples_seen(seen["batch"], args, kwargs)

    def leave(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen["learned"], seen["chance"] = states(output).requires_grad, _chance(work.device)

    def learn(batch: Batch) -> None:
        seen["batch"], seen["before"] = batch, _chance(work.device)
        work.model.train()
        with torch.enable_grad():
            work.model(input_ids=batch["input_ids"], use_cache=False)

    hooks = [
        decoder(work.model).register_forward_pre_hook(enter, with_kwargs=True),
        frozen(work.model)[-1].register_forward_hook(leave),
    ]
    try:
        with torch.random.fork_rng([work.device] if work.device.type == "cuda" else []):
            look(work, learn)
    finally:
        for hook in hooks:
            hook.remove()
    return _speaks_against(seen)


def _speaks_against(seen: dict[str, Any]) -> str:
    if not seen.get("samples"):
        return "the blocks are given more than the tokens of known samples"
    if seen["learned"]:
        return "the embeddings, or something else below the first trained block, are trained"
    return "" if torch.equal(seen["before"], seen["chance"]) else "there is dropout in what is frozen"


def _chance(device: torch.device) -> Tensor:
    """The state of the random numbers: whoever draws one changes it."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _no_room(work: Work) -> str:
    """Whether too much is to be kept, by an epoch's tokens with their padding."""
    tokens = work.tokens / work.epochs if work.epochs else 0
    need = tokens * anatomy.hidden_size(work.model) * work.model.dtype.itemsize
    folder = next(path for path in (work.folder, *work.folder.parents) if path.exists())
    room = _MEMORY_SHARE * available_memory() + _DISK_SHARE * shutil.disk_usage(folder).free
    if need <= room:
        return ""
    return f"{human_bytes(need)} would have to be kept, and there is room for {human_bytes(room)}"
