"""Base models whose linear layers are quantized while they are read, and their codes kept for the next start.

transformers hands every weight to a quantizer as soon as it is read; this is ours. So the weights never lie in memory
all at once, and those whose codes are known already are not even read.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from tunewright.core import lock, store
from tunewright.models import hollow, quantized, quantized_layers
from tunewright.models.load import ModelSource, fingerprint, load_model
from tunewright.models.quantized import Make, Scheme, Tensors

_NAME = "tunewright"
_FILE = "weights.safetensors"
_VERSION = 1
"""Of what codes mean; another one is another folder of the cache."""


def load(source: ModelSource, precision: str, scheme: Scheme, make: Make, key: Any, cache: Path) -> Any:
    """The base with the linear layers in its blocks quantized, by codes from the cache, made now if it has none.

    ``key`` says what ``make`` depends on besides the weight and the scheme.
    """
    if hollow.is_on():
        model = load_model(source, precision)
        quantized_layers.quantize_layers(model, scheme, make)
        return model
    facts = {"base": fingerprint(source), "scheme": vars(scheme), "key": key, "version": _VERSION}
    folder = cache / store.sha256_json(facts)
    lock.once(folder, lambda: _make(folder, facts, source, scheme, make))
    known: dict[str, Tensors] = {}
    for joined, tensor in load_file(folder / _FILE).items():
        name, _, own = joined.rpartition("|")
        known.setdefault(name, {})[own] = tensor
    return load_model(source, precision, quantization=_Request(scheme, make, known))


def _make(folder: Path, facts: dict[str, Any], source: ModelSource, scheme: Scheme, make: Make) -> None:
    model = load_model(source, "bf16", quantization=_Request(scheme, make, {}))
    held = {name: {**layer.tensors, **layer.begin} for name, layer in quantized_layers.layers(model)}
    flat = {f"{name}|{own}": t.contiguous().cpu() for name, some in held.items() for own, t in some.items()}
    with store.artifact(folder, **facts) as partial:
        save_file(flat, partial / _FILE)


@register_quantization_config(_NAME)
class _Request(QuantizationConfigMixin):  # type: ignore[misc]
    """What transformers passes on to the quantizer."""

    quant_method = _NAME

    def __init__(self, scheme: Scheme, make: Make, known: Mapping[str, Tensors]) -> None:
        self.scheme, self.make, self.known = scheme, make, known

    def __deepcopy__(self, memo: Any) -> "_Request":
        return self  # the model's config is copied and written out, with all that it holds

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": _NAME}


@register_quantizer(_NAME)
class _Quantizer(HfQuantizer):  # type: ignore[misc]
    """Takes the weights out of the ordinary layers, and puts quantized layers in their place at the end."""

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        self.wanted = {linear.name for linear in quantized.candidates(model)}
        self.held = dict(self.quantization_config.known)
        for name in self.held:
            _empty(model, name)

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        name, _dot, own = param_name.rpartition(".")
        return own == "weight" and name in self.wanted

    def get_quantize_ops(self) -> "_Take":
        return _Take(self)

    def take(self, model: Any, parameter: str, weight: Tensor) -> None:
        """Quantize one layer's weight, which is forgotten then."""
        name = parameter.rpartition(".")[0]
        linear = model.get_submodule(name)
        weight_OI = weight if quantized_layers.outputs_first(linear) else weight.T
        self.held[name] = self.quantization_config.make(name, weight_OI)
        _empty(model, name)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for name, tensors in self.held.items():
            quantized_layers.replace(model, name, self.quantization_config.scheme, tensors)
        self.remove_quantization_config(model)
        return model

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


def _empty(model: Any, name: str) -> None:
    """Take a layer's weight away. transformers fills weights that no file had, but for those with this mark."""
    linear, nothing = model.get_submodule(name), torch.empty(0)
    del linear.weight
    linear.weight = nothing
    linear._is_hf_initialized = nothing._is_hf_initialized = True  # type: ignore[attr-defined]


class _Take(ConversionOps):  # type: ignore[misc]
    def __init__(self, quantizer: _Quantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self, input_dict: dict[str, Any], model: Any = None, missing_keys: Any = None, **_: Any
    ) -> dict[str, Tensor]:
        """Nothing is left to be put into the model."""
        for parameter, value in input_dict.items():
            self.quantizer.take(model, parameter, value[0] if isinstance(value, list) else value)
            missing_keys.discard(parameter)
        return {}
