"""What is trained: one file per method, each a subclass of :class:`Method` beside its ``Config``."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from tunewright.core import plugins
from tunewright.core.config import Config
from tunewright.core.errors import DamagedError, ModelError, Problem
from tunewright.core.words import Words
from tunewright.data.template import ChatCodec
from tunewright.methods import _adapter
from tunewright.models.load import DTYPES, ModelSource, find, load_model
from tunewright.recipes import DataConfig

_TRUST = "TUNEWRIGHT_TRUST_REMOTE_CODE"


@dataclass(frozen=True)
class Facts:
    """What one weighs before choosing a method; ``list methods`` and docs/methods.md show it."""

    idea: Words
    formula: str
    """What an adapted layer computes, or what is trained."""
    count: str
    """Trainable parameters, as :meth:`Method.count` computes them."""
    inference: Words
    """What it costs at inference beyond the base model."""
    when: Words
    paper: str
    keeps_apart: Words | None = None
    """Why it cannot be merged into the base; None if it can, or if that depends: see Method.keeps_apart."""


@dataclass(frozen=True)
class Clock:
    """Where training is: ``step`` counts from 0, ``seed`` is the recipe's."""

    step: int
    steps: int
    seed: int


@dataclass(frozen=True)
class Setting:
    """What a method may look at before training: the tokenizer with its template, and batches of the data."""

    codec: ChatCodec
    batches: Callable[[], Iterator[dict[str, Tensor]]]
    clock: Clock


class Method(ABC):
    """The contract. ``config`` is the file's own ``Config``.

    A method needs ``inject``, ``count``, ``export`` and ``load``, and ``merge`` where it can. The hooks from
    ``begin`` on are for what changes in the course of training; all randomness in them comes from the clock, so
    that a run that was killed goes on bit for bit.
    """

    facts: ClassVar[Facts]
    default_lr: ClassVar[float]
    """The peak learning rate when the recipe gives none."""
    folder: ClassVar[str]
    """``adapter`` if what is saved needs its base, ``model`` if it stands alone."""
    needs_weights: ClassVar[bool] = True
    """False if training begins from the architecture alone, with random weights."""
    reads_gradients: ClassVar[bool] = False
    """Whether :meth:`after_update` looks at the masters' gradients, which are kept for it then."""
    starts_equal: ClassVar[bool] = True
    """Whether outputs are the base's own until the first step."""
    base_bytes: float = 2.0
    """Bytes that a frozen weight inside the blocks takes under bf16; less where the base is quantized."""
    reads: ClassVar[tuple[str, ...]] = ()
    """The ``peft_type`` values of other tools' adapters that this method loads."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def load_base(self, source: ModelSource, precision: str) -> Any:
        """The model that :meth:`apply` gets, as this method holds it."""
        return load_model(source, precision, random_weights=not self.needs_weights)

    def apply(self, model: Any) -> Any:
        """The model with everything frozen but what this method trains; ModelError says what speaks against it."""
        if problems := self.problems(model):
            raise ModelError(problems)
        return self.inject(model)

    def problems(self, model: Any) -> list[Problem]:
        """Why this method cannot be used on this model, which may lie on the ``meta`` device."""
        return []

    def data_problems(self, data: DataConfig) -> list[Problem]:
        """What the recipe's data lacks for this method."""
        return []

    @abstractmethod
    def inject(self, model: Any) -> Any:
        """Freeze and add; called by :meth:`apply`."""

    @abstractmethod
    def count(self, model: Any) -> int:
        """How many parameters will be trained, from the base's shapes alone (it may lie on ``meta``)."""

    def at_once(self, model: Any) -> int:
        """How many of :meth:`count` have gradients and optimizer state at the same time: all, unless it says so."""
        return self.count(model)

    def saved(self, model: Any) -> int:
        """How many numbers :meth:`export` writes for a trained model: those that were trained, unless it says so."""
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    def virtual_tokens(self) -> int:
        """Positions of the model's context that the method takes for itself."""
        return 0

    @abstractmethod
    def export(self, model: Any, folder: Path) -> None:
        """Save what was trained into an existing folder."""

    @classmethod
    @abstractmethod
    def load(cls, base: Any, folder: Path) -> Any:
        """The trained model again, from its base and an exported folder."""

    @classmethod
    def keeps_apart(cls, model: Any) -> Words | None:
        """Why this base, or this model trained on it, cannot be merged; None if it can."""
        return cls.facts.keeps_apart

    @classmethod
    def load_with_base(cls, source: ModelSource, precision: str, folder: Path) -> Any:
        """The trained model again, its base held as in training."""
        return cls.load(load_model(source, precision), folder)

    @classmethod
    def merge(cls, model: Any) -> Any:
        """A plain transformers model with the same outputs; ModelError with the reason if there is none."""
        reason = cls.keeps_apart(model)
        assert reason, f"{cls.__name__} can be merged by its facts, but has no merge"  # noqa: S101 our own bug
        raise ModelError(Problem("method", reason.en, "export it without --merge"))

    def lr_scale(self, name: str) -> float:
        """The learning rate of a parameter as a multiple of the recipe's."""
        return 1.0

    def begin(self, model: Any, setting: Setting) -> None:
        """Called once after :meth:`apply`, before the optimizer is made; also when a run goes on."""

    def before_step(self, model: Any, clock: Clock) -> None:
        """Called before the forward passes of a step, perhaps several times for the same one.

        What no longer requires gradients afterwards has no optimizer state in that step.
        """

    def penalty(self, model: Any, clock: Clock) -> Tensor | None:
        """What is added to the loss of a step, if anything."""
        return None

    def after_update(self, model: Any, clock: Clock) -> None:
        """Called after the optimizer's update; parameters are their fp32 masters here."""

    def finish(self, model: Any) -> None:
        """Called after the last step, before the result is measured and saved."""

    def state(self) -> dict[str, Tensor]:
        """What changes in training besides parameters and must survive a kill."""
        return {}

    def set_state(self, state: dict[str, Tensor]) -> None:
        """Take back what :meth:`state` gave, after :meth:`begin`. ValueError for tensors that it did not declare."""
        if state:
            raise ValueError(f"{type(self).__name__} declares no state, found {', '.join(state)}")

    def report(self, model: Any) -> dict[str, Any]:
        """Figures of its own about what was trained, for results and report; JSON."""
        return {}


def create(choice: Mapping[str, Any], config: Config) -> Method:
    """The method a stage names."""
    return kind(choice["name"])(config)


def kind(name: str) -> type[Method]:
    """The class in the method's file."""
    return plugins.implementation(plugins.load("methods", name), Method)  # type: ignore[type-abstract]


def foreign_manifest(folder: Path) -> dict[str, Any]:
    """What our manifest would say of an adapter without one; ModelError if it cannot be loaded."""
    config, names = _adapter.config(folder), plugins.names("methods")
    found = config.get("peft_type")
    if found == _adapter.OWN:
        reader = next((name for name in names if name == config.get("tunewright_method")), None)
    else:
        reader = next((name for name in names if found in kind(name).reads), None)
    if reader is None:
        known = ", ".join(sorted(other for name in names for other in kind(name).reads))
        what = f"an adapter of the type {str(found)[:80]!r}"
        raise ModelError(Problem(str(folder / _adapter.CONFIG), what, f"these can be loaded: {known}"))
    return {"base": _adapter.base(folder), "method": reader, "precision": "fp32"}


def load_adapter(
    folder: Path, manifest: Mapping[str, Any], precision: str, trusted: bool = False
) -> tuple[Any, type[Method]]:
    """An exported adapter on its base, with the method that knows it.

    ``trusted`` lets Python code run that comes with the base. DamagedError if the manifest does not say what is
    needed, ModelError if the adapter or its base cannot be used.
    """
    if not all(isinstance(manifest.get(key), str) for key in ("base", "method")):
        raise DamagedError(f"{folder}: the manifest does not name base and method")
    if precision not in DTYPES:
        raise DamagedError(f"{folder}: the manifest names no precision that there is, but {precision!r}")
    method = kind(manifest["method"])
    return method.load_with_base(base_of(manifest, trusted), precision, folder), method


def base_of(manifest: Mapping[str, Any], trusted: bool = False) -> ModelSource:
    """The base model that an adapter was trained on.

    An adapter may come from anyone: that its manifest trusts the base's code is not the user's word.
    """
    trusted = trusted or os.environ.get(_TRUST) == "1"
    try:
        return find(manifest["base"], trusted and bool(manifest.get("trust_remote_code")))
    except ModelError as error:
        if not manifest.get("trust_remote_code") or trusted:
            raise
        fix = f"if code is asked for, read it, then set the environment variable {_TRUST}=1"
        raise ModelError(
            [*error.problems, Problem("model", "the adapter was trained with code of its base", fix)]
        ) from None


def stored_dtype(base: str) -> Any:
    """The dtype in which the base model's own files hold its weights, as a torch dtype."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(find(base).path).dtype
