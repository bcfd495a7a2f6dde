"""Any other method that PEFT has, by PEFT's own name and options (docs of PEFT's tuners)."""

from dataclasses import fields
from typing import Any, Literal

from tunewright.core.errors import Problem, nearest
from tunewright.core.words import Words
from tunewright.methods import Facts
from tunewright.methods._peft import PeftMethod, TargetConfig

TYPES = (
    "C3A", "DEFT", "DELORA", "FOURIERFT", "GLORA", "GRALORA", "HIRA", "HRA", "LN_TUNING", "MISS", "PEANUT", "PSOFT",
    "PVERA", "RANDLORA", "ROAD", "WAVEFT",
)  # fmt: skip
"""Those that keep the contract: merge, files of what was trained, the base's outputs at the start."""
_OURS: dict[str, dict[str, Any]] = {
    "C3A": {"init_weights": True}, "FOURIERFT": {"init_weights": True}, "MISS": {"r": 16}, "PVERA": {"save_projection": False},
    "RANDLORA": {"save_projection": False}, "WAVEFT": {"init_weights": True},
}  # fmt: skip
"""Where PEFT's defaults do not keep it, or suit large layers only."""
_NORMS = "LN_TUNING"


class Config(TargetConfig):
    """PEFT's method, and what of its config differs from PEFT's defaults."""

    type: Literal[TYPES] = "MISS"  # type: ignore[valid-type]
    """PEFT's name of the method."""
    options: dict[str, Any] = {}
    """Options of PEFT's config for it, by PEFT's names; what is not given is PEFT's default."""


class Peft(PeftMethod):
    """One file for many: what they train is asked of PEFT itself."""

    default_lr = 1e-3
    saves = "MISS"
    reads = TYPES
    facts = Facts(
        idea=Words("Whatever PEFT's method of that name does.", "由 PEFT 中该名称的方法决定。"),
        formula="that of PEFT's method; MISS: W' = W + expand(D), D one row a block",
        count="as PEFT counts it",
        inference=Words("none once merged", "合并后无额外开销"),
        when=Words("To try a newer method of PEFT's by name.", "想按名称试用 PEFT 的新方法时。"),
        paper="Kang & Yin 2024, arXiv:2409.15371 (MISS)",
    )

    def problems(self, model: Any) -> list[Problem]:
        """Also options that PEFT's config does not have, and layers that PEFT itself refuses."""
        known = [f.name for f in fields(_config_class(self.config.type))]
        unknown = [key for key in self.config.options if key not in known]
        found = [
            Problem(f"method.options.{key}", "PEFT has no such option", nearest(key, known))
            for key in unknown
        ]
        if found:
            return found
        try:
            super().inject(_outline(model))
        except Exception as error:  # PEFT says in its own words what it cannot do
            what = f"PEFT refuses {self.config.type}: {type(error).__name__}: {' '.join(str(error).split())}"[
                :300
            ]
            return [Problem("method", what, "choose other options or target_modules, or use method: lora")]
        return []

    def peft_config(self, model: Any) -> Any:
        """PEFT's config of that type."""
        kind = _config_class(self.config.type)
        own = {f.name for f in fields(kind)}
        given = {**self.targets(model), "fan_in_fan_out": self.stored_transposed(model)}
        if self.config.type == _NORMS:
            given["target_modules"] = _norms(model)
        given |= _OURS.get(self.config.type, {})
        return kind(**{**{key: value for key, value in given.items() if key in own}, **self.config.options})

    def saved(self, model: Any) -> int:
        """Some of PEFT's methods save a little besides what they train."""
        from peft import get_peft_model_state_dict

        return sum(t.numel() for t in get_peft_model_state_dict(model, save_embedding_layers=False).values())

    def count(self, model: Any) -> int:
        """What PEFT marks as trainable on a model without values."""
        outline = super().inject(_outline(model))
        return sum(p.numel() for p in outline.parameters() if p.requires_grad)


def _config_class(name: str) -> Any:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import PeftType

    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name)]


def _norms(model: Any) -> list[str]:
    """The last names of the normalisation layers."""
    named = [name for name, module in model.named_modules() if "norm" in type(module).__name__.lower()]
    return sorted({name.rpartition(".")[2] for name in named})


def _outline(model: Any) -> Any:
    """The same architecture without values."""
    import torch

    with torch.device("meta"):
        return type(model)(model.config)
