"""Compile the decoder block once and use it for every layer ("regional" compilation of torch.compile).

Costs seconds at the first step, fewer where an earlier run's work is found, and needs a C++ compiler on a CPU; pays
back on runs of many steps.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy

from tunewright.core.words import Words
from tunewright.fast import Technique, Work, _native, _probes
from tunewright.fast._lower_blocks import frozen
from tunewright.fast.checkpointing import PRODUCTS, again, kept
from tunewright.models import anatomy, hollow

_COST = 8.0
"""Seconds that compiling takes: 15 the first time, 3 where what was compiled before is found."""
_SAVED = 0.25
"""Of a training's time. Whether it pays is told by the recipe alone: a run that is started again, here or after other
runs, computes the same bits.
"""
_RATE = {"cpu": 1e12, "cuda": 1e14}
"""Floating-point operations a second that a training is taken to reach, to tell how long it will be."""


@dataclass(frozen=True)
class _Way:
    """What a block keeps of its pass forwards; the rest is computed again."""

    partition: dict[str, bool]
    """Settings of torch's partitioner."""
    kept: tuple[str, ...] = ()
    """Names of operations of ours whose results are kept besides."""


def _operations(names: tuple[str, ...]) -> list[Any]:
    return [getattr(torch.ops.tunewright, name).default for name in names]


_AGAIN = {"aggressive_recomputation": True}
_LITTLE_KEPT = _Way(_AGAIN)
"""Of a block little but its input is kept: a pass of it more costs less than to write what it makes to memory and to
read it again.
"""
_ATTENTION_KEPT = _Way(_AGAIN, ("bf16_attention", "causal_attention", "packed_attention", "shared_attention"))
"""Of what is left, attention takes longest for the bytes of its result."""
_PRODUCTS_KEPT = _Way({"ban_recompute_used_far_apart": False, "ban_recompute_materialized_backward": False})
_TRACED: dict[str, Any] = {"specialize_float": True}
"""A scale is a constant: taken for an input, it has the block traced a second time once it turns out to be none."""
_LITTLE, _LITTLE_ATTENTION = 768 << 20, 160 << 20
"""Bytes; where blocks would keep no more than that in all, they keep it: what products make, or attention."""
_TOKENS, _FEW_TOKENS = 4096, (1024, 512)
"""That go through the model at a time: on matrix units many, so little is kept of them; on a CPU without, where to
compute again costs more, so few that what products make can be kept.
"""


class Compile(Technique):
    """Blocks are compiled for training only; measuring and answering go the plain way."""

    idea = Words(
        "The decoder block is compiled once, for all layers and lengths; kept for later runs.",
        "解码层只编译一次，供所有层和各种长度使用，并留给以后的运行。",
    )

    def why_not(self, work: Work) -> str:
        """Blocks are needed, and a compiler."""
        if not anatomy.blocks(work.model):
            return "the model has no decoder blocks"
        if work.device.type == "cpu" and _native.compiler() is None:
            return "there is no C++ compiler"
        return ""

    def not_worth(self, work: Work) -> str:
        """A short training does not pay back."""
        parameters = sum(p.numel() for p in work.model.parameters())
        seconds = 4 * parameters * work.tokens / _RATE[work.device.type]
        if seconds * _SAVED < _COST:
            return f"about {seconds:.0f} seconds of training do not pay for compiling"
        return ""

    @contextmanager
    def on(self, work: Work) -> Iterator[None]:
        """Every block computes by its compiled form while gradients are wanted."""
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # one block needs no pool of processes
        if work.device.type == "cpu" and not work.portion.given:
            work.portion.take(_at_a_time(work))
        found = [block for _, block in anatomy.blocks(work.model)]
        chosen = _chosen(work)
        ways = [_compiled(block, chosen) for block in found]
        if not frozen(work.model):
            ways[0] = _asking(ways[0])
        for block, way in zip(found, ways, strict=True):
            block._compiled_call_impl = way
        try:
            yield
        finally:
            for block in found:
                block._compiled_call_impl = None


def _asking(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """The first block's input asks for a gradient as all others' do: else it would be compiled for itself alone."""

    def call(states_BTD: Tensor, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and not states_BTD.requires_grad:
            states_BTD = states_BTD.detach().requires_grad_()
        return compiled(states_BTD, *args, **kwargs)

    return call


def _at_a_time(work: Work) -> int:
    """Tokens of one pass, where nobody said how many."""
    if work.device.type != "cpu" or _native.has_units():
        return min(work.portion.whole, _TOKENS)
    sizes = [min(work.portion.whole, size) for size in _FEW_TOKENS]
    return next((size for size in sizes if _products(work, size) < _LITTLE), sizes[0])


def _learning(work: Work) -> list[Any]:
    return [block for _, block in anatomy.blocks(work.model)][len(frozen(work.model)) :]


def _products(work: Work, tokens: int) -> int:
    """Bytes that blocks keep if they keep what products read and make of so many tokens."""
    numbers = sum(anatomy.numbers_per_token(anatomy.linears(block)) for block in _learning(work))
    return int(tokens * work.model.dtype.itemsize * numbers)


def _chosen(work: Work) -> _Way:
    """By what the blocks that learn would keep of all tokens that go through at a time."""
    tokens = min(work.portion.given or work.portion.whole, _at_a_time(work))
    if _products(work, tokens) < _LITTLE:
        return _PRODUCTS_KEPT
    attention = tokens * work.model.dtype.itemsize * anatomy.hidden_size(work.model) * len(_learning(work))
    return _ATTENTION_KEPT if attention < _LITTLE_ATTENTION else _LITTLE_KEPT


def _compiled(block: Any, way: _Way) -> Callable[..., Any]:
    plain, made = block._call_impl, list[Callable[..., Any]]()

    def call(*args: Any, **kwargs: Any) -> Any:
        learning = block.training and torch.is_grad_enabled()
        if not learning:
            return plain(*args, **kwargs)
        if hollow.is_on():  # shapes are not compiled; what is kept is the same
            with kept(PRODUCTS if way is _PRODUCTS_KEPT else _operations(way.kept)):
                return again(plain, *args, **kwargs)
        if not made:
            made.append(torch.compile(plain, dynamic=True, options=_options(way)))
        with torch._functorch.config.patch(way.partition), torch._dynamo.config.patch(_TRACED):
            return made[0](*args, **kwargs)

    return call


def _options(way: _Way) -> dict[str, Any]:
    """For torch's compiler. Headers compiled beforehand save nothing of one block, and are looked through at every start."""
    _probes.keep()
    keeping = {"joint_custom_pre_pass": _keeping(way.kept)} if way.kept else {}
    return {"cpp_cache_precompile_headers": False, **keeping}


@cache  # another one would be another compiler to torch, and each block compiled for itself
def _keeping(names: tuple[str, ...]) -> Any:
    """Tells the partitioner what is not to be computed again."""
    from torch._inductor.custom_graph_pass import CustomGraphPass

    operations = _operations(names)

    class Keeping(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            for node in graph.nodes:
                if node.target in operations:
                    node.meta["recompute"] = CheckpointPolicy.MUST_SAVE

        def uuid(self) -> str:
            return f"kept: {', '.join(names)}"

    return Keeping()
