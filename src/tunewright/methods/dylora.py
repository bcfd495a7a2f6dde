"""DyLoRA: a LoRA whose ranks are nested, so that any smaller rank can be cut from it (Valipour et al. 2022)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from tunewright.core.errors import ModelError, Problem
from tunewright.core.rng import derive
from tunewright.core.words import Words
from tunewright.methods import Clock, Facts
from tunewright.methods._peft import PeftMethod, TargetConfig

_MASK = "nested_mask"


class Config(TargetConfig):
    """The shape of the adapter and of what is kept of it."""

    rank: int = Field(16, ge=1)
    """Largest rank r; training draws a rank from 1 to r for each step."""
    alpha: float = Field(32, gt=0)
    """Scale; at rank b the term is multiplied by alpha / b."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    at_rank: int | None = Field(None, ge=1)
    """Rank of what is measured and saved; by default all r, from which any smaller one can be cut later."""


class DyLora(PeftMethod):
    """Trains r·(in + out) parameters for each adapted weight; saved, it is a LoRA like any other."""

    default_lr = 2e-4
    saves = "LORA"
    facts = Facts(
        idea=Words(
            "Each step trains only the first b ranks of a LoRA, b drawn by chance: early ranks learn what matters most.",
            "每步随机取 b，只训练 LoRA 的前 b 个秩：排在前面的秩学到最重要的部分。",
        ),
        formula="h = W·x + (α/b)·B[:, :b]·A[:b]·x, b drawn from 1..r for each step, b = r at inference",
        count="Σ r·(in + out) over adapted layers",
        inference=Words("none once merged", "合并后无额外开销"),
        when=Words(
            "When the rank is not known in advance: one training serves every rank up to r.",
            "事先不知道该用多大的秩时：训练一次，1 到 r 的秩都能用。",
        ),
        paper="Valipour et al. 2022, arXiv:2210.07558",
    )

    def problems(self, model: Any) -> list[Problem]:
        """Also a rank to keep that is not trained."""
        rank, kept = self.config.rank, self.config.at_rank
        found = super().problems(model)
        if kept and kept > rank:
            found.append(Problem("method.at_rank", f"{kept}, but rank is {rank}", f"give at most {rank}"))
        return found

    def peft_config(self, model: Any) -> Any:
        """PEFT's LoraConfig."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.config.rank, lora_alpha=self.config.alpha, lora_dropout=self.config.dropout,
            fan_in_fan_out=self.stored_transposed(model), **self.targets(model),
        )  # fmt: skip

    def count(self, model: Any) -> int:
        """Two factors for each adapted layer."""
        return sum(self.config.rank * (layer.inputs + layer.outputs) for layer in self.adapted(model))

    def inject(self, model: Any) -> Any:
        """A PEFT model whose layers use the first ranks only while it is trained."""
        adapted = super().inject(model)
        for layer, name in _adapters(adapted):
            a = layer.lora_A[name]
            a.register_buffer(_MASK, torch.ones_like(a.weight[:, 0]), persistent=False)
            a.register_forward_hook(_first_ranks)
        return adapted

    def before_step(self, model: Any, clock: Clock) -> None:
        """Draw the step's rank; α/r becomes α/b (equation 7 of the paper)."""
        rank = self.config.rank
        used = self.drawn(clock)
        for layer, name in _adapters(model):
            mask = getattr(layer.lora_A[name], _MASK)
            mask.zero_()[:used] = rank / used

    def drawn(self, clock: Clock) -> int:
        """The rank b of a step, uniform over 1..r."""
        return 1 + derive(clock.seed, "dylora", clock.step) % int(self.config.rank)

    def finish(self, model: Any) -> None:
        """Cut to ``at_rank``, so that what is measured is what is saved."""
        if self.config.at_rank:
            truncate(model, self.config.at_rank)

    @classmethod
    def load(cls, base: Any, folder: Path, at_rank: int | None = None) -> Any:
        """The base with the adapter on it, or with its first ``at_rank`` ranks; ModelError if they do not fit."""
        model = super().load(base, folder)
        return truncate(model, at_rank) if at_rank else model


@torch.no_grad()
def truncate(model: Any, rank: int) -> Any:
    """The PEFT model with the first ``rank`` ranks of its LoRA alone, scaled by alpha / rank; changed in place.

    Merging or saving it afterwards gives an adapter of that rank. ModelError if it has fewer.
    """
    for layer, name in _adapters(model):
        if not 1 <= rank <= layer.r[name]:
            raise ModelError(
                Problem("at_rank", f"{rank}, but the adapter's rank is {layer.r[name]}", "give 1 to that")
            )
        layer.lora_A[name] = _linear(layer.lora_A[name].weight[:rank])
        layer.lora_B[name] = _linear(layer.lora_B[name].weight[:, :rank])
        layer.r[name], layer.scaling[name] = rank, layer.lora_alpha[name] / rank
        model.peft_config[name].r = rank
    return model


def _linear(weight: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(weight.clone())
    return made


def _adapters(model: nn.Module) -> Iterator[tuple[Any, str]]:
    """Each LoRA layer with each adapter's name."""
    from peft.tuners.lora import LoraLayer

    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            yield from ((layer, name) for name in list(layer.lora_A))


def _first_ranks(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
    """A's outputs [..., r] with those beyond the step's rank at zero, which cuts B's columns as well."""
    return output * getattr(module, _MASK) if module.training else None
