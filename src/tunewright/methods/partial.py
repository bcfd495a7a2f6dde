"""Partial fine-tuning: chosen blocks or parameters are trained, the rest stays (Lee, Tang & Lin 2019)."""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

from pydantic import Field, NonNegativeInt
from torch import nn

from tunewright.core.config import Config as BaseConfig
from tunewright.core.errors import Problem
from tunewright.core.words import Words
from tunewright.methods import Facts
from tunewright.methods._own import OwnMethod
from tunewright.models import anatomy


class Config(BaseConfig):
    """What is trained; the choices add up. Without last, layers and patterns it is the later half of the blocks."""

    last: int | None = Field(None, ge=0)
    """So many blocks, counted from the end; 0 is none of them."""
    layers: tuple[NonNegativeInt, ...] = ()
    """Blocks by number, the first is 0."""
    patterns: tuple[str, ...] = ()
    """Parameters by their whole name, with * ? [] as in file names: "*.self_attn.*" is all attention."""
    embeddings: bool = False
    """Token and position embeddings and the output head; else they stay, unless a pattern names them."""


class Partial(OwnMethod):
    """Trains parameters of the model itself and saves those only."""

    default_lr = 5e-5
    facts = Facts(
        idea=Words(
            "Some blocks, by default the later half, are trained in full; all others stay as they are.",
            "只完整训练一部分层（默认后一半），其余不动。",
        ),
        formula="θ_S ← θ_S − η·∇L(θ_S) for the chosen parameters S",
        count="Σ numel over the chosen parameters, tied ones once",
        inference=Words("none: the weights are the model's own", "无：改的就是模型自身的权重"),
        when=Words(
            "When full fine-tuning is too much and adapters too little; the backward pass ends at the first chosen block.",
            "全量微调太贵、适配器又不够时；反向传播到第一个被选中的层为止。",
        ),
        paper="Lee, Tang & Lin 2019, arXiv:1911.03090",
    )

    def problems(self, model: Any) -> list[Problem]:
        """Numbers of blocks that there are not, patterns that match nothing, or nothing left to train."""
        count, own = len(anatomy.blocks(model)), self.config
        named = f"the model has {count} blocks"
        found = [
            Problem("method.layers", f"there is no block {i}, {named}", f"give numbers below {count}")
            for i in own.layers
            if i >= count
        ]
        if own.last and own.last > count:
            found.append(Problem("method.last", f"{own.last} blocks, but {named}", f"give at most {count}"))
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        found += [
            Problem("method.patterns", f"no parameter has a name like {pattern!r}", f"one is {names[-1]}")
            for pattern in own.patterns
            if not any(fnmatchcase(name, pattern) for name in names)
        ]
        if not found and not self.chosen(model):
            found.append(
                Problem("method", "nothing is chosen to be trained", "give last, layers or patterns")
            )
        return found

    def chosen(self, model: Any) -> dict[str, nn.Parameter]:
        """What is trained, by name; tied weights have one, be they chosen by another."""
        wanted = {id(parameter) for parameter in self._wanted(model)}
        return {name: p for name, p in model.named_parameters() if id(p) in wanted}

    def _wanted(self, model: Any) -> Iterator[nn.Parameter]:
        for block in self._blocks(model):
            yield from block.parameters()
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if any(fnmatchcase(name, pattern) for pattern in self.config.patterns):
                yield parameter
        if self.config.embeddings:
            yield from (parameter for _, parameter in anatomy.embeddings(model))

    def _blocks(self, model: Any) -> list[nn.Module]:
        stack, own = [block for _, block in anatomy.blocks(model)], self.config
        last = own.last or 0
        if own.last is None and not own.layers and not own.patterns:
            last = (len(stack) + 1) // 2
        return [block for i, block in enumerate(stack) if i >= len(stack) - last or i in own.layers]

    def inject(self, model: Any) -> Any:
        """Nothing is added; what is chosen requires gradients."""
        chosen = self.chosen(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in chosen)
        return model

    def count(self, model: Any) -> int:
        """Every number of every chosen parameter."""
        return sum(parameter.numel() for parameter in self.chosen(model).values())

    @classmethod
    def merge(cls, model: Any) -> Any:
        """The weights are in the model already."""
        return model
