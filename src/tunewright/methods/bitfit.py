"""BitFit: bias terms are trained and nothing else (Ben Zaken et al. 2021); missing ones are added at zero."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from tunewright.core.config import Config as BaseConfig
from tunewright.core.words import Words
from tunewright.methods import Facts
from tunewright.methods._own import OwnMethod
from tunewright.models import anatomy

_SWITCHES = ("attention_bias", "mlp_bias", "use_bias")
"""Options of architectures by which linear layers have biases."""
_KEPT_APART = Words(
    "biases were added to linear layers that have none in this architecture, and no option of it gives them any",
    "给这种结构里没有偏置的线性层加了偏置，而该结构没有任何选项能带上它们",
)


class Config(BaseConfig):
    """BitFit has no options of its own."""


class BitFit(OwnMethod):
    """Trains biases of linear layers and normalisations."""

    default_lr = 2e-3
    facts = Facts(
        idea=Words(
            "Only bias terms move. A linear layer without one gets one, at zero; fused experts and RMS norms do not.",
            "只训练偏置项。没有偏置的线性层补一个零偏置；融合专家和 RMS 归一化不补。",
        ),
        formula="h = W·x + b, W frozen, b trained",
        count="Σ biases there are + Σ out over linear layers without one",
        inference=Words(
            "none where the architecture has these biases or an option for them (GPT-2, Llama); else it cannot be "
            "merged and costs one addition for each added bias",
            "结构本身有这些偏置或有相应选项（GPT-2、Llama）时为零；否则无法合并，每个补上的偏置多一次加法",
        ),
        when=Words(
            "Small data and very small adapters, best with architectures that have biases, such as GPT-2.",
            "数据少、适配器要极小时；最适合自带偏置的结构，如 GPT-2。",
        ),
        paper="Ben Zaken, Ravfogel & Goldberg 2021, arXiv:2106.10199",
    )

    def inject(self, model: Any) -> Any:
        """Biases at zero where there are none; all biases require gradients."""
        for linear in _without_bias(model):
            module = model.get_submodule(linear.name)
            module.bias = nn.Parameter(module.weight.new_zeros(linear.outputs))
        model.requires_grad_(False)
        for _, bias in _biases(model):
            bias.requires_grad_(True)
        return model

    def count(self, model: Any) -> int:
        """Biases that there are, and those that will be."""
        there = sum(bias.numel() for _, bias in _biases(model))
        return there + sum(linear.outputs for linear in _without_bias(model))

    def report(self, model: Any) -> dict[str, Any]:
        """How many biases are trained, and how many of them the architecture did not have."""
        own = _names(model.config, model)
        added = [bias for name, bias in _biases(model) if name not in own]
        return {
            "biases": len(list(_biases(model))), "added_biases": len(added),
            "added_parameters": sum(bias.numel() for bias in added),
        }  # fmt: skip

    @classmethod
    def keeps_apart(cls, model: Any) -> Words | None:
        """None where the architecture itself can have all these biases."""
        return None if _config_with_biases(model) else _KEPT_APART

    @classmethod
    def merge(cls, model: Any) -> Any:
        """The model, its config saying that it has biases; ModelError where no config can."""
        config = _config_with_biases(model)
        if config is None:
            return super().merge(model)
        for switch in _SWITCHES:
            if hasattr(config, switch):
                setattr(model.config, switch, getattr(config, switch))
        return model


def _biases(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Bias terms by name: of linear layers, normalisations, and fused weights (``gate_up_proj_bias``)."""
    return ((name, p) for name, p in model.named_parameters() if name.endswith((".bias", "_bias")))


def _without_bias(model: Any) -> list[anatomy.Linear]:
    return [linear for linear in anatomy.linears(model) if not linear.has_bias]


def _names(config: Any, model: Any) -> set[str]:
    """Parameters of the model's architecture under a config."""
    with torch.device("meta"):
        return {name for name, _ in type(model)(copy.deepcopy(config)).named_parameters()}


def _config_with_biases(model: Any) -> Any:
    """A config under which the architecture has all biases that are trained and else the same parameters, or None."""
    wanted = {name for name, _ in model.named_parameters()}
    wanted |= {f"{linear.name}.bias" for linear in _without_bias(model)}
    switched = copy.deepcopy(model.config)
    for switch in _SWITCHES:
        if getattr(switched, switch, None) is False:
            setattr(switched, switch, True)
    return next((config for config in (model.config, switched) if _names(config, model) == wanted), None)
