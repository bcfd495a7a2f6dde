"""Diff pruning: a difference to the base is learned and made sparse (Guo, Rush & Kim 2020).

Beyond the paper, the penalty is for the share above one that falls step by step to the density: it sparsifies in
runs of any length and cannot close all masks, which the plain one does where it is too large.
"""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from tunewright.core.errors import Problem
from tunewright.core.rng import derive
from tunewright.core.words import Words
from tunewright.methods import Clock, Facts, Setting, _sparse
from tunewright.methods._difference import Difference, attach, attached, detach, largest, weight
from tunewright.methods._own import OwnMethod, Tensors
from tunewright.methods._peft import TargetConfig
from tunewright.models import anatomy

_SLOWEST, _TRAVEL = 0.1, 90.0
"""How far α moves at least in a step, which is the paper's rate, and in all steps until masks are settled."""
_SPARSE_BY = 0.9
"""Share of those steps after which the allowed share of open masks is the density."""
Header = dict[str, dict[str, Any]]


class Config(TargetConfig):
    """How sparse the difference is, and how it becomes so."""

    density: float = Field(0.005, gt=0, le=1)
    """Largest share of the adapted weights that differ in the end."""
    penalty: float = Field(1000.0, ge=0)
    """Weight λ of the expected share of weights that differ beyond what is allowed at a step."""
    structured: bool = False
    """Whether each weight matrix has a mask of its own besides, so that whole matrices can stay as they are."""
    settle: float = Field(0.3, ge=0, lt=1)
    """Share of the steps, the last ones, in which it is settled which weights differ and only those are trained."""


class DiffPruning(OwnMethod):
    """Trains a difference and a mask for each entry of the adapted weights; saves the sparse difference."""

    default_lr = 3e-3
    facts = Facts(
        idea=Words(
            "A difference to the base is learned for every weight, with a mask that is driven to zero: a few remain.",
            "为每个权重学习一个差值，并用趋向零的掩码稀疏化，最后只留下极少数。",
        ),
        formula="θ = θ₀ + z ∘ w, z hard-concrete; loss + λ·max(0, E‖z‖₀/N − ρ), ρ falling to density; then top |z ∘ w|",
        count="Σ 2·in·out over adapted layers (+ 1 each if structured); saved: density·Σ in·out values and indices",
        inference=Words("none once merged", "合并后无额外开销"),
        when=Words(
            "Many tasks on one base, each a small file. Training is dear: base, w and z are three tensors for each "
            "adapted weight, the latter two with fp32 masters and optimizer state.",
            "同一基座上任务很多、每个任务只存一个小文件时。训练代价高：每个被适配的权重有基座、w、z 三个张量，"
            "后两个还带 fp32 主副本和优化器状态。",
        ),
        paper="Guo, Rush & Kim 2020, arXiv:2012.07463",
    )

    def problems(self, model: Any) -> list[Problem]:
        """No layers of that name, or such whose weight others share."""
        adapted = anatomy.targets(model, self.config.target_modules)
        where = "method.target_modules"
        if not adapted:
            return [Problem(where, "no linear layer has such a name", "name modules that the model has")]
        users: dict[int, int] = {}
        for _, parameter in model.named_parameters(remove_duplicate=False):
            users[id(parameter)] = users.get(id(parameter), 0) + 1
        shared = [n.name for n in adapted if users[id(model.get_parameter(f"{n.name}.weight"))] > 1]
        what = "shares its weight with another module, which would change with it"
        return [Problem(where, f"{name} {what}", "leave it out") for name in shared]

    def inject(self, model: Any) -> Any:
        """A difference of zero, its mask open, for each adapted weight."""
        model.requires_grad_(False)
        for linear in anatomy.targets(model, self.config.target_modules):
            module = model.get_submodule(linear.name)
            attach(module, Difference(module.weight.detach(), self.config.structured))
        return model

    def count(self, model: Any) -> int:
        """Difference and mask for each entry, and a mask for each weight if structured."""
        adapted = anatomy.targets(model, self.config.target_modules)
        return 2 * self._entries(model) + (len(adapted) if self.config.structured else 0)

    def saved(self, model: Any) -> int:
        """A value and an index for each entry that differs; as many as may until training ends."""
        if attached(model) and not _learning(model):
            return sum(tensor.numel() for tensor in self.tensors(model).values())
        return 2 * self._kept(self._entries(model))

    def _entries(self, model: Any) -> int:
        """Entries of the adapted weights, of a base or of what :meth:`inject` made of it."""
        if there := attached(model):
            return sum(weight(module).numel() for module, _ in there.values())
        adapted = anatomy.targets(model, self.config.target_modules)
        return sum(linear.inputs * linear.outputs for linear in adapted)

    def _kept(self, entries: int) -> int:
        return max(1, round(float(self.config.density) * entries))

    def begin(self, model: Any, setting: Setting) -> None:
        """Masks have far to go, however few the steps."""
        self._mask_rate = max(_SLOWEST, _TRAVEL / self._settles(setting.clock)) / self.default_lr

    def lr_scale(self, name: str) -> float:
        """The masks' own rate."""
        return self._mask_rate if name.endswith((".alpha", ".group")) else 1.0

    def before_step(self, model: Any, clock: Clock) -> None:
        """One mask is drawn for each step, the same in all its parts; none once they are settled."""
        begun = clock.step >= self._settles(clock)
        for i, (_, difference) in enumerate(attached(model).values()):
            held = begun and difference.is_held()
            difference.seed = None if held else derive(clock.seed, f"difference-{i}", clock.step)
            for mask in difference.masks():
                mask.requires_grad_(not held)

    def _settles(self, clock: Clock) -> int:
        """The first step with settled masks."""
        return clock.steps - int(self.config.settle * clock.steps)

    def penalty(self, model: Any, clock: Clock) -> Tensor | None:
        """What of the expected share of weights that differ is more than the step allows, times λ."""
        differences = _learning(model)
        if not all(difference.alpha.requires_grad for difference in differences):
            return None
        share = torch.stack([difference.expected() for difference in differences]).sum() / _size(differences)
        return float(self.config.penalty) * (share - self.allowed(clock)).relu()

    def allowed(self, clock: Clock) -> float:
        """The share of open masks that a step allows: from 1 down to the density by equal factors."""
        done = min(1.0, clock.step / (_SPARSE_BY * self._settles(clock)))
        share: float = self.config.density**done
        return share

    def after_update(self, model: Any, clock: Clock) -> None:
        """Settle the masks, once: the largest differences stay."""
        differences = [difference for difference in _learning(model) if not difference.is_held()]
        if not differences:
            return
        for difference in differences:
            difference.bound()
        if clock.step + 1 >= self._settles(clock):
            for difference, kept in zip(differences, self._largest(differences), strict=True):
                difference.hold(kept)

    def _largest(self, differences: list[Difference]) -> list[Tensor]:
        for difference in differences:
            difference.seed = None
        return largest(differences, self._kept(_size(differences)))

    @torch.no_grad()
    def finish(self, model: Any) -> None:
        """Keep the largest differences, and of them what is not zero."""
        differences = _learning(model)
        found = self._largest(differences) if differences else []
        for difference, kept in zip(differences, found, strict=True):
            values = difference.delta().reshape(-1)[kept]
            indices = kept[values != 0]
            difference.settle(indices.to(_index_type(difference)), values[values != 0])

    def report(self, model: Any) -> dict[str, Any]:
        """How many of the adapted weights differ from the base's."""
        entries, differ = self._entries(model), self.saved(model) // 2
        return {"adapted_weights": entries, "differing_weights": differ, "density": differ / entries}

    def tensors(self, model: Any) -> Tensors:
        """Indices and values of the sparse differences; only :meth:`finish` makes them."""
        return _sparse.tensors(model)

    def export(self, model: Any, folder: Any) -> None:
        """What is left after :meth:`finish`."""
        self.finish(model)
        super().export(model, folder)

    def ready(self, base: Any) -> Any:
        """The base, frozen: a file says itself where it differs."""
        return base.requires_grad_(False)

    def misses(self, base: Any, header: Header) -> list[str]:
        """Differences to weights that are not there, or that are no pairs of indices and values."""
        return _sparse.misses(base, header)

    def fits(self, model: Any, header: Header) -> list[str]:
        """All is told by :meth:`misses`."""
        return []

    def fill(self, model: Any, tensors: Tensors) -> None:
        """The sparse differences beside the weights; ModelError if an index lies outside of its weight."""
        _sparse.fill(model, tensors)

    @classmethod
    def merge(cls, model: Any) -> Any:
        """The differences are added to the weights."""
        for module, difference in attached(model).values():
            detach(module, difference)
        return model


def _learning(model: Any) -> list[Difference]:
    """The differences that are still dense."""
    return [difference for _, difference in attached(model).values() if difference.indices is None]


def _index_type(difference: Difference) -> torch.dtype:
    return torch.int32 if difference.change.numel() < 1 << 31 else torch.int64


def _size(differences: list[Difference]) -> int:
    return sum(difference.change.numel() for difference in differences)
