"""The base of every method that PEFT has: its layers, its file format, so that any tool that reads PEFT reads ours."""

import warnings
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from tunewright.core.config import Config
from tunewright.core.errors import ModelError, Problem
from tunewright.methods import Method, _adapter
from tunewright.models import anatomy


class TargetConfig(Config):
    """For methods that adapt linear layers."""

    target_modules: str | tuple[str, ...] = "all-linear"
    """all-linear is every linear layer but the output head; or module names, or a regular expression."""


class PeftMethod(Method):
    """A subclass gives PEFT's config for a model; the rest is the same for all of them."""

    folder = "adapter"
    saves: ClassVar[str]
    """The ``peft_type`` in its files."""
    takes_conv1d: ClassVar[bool] = True
    """Whether PEFT has this method for GPT-2's Conv1D layers."""
    in_blocks: ClassVar[bool] = False
    """Whether inputs are cut into blocks of ``config.block_size``."""

    @abstractmethod
    def peft_config(self, model: Any) -> Any:
        """PEFT's own config object."""

    def problems(self, model: Any) -> list[Problem]:
        """Layers that PEFT has no such adapter for, or none at all."""
        adapted = self.adapted(model)
        if not adapted:
            fix = "name modules that the model has: tunewright list methods"
            return [Problem("method.target_modules", "no layer of the model has such a name", fix)]
        if not self.takes_conv1d and any(linear.is_conv1d for linear in adapted):
            what = f"{type(self).__name__} is not defined for the Conv1D layers of {model.config.model_type}"
            return [Problem("method", what, "use method: lora")]
        odd = [n for n in adapted if self.in_blocks and n.inputs % self.config.block_size]
        if odd:
            what = f"{self.config.block_size} does not divide the {odd[0].inputs} inputs of {odd[0].name}"
            fix = "choose a divisor of all inputs, or target_modules"
            return [Problem("method.block_size", what, fix)]
        return []

    def adapted(self, model: Any) -> list[anatomy.Linear]:
        """The linear layers that will have an adapter."""
        return anatomy.targets(model, self.config.target_modules)

    def targets(self, model: Any) -> dict[str, Any]:
        """The adapted layers, as the config of most of PEFT's methods takes them.

        Always names: ``all-linear`` and patterns make PEFT reach into the fused experts of some mixtures, too.
        """
        full = [layer.name for layer in self.adapted(model)]
        last = sorted({name.rpartition(".")[2] for name in full})
        short = {layer.name for layer in anatomy.targets(model, tuple(last))} == set(full)
        return {"target_modules": last if short else full, "task_type": "CAUSAL_LM"}

    def stored_transposed(self, model: Any) -> bool:
        """PEFT's ``fan_in_fan_out``: whether weights lie [in, out], as those of Conv1D do."""
        return any(layer.is_conv1d for layer in self.adapted(model))

    def inject(self, model: Any) -> Any:
        """A PEFT model. Adapters have the base's dtype: the optimizer holds fp32 masters of them."""
        from peft import get_peft_model

        with quiet():
            return get_peft_model(model, self.peft_config(model), autocast_adapter_dtype=False)

    def export(self, model: Any, folder: Path) -> None:
        """adapter_config.json and adapter_model.safetensors."""
        with quiet():
            model.save_pretrained(folder, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card; ours is written beside it

    @classmethod
    def load(cls, base: Any, folder: Path) -> Any:
        """The base with the adapter on it; ModelError if the two do not fit."""
        return load(base, folder, cls.reads or (cls.saves,))

    @classmethod
    def merge(cls, model: Any) -> Any:
        """What the adapter computes, written into the base's weights."""
        return super().merge(model) if cls.facts.keeps_apart else model.merge_and_unload()


_EXPECTED = (
    "Found missing adapter keys",  # an error in _check_fit
    "Specified to not (save|load)",  # random projections are drawn again from their key
    "Failed to load the CUDA extension", "Setting boft_n_butterfly_factor",  # boft has a plain path
    "The following rank_pattern keys did not match",  # adalora's pattern is of its own kind
    "Unsupported layer type",  # any normalisation will do
    "Using Rank-Stabilized LoRA with rank_pattern",  # _residual converts those, too
    "lora with eva initialization used with low_cpu_mem_usage",
    r"Adapter 'default': \d+ LoRA tensor\(s\) have invalid shape",  # a rank of zero is meant
)  # fmt: skip
"""How PEFT's warnings begin that tell nothing to a user of ours."""


@contextmanager
def quiet() -> Iterator[None]:
    """Without PEFT's warnings of what is meant, or is an error of ours."""
    with warnings.catch_warnings():
        for beginning in _EXPECTED:
            warnings.filterwarnings("ignore", beginning)
        yield


def load(base: Any, folder: Path, types: tuple[str, ...]) -> Any:
    """An adapter in PEFT's format, of one of these types, on its base; ModelError if the two do not fit."""
    from peft import PeftConfig, PeftModel

    _adapter.check(folder, types)
    try:
        with quiet():
            config = PeftConfig.from_pretrained(str(folder))
            _spell_out(config, folder)
            model = PeftModel.from_pretrained(base, str(folder), config=config, autocast_adapter_dtype=False)
    except Exception as error:  # whatever PEFT makes of a config that is not as it expects it
        what = f"cannot be loaded: {type(error).__name__}: {' '.join(str(error).split())}"[:400]
        raise ModelError(Problem(str(folder), what)) from error
    _check_fit(model, folder)
    return model


def _spell_out(config: Any, folder: Path) -> None:
    """Names instead of patterns: one from a stranger can be made to search for ever."""
    if any(isinstance(getattr(config, key, None), str) for key in _adapter.PATTERNS):
        config.target_modules, config.exclude_modules = set(_adapter.modules(folder, _prefix(config))), None


def _prefix(config: Any) -> str:
    """What the names of the adapter's own modules and parameters begin with, such as ``lora_``."""
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    return str(PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type]).removesuffix("lambda_")


def _check_fit(model: Any, folder: Path) -> None:
    """PEFT leaves out what does not fit and begins anew with what is missing; ModelError for both."""
    from peft import get_peft_model_state_dict

    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    own = "." + _prefix(model.active_peft_config)
    if found := _adapter.misfits(expected, _adapter.header(folder), own):
        where = str(folder / _adapter.WEIGHTS)
        raise ModelError(Problem(where, what, "download it again, and name its own base") for what in found)
