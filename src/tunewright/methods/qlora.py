"""QLoRA: LoRA on a base whose linear layers are held in 4 or 8 bits (Dettmers et al. 2023, arXiv:2305.14314)."""

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from tunewright.core import store
from tunewright.core.errors import ModelError, Problem, RecipeError, UserError
from tunewright.core.paths import cache_folder, folder_to_make
from tunewright.core.words import Words
from tunewright.methods import Facts, _adapter, lora
from tunewright.methods._loftq import loftq
from tunewright.models import files, intact, quantized
from tunewright.models.load import ModelSource, best_device, outline
from tunewright.recipes import plugin_config

_FILE = "quantization.json"


class Config(lora.Config):
    """LoRA's shape, and how the base is held."""

    quantization: Literal["nf4", "int8"] = "nf4"
    """nf4: 4-bit NormalFloat in blocks of 64; int8: 8 bits, scaled for each output."""
    double: bool = True
    """Whether nf4's scales are quantized too: 0.52 bytes a weight instead of 0.56."""
    init: Literal["gaussian", "loftq"] = "gaussian"  # type: ignore[assignment]
    """Where A and B start: gaussian and zero; loftq: with what quantizing lost (Li et al. 2023, arXiv:2310.08659)."""
    loftq_iterations: int = Field(1, ge=1, le=20)
    """Rounds of loftq; with more than one the base is quantized anew in each."""
    cache: str = ""
    """Folder of quantized weights, so that the next start reads codes; $TUNEWRIGHT_CACHE/quantized if not given."""


class Qlora(lora.Lora):
    """What LoRA trains, on quantized layers. Outputs at the start are the quantized base's, not the base's own.

    Codes are made from the weights rounded to bf16, so that they do not depend on the run's precision.
    """

    default_lr = 2e-4
    starts_equal = False
    reads = ()  # type: ignore[assignment]  # an adapter of another tool does not say how its base was held
    facts = Facts(
        idea=Words(
            "LoRA, while the frozen base is held in 4 bits and made whole layer by layer.",
            "冻结的基座以 4 比特保存，逐层还原后计算，其上训练 LoRA。",
        ),
        formula="h = dequantize(Q)·x + (α/r)·B·A·x",
        count="Σ r·(in + out) over adapted layers",
        inference=Words(
            "none once merged; the merged weights are the dequantized base's plus the term, not the original base's",
            "合并后无额外开销；合并结果以反量化后的基座为准，与原始基座不同",
        ),
        when=Words(
            "The base does not fit in memory in 16 bits; steps take longer, and 4 bits cost a little quality.",
            "16 比特的基座放不进内存时使用；每步更慢，4 比特会损失少许质量。",
        ),
        paper="Dettmers et al. 2023, arXiv:2305.14314",
    )

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.scheme = quantized.Scheme(config.quantization, config.double)
        self.base_bytes = self.scheme.bytes_each

    def problems(self, model: Any) -> list[Problem]:
        """Also a cache that cannot be."""
        found = super().problems(model)
        try:
            folder_to_make(self._cache, "method.cache")
        except UserError as error:
            found += error.problems
        return found

    @property
    def _cache(self) -> str:
        return self.config.cache or str(cache_folder() / "quantized")

    def load_base(self, source: ModelSource, precision: str) -> Any:
        """The quantized base, by codes from the cache; made now, a layer at a time, if it has none."""
        from tunewright.models import quantize_on_load

        ranks = self._loftq_ranks(outline(source))
        key = [self.config.loftq_iterations, sorted(ranks.items())] if ranks else None
        cache = folder_to_make(self._cache, "method.cache")
        return quantize_on_load.load(source, precision, self.scheme, self._make(ranks), key, cache)

    def _loftq_ranks(self, model: Any) -> dict[str, int]:
        """The rank of each layer that LoftQ quantizes."""
        if self.config.init != "loftq":
            return {}
        inside = {linear.name for linear in quantized.candidates(model)}
        return {layer.name: self._rank(layer.name) for layer in self.adapted(model) if layer.name in inside}

    def _make(self, ranks: dict[str, int]) -> quantized.Make:
        """What is held of a layer."""

        def make(name: str, weight_OI: Tensor) -> quantized.Tensors:
            w_OI = weight_OI.to(best_device(), torch.bfloat16).float()
            if not torch.isfinite(w_OI).all():
                raise ModelError(Problem("model", f"the weight of {name} is not finite", files.AGAIN))
            if name not in ranks:
                return _on(weight_OI, quantized.quantize(w_OI, self.scheme))
            start = loftq(w_OI, ranks[name], self.scheme, self.config.loftq_iterations)
            return _on(weight_OI, {**start.held, "lora_A": start.a, "lora_B": start.b})

        return make

    def inject(self, model: Any) -> Any:
        """A PEFT model on quantized layers."""
        from tunewright.models.quantized_layers import quantize_layers, unread

        quantize_layers(model, self.scheme, self._make(self._loftq_ranks(model)))
        with unread():
            adapted = super().inject(model)
        if self.config.init == "loftq":
            _begin(adapted)
        return adapted

    def peft_config(self, model: Any) -> Any:
        """LoRA's; what LoftQ begins with is put in afterwards."""
        return lora.Lora(self.config.model_copy(update={"init": "gaussian"})).peft_config(model)

    def export(self, model: Any, folder: Path) -> None:
        """PEFT's own files, and how the base was held."""
        super().export(model, folder)
        store.write_json(folder / _FILE, self.config.model_dump(mode="json", exclude={"cache"}))

    @classmethod
    def load(cls, base: Any, folder: Path) -> Any:
        """The base quantized as in training, with the adapter on it; ModelError if the two do not fit."""
        from tunewright.models.quantized_layers import quantize_layers, unread

        method = cls(_options(folder))
        quantize_layers(base, method.scheme, method._make(method._loftq_ranks(base)))
        with unread():
            return super().load(base, folder)

    @classmethod
    def load_with_base(cls, source: ModelSource, precision: str, folder: Path) -> Any:
        """The trained model again; its base comes from the cache if that has it."""
        return cls.load(cls(_options(folder)).load_base(source, precision), folder)

    @classmethod
    def merge(cls, model: Any) -> Any:
        """The dequantized base with the term added: what was trained, but not the original base plus the term."""
        from tunewright.models.quantized_layers import restore

        restore(model)
        return super().merge(model)


def _on(like: Tensor, tensors: quantized.Tensors) -> quantized.Tensors:
    return {name: tensor.to(like.device) for name, tensor in tensors.items()}


@torch.no_grad()
def _begin(model: Any) -> None:
    """Put LoftQ's factors into the adapter; its scale is divided out of them evenly."""
    from tunewright.models.quantized_layers import Layer

    for layer in model.modules():
        base = getattr(layer, "base_layer", None)
        if isinstance(base, Layer) and base.begin:
            root = layer.scaling["default"] ** 0.5
            for name, factor in base.begin.items():
                getattr(layer, name)["default"].weight.copy_(factor / root)
            base.begin = {}


def _options(folder: Path) -> Config:
    """How the base was held, from the adapter's folder; ModelError if that does not say it."""
    path = folder / _FILE
    if not path.is_file():
        what = f"no {_FILE}, so nothing tells how its base was held"
        raise ModelError(Problem(str(folder), what, "load it as an adapter of the method lora"))
    intact.check_place(folder, path)
    saved = _adapter.check(folder, (Qlora.saves,))
    try:
        config = plugin_config("methods", {**files.json_object(path), "cache": "", "name": "qlora"})
    except RecipeError as error:
        raise ModelError(Problem(f"{path}: {p.where}", p.what, files.AGAIN) for p in error.problems) from None
    assert isinstance(config, Config)  # noqa: S101 by its name
    if (config.rank, config.rank_pattern) != (saved["r"], saved.get("rank_pattern") or {}):
        raise ModelError(Problem(str(path), f"has other ranks than {_adapter.CONFIG}", files.AGAIN))
    if config.loftq_iterations > 1:
        return config
    return config.model_copy(update={"init": "gaussian"})  # whose base is the same
