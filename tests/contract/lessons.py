"""One method on one tiny model, trained for a few steps; what is found out about it is found out once."""

import shutil
import tempfile
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from elsewhere import keep_logits, logits
from safetensors.torch import load_file
from torch import Tensor

from tunewright import methods
from tunewright.core.config import Config
from tunewright.core.events import Event, EventLog
from tunewright.core.rng import sow
from tunewright.methods import Clock, Method
from tunewright.recipes import TrainConfig
from tunewright.train.lesson import Lesson as Portion
from tunewright.train.loop import Trainer

STEPS, STOP = 4, 2
SEED = 3
_LEAST_LR = 0.01
_BATCH, _MICRO = 96, 24
Tensors = dict[str, Tensor]


class Watch:
    """Sees from outside which parameters get gradients, and reads the losses."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        self.parameters = parameters
        self.losses: list[float] = []
        self.required: set[str] = set()
        """What required gradients in some step."""
        self.reached: set[str] = set()
        """What got one that is not zero."""
        self.not_finite: set[str] = set()
        for name, parameter in parameters.items():
            parameter.register_post_accumulate_grad_hook(partial(self._see, name))

    def _see(self, name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        if not torch.isfinite(parameter.grad).all():
            self.not_finite.add(name)
        if parameter.grad.any():
            self.reached.add(name)

    def __call__(self, event: Event) -> None:
        """Read an event."""
        if event["kind"] == "step":
            self.losses.append(event["loss"])
            self.required.update(name for name, p in self.parameters.items() if p.requires_grad)


class Taught:
    """A model trained with a method, its state before, and what it says."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.method = trainer, trainer.method
        self.model, self.folder = trainer.model, trainer.folder
        self.at_start = logits(self.model)
        self.dtypes = _dtypes(self.model)
        self.declared = dict(trainer.optimizer.parameters)
        self.before = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self.watch = Watch(self.declared)
        trainer.log.readers.append(self.watch)
        trainer.run()
        self.at_end = logits(self.model)
        self.dtypes_after = _dtypes(self.model)
        self.saved = self.folder / "saved"
        # Beside the folder: another process writes it while the folder may be copied.
        self.reloaded = self.folder.with_name(f"{self.folder.name}-logits.safetensors")
        self.saved.mkdir()
        self.method.export(self.model, self.saved)
        self.reload: Callable[[], None]
        """Waits until another process has loaded what was saved."""

    def logits_elsewhere(self) -> Tensor:
        """What another process makes of what was saved."""
        self.reload()
        return load_file(self.reloaded)["logits"]


def _dtypes(model: Any) -> dict[str, torch.dtype]:
    return {name: parameter.dtype for name, parameter in model.named_parameters()}


class Lesson:
    """A method on an architecture, with the method's default options as far as those fit a tiny model."""

    def __init__(self, school: Any, name: str, architecture: str, config: Config) -> None:
        self.school, self.name, self.architecture, self.config = school, name, architecture, config
        self.method_class = methods.kind(name)
        self.outline = school.outline(architecture)
        self.folder = Path(tempfile.mkdtemp(prefix=f"{name}-{architecture}-", dir=school.folder))
        self.source = school.sources[architecture]

    def __str__(self) -> str:
        return f"{self.name} on {self.architecture}"

    @property
    def method(self) -> Method:
        """A fresh one."""
        return self.method_class(self.config)

    def base(self, precision: str = "fp32") -> Any:
        """The model to start from, a fresh copy."""
        return self.school.base(self.method, self.architecture, precision)

    def trainer(self, folder: str, precision: str = "fp32", **choices: Any) -> Trainer:
        """A trainer of a fresh model in a folder of the lesson."""
        method = self.method_class(choices.pop("config", self.config))
        sow(SEED, "method")
        model = method.apply(self.base(precision))
        objective = self.school.objective(choices.pop("objective", "sft"))
        algorithm = choices.pop("algorithm", None)
        train = {"lr": max(method.default_lr, _LEAST_LR), "warmup": 0.0, "tokens_per_batch": _BATCH, "seed": SEED,
                 "max_steps": STEPS, "save_every": STOP}  # fmt: skip
        config = TrainConfig(**{**train, **choices})
        at = self.folder / folder
        return Trainer(
            model, method, objective, self.school.data(objective), (), config, precision,
            EventLog(at / "events.jsonl"), at, algorithm=algorithm,
        )  # fmt: skip

    @cached_property
    def trained(self) -> Taught:
        """Trained in fp32 without a stop."""
        return self._exported(Taught(self.trainer("whole")), "fp32")

    @cached_property
    def half(self) -> Taught:
        """Trained in bf16."""
        return self._exported(Taught(self.trainer("half", "bf16", max_steps=3, save_every=0)), "bf16")

    def _exported(self, taught: Taught, precision: str) -> Taught:
        """Let another process begin to load it."""
        manifest = {"method": self.name, "base": self.source.path}
        taught.reload = self.school.elsewhere(self.name).ask(
            keep_logits, taught.saved, manifest if self.method_class.folder == "adapter" else {}, precision,
            taught.reloaded,
        )  # fmt: skip
        return taught

    @cached_property
    def resumed(self) -> Trainer:
        """Trained from the checkpoint in the middle on, in a model that knows nothing of the first half."""
        trainer = self._from_the_middle("resumed")
        trainer.run()
        return trainer

    def _from_the_middle(self, name: str, **choices: Any) -> Trainer:
        last = f"step-{STEPS:08d}"
        shutil.copytree(self.trained.folder, self.folder / name, ignore=shutil.ignore_patterns(last, "saved"))
        return self.trainer(name, **choices)

    @cached_property
    def midway(self) -> "Midway":
        """In the middle of training, without dropout."""
        trainer = self._from_the_middle("midway", config=_without_dropout(self.config))
        restored = trainer.record.checkpoints.restore(trainer.optimizer)
        trainer.method.set_state(restored.declared.get("method", {}))
        return Midway(trainer)


class Midway:
    """A trainer between two steps."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.model, self.objective = trainer, trainer.model, trainer.objective
        self.model.train()
        self.clock = Clock(STOP, STEPS, SEED)
        self.indices = next(trainer.feed.from_step(STOP))

    def gradients(self, budget: int = _BATCH) -> tuple[float, Tensors]:
        """Loss and gradients of the next step, in parts of at most so many tokens."""
        self.trainer.optimizer.drop()
        seen = self.trainer.passes.over(Portion(self.trainer.feed, self.indices).batches(budget), self.clock)
        return seen.loss, self._taken()

    def gradients_in_parts(self) -> tuple[float, Tensors]:
        """The same, accumulated over several passes."""
        assert len(self.trainer.feed.micro_batches(self.indices, _MICRO)) > 1
        return self.gradients(_MICRO)

    def gradients_recomputed(self) -> tuple[float, Tensors]:
        """The same, with activations recomputed in the backward pass."""
        self.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        self.model.enable_input_require_grads()
        try:
            assert any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules())
            return self.gradients()
        finally:
            self.model.activation_checkpointing_disable()
            self.model.disable_input_require_grads()

    def _taken(self) -> Tensors:
        named = self.trainer.optimizer.parameters.items()
        taken = {name: p.grad.clone() for name, p in named if p.grad is not None}
        self.trainer.optimizer.drop()
        return taken


def _without_dropout(config: Config) -> Config:
    none = {
        n: 0.0 for n in type(config).model_fields if "dropout" in n and isinstance(getattr(config, n), float)
    }
    return config.model_copy(update=none)
