"""Selective gradient checkpointing: only what memory has no room for is computed again (Chen et al. 2016).

Attention, feed-forward network or the whole of a block: what costs the fewest seconds per byte goes first, as
by formula in Korthikanti et al. 2022, arXiv:2205.05198. Here the seconds are measured, so that two runs may
choose differently. What is computed again has the very bits of what was not kept: no number depends on it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial, update_wrapper
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from tunewright.core.words import Words
from tunewright.fast import Technique, Work
from tunewright.fast._activations import lasting, room
from tunewright.fast._recomputation import Candidate, Meter, choose, flat
from tunewright.models import anatomy

_RUNS = 2
"""Times that a block is computed to be measured: the first fills caches and fresh memory, the last counts."""
PRODUCTS = (
    torch.ops.aten.mm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)
"""What costs most to compute, as torch's partitioner has it."""
_contexts: ContextVar[Callable[[], Any]] = ContextVar("contexts", default=noop_context_fn)
_SIZES = 16
"""Numbers of tokens that a choice of its own is made for, from none to the most that were seen."""


class Checkpointing(Technique):
    """A pass of more tokens than any before measures every block, and has all of them computed again."""

    idea = Words(
        "Only activations that memory has no room for are computed again, the cheapest per byte first.",
        "只重新计算内存放不下的激活值，每字节代价最小的优先。",
    )

    def __init__(self, budget: int | None = None) -> None:
        self.budget = budget
        """Bytes that the blocks' activations may take; a share of the free ones if not given."""

    def why_not(self, work: Work) -> str:
        """Blocks are needed, and that they are not computed again as it is."""
        if not anatomy.blocks(work.model):
            return "the model has no decoder blocks"
        if any(getattr(m, "gradient_checkpointing", False) for m in work.model.modules()):
            return "train.gradient_checkpointing has every block computed again"
        return ""

    def not_worth(self, work: Work) -> str:
        """It is for trainings that do not fit otherwise."""
        return "it takes time; ask for it by name where memory is short"

    @contextmanager
    def on(self, work: Work) -> Iterator["Selection"]:
        """Gives the selection, which is empty until a training pass is over."""
        selection = Selection(work, room(work) if self.budget is None else self.budget)
        try:
            yield selection
        finally:
            selection.end()


@dataclass(frozen=True)
class _Measured:
    """A block, on so many ``tokens``."""

    tokens: int
    kept: int
    candidates: list[Candidate]


class Selection:
    """The parts of a model's blocks that are computed again: fewer in a pass of fewer tokens."""

    def __init__(self, work: Work, budget: int) -> None:
        self.model, self.device, self.budget = work.model, work.device, budget
        self.measured: dict[str, _Measured] = {}
        self._choices: dict[int, frozenset[str]] = {}
        self._blocks = {name: _Part(name, block) for name, block in anatomy.blocks(work.model)}
        self._inner = {name: _inner_parts(whole) for name, whole in self._blocks.items()}
        for whole in self._blocks.values():
            whole.way = partial(self._compute, whole)

    def _compute(self, whole: "_Part", *args: Any, **kwargs: Any) -> Any:
        tokens = _repeatable(whole.module, flat(args, kwargs)[0])
        if not tokens:
            return whole.plain(*args, **kwargs)
        found = self.measured.get(whole.name)
        if found is None or tokens > found.tokens:
            self._measure(whole, tokens, *args, **kwargs)
            chosen = frozenset([whole.name])
        else:
            chosen = self.chosen(tokens)
        compute = partial(self._through, whole, chosen)
        return again(compute, *args, **kwargs) if whole.name in chosen else compute(*args, **kwargs)

    def _through(self, whole: "_Part", chosen: frozenset[str], *args: Any, **kwargs: Any) -> Any:
        """Compute a block; when it is computed again, another pass may have been through it meanwhile."""
        for part in self._inner[whole.name]:
            part.way = partial(again, part.plain) if part.name in chosen else part.plain
        return whole.plain(*args, **kwargs)

    def _measure(self, whole: "_Part", tokens: int, *args: Any, **kwargs: Any) -> None:
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            for _ in range(_RUNS):
                meter = Meter(lasting(self.model), self.device)
                for part in self._inner[whole.name]:
                    part.way = partial(meter.call, part.name, part.plain)
                with saved_tensors_hooks(meter.pack, _never):
                    meter.call(whole.name, whole.plain, *args, **kwargs)
        candidates, kept = meter.candidates(whole.name)
        self.measured[whole.name] = _Measured(tokens, kept, candidates)
        self._choices.clear()

    def chosen(self, tokens: int) -> frozenset[str]:
        """The names of what is computed again in a pass of so many tokens: bytes grow with them."""
        step = max(1, max((m.tokens for m in self.measured.values()), default=1) // _SIZES)
        size = -(-tokens // step) * step
        if size not in self._choices:
            candidates = self.candidates(size)
            kept = sum(m.kept * size // m.tokens for m in self.measured.values())
            self._choices[size] = frozenset(c.name for c in choose(candidates, kept, self.budget))
        return self._choices[size]

    def candidates(self, tokens: int) -> list[Candidate]:
        """All parts that were measured, as they are on so many tokens."""
        return [c.times(tokens / m.tokens) for m in self.measured.values() for c in m.candidates]

    def end(self) -> None:
        """The modules have their own methods again."""
        for name, whole in self._blocks.items():
            for part in (whole, *self._inner[name]):
                part.end()


class _Part:
    """Stands in for the forward method of a block, or of a part of it."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module
        self.plain: Callable[..., Any] = module.forward
        self.way = self.plain
        self._own = vars(module).get("forward")

        def forward(*args: Any, **kwargs: Any) -> Any:
            return self.way(*args, **kwargs)

        # Compiled code would go the first way for good.
        stand_in = update_wrapper(forward, self.plain)
        vars(module)["forward"] = torch.compiler.disable(stand_in)  # type: ignore[no-untyped-call]

    def end(self) -> None:
        """Give the module its method back."""
        del vars(self.module)["forward"]
        if self._own:
            vars(self.module)["forward"] = self._own


def _inner_parts(whole: _Part) -> list[_Part]:
    found = anatomy.attention(whole.module), anatomy.feed_forward(whole.module)
    names = {module: name for name, module in whole.module.named_children()}
    return [_Part(f"{whole.name}.{names[m]}", m) for m in dict.fromkeys(found) if m is not None]


def _repeatable(block: nn.Module, inputs: list[Any]) -> int:
    """The tokens of a call that may be made twice; 0 if nothing is kept, or if it fills a cache."""
    from transformers import Cache

    only_read = getattr(block, "_can_checkpoint_with_cache", False)
    fills = not only_read and any(isinstance(x, Cache) for x in inputs)
    if fills or not (block.training and torch.is_grad_enabled()):
        return 0
    states_BTD = next(x for x in inputs if isinstance(x, Tensor))
    return states_BTD.shape[:-1].numel()


def _never(_: Any) -> Tensor:
    raise AssertionError("what was measured has no backward pass")


def again(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Keep the inputs only; compute a second time for the backward pass, with the same dropout."""
    leaves, form = flat(args, kwargs)

    def compute(*leaves: Any) -> Any:
        args, kwargs = _pytree.tree_unflatten(leaves, form)
        return forward(*args, **kwargs)

    # As single arguments tensors are kept by hooks for kept tensors, such as those that offload them.
    return checkpoint(compute, *leaves, use_reentrant=False, context_fn=_contexts.get())


@contextmanager
def kept(operations: Sequence[Any]) -> Iterator[None]:
    """Within, what :func:`again` computes anew is all but these."""
    before = _contexts.set(partial(create_selective_checkpoint_contexts, list(operations)))
    try:
        yield
    finally:
        _contexts.reset(before)
