"""LoRA: a frozen weight W gains a trained low-rank term, W + (alpha/r)·B·A (Hu et al. 2021), through PEFT."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from tunewright.core.errors import Problem
from tunewright.core.words import Words
from tunewright.methods import Facts, Setting, _residual
from tunewright.methods._peft import PeftMethod, TargetConfig, quiet
from tunewright.models import anatomy

_LOOKED_AT = 16
"""Batches whose activations EVA looks at."""


class Config(TargetConfig):
    """The shape of the adapter and where it starts."""

    rank: int = Field(16, ge=1)
    """Rank r of the two factors A [r, in] and B [out, r]."""
    alpha: float = Field(32, gt=0)
    """Scale; the term is multiplied by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    rslora: bool = False
    """Scale by alpha / √rank, which keeps large ranks learning (Kalajdzievski 2023, arXiv:2312.03732)."""
    init: Literal["gaussian", "pissa", "olora", "eva"] = "gaussian"
    """Where A and B start: gaussian and zero; pissa: the weight's main singular directions (Meng et al. 2024,
    arXiv:2404.02948); olora: its QR factors (Büyükakyüz 2024, arXiv:2406.01775); eva: the directions of the data's
    activations (Paischer et al. 2024, arXiv:2410.07170)."""
    lr_ratio: float = Field(1.0, gt=0)
    """B's learning rate as a multiple of A's; above 1 it is LoRA+ (Hayou et al. 2024, arXiv:2402.12354, 16)."""
    rank_pattern: dict[str, int] = {}
    """Module names -> their own rank."""
    alpha_pattern: dict[str, float] = {}
    """Module names -> their own alpha."""
    experts: bool = False
    """Adapt the fused weights of a mixture's experts too."""


class Lora(PeftMethod):
    """Trains r·(in + out) parameters for each adapted weight."""

    default_lr = 2e-4
    saves = "LORA"
    reads = ("LORA",)
    facts = Facts(
        idea=Words(
            "The change of a weight matrix is learned as the product of two thin matrices; the matrix itself stays.",
            "权重矩阵的改变量由两个瘦矩阵的乘积来学习，原矩阵不动。",
        ),
        formula="h = W·x + (α/r)·B·A·x",
        count="Σ r·(in + out) over adapted layers",
        inference=Words("none once merged", "合并后无额外开销"),
        when=Words(
            "The first choice: little memory, good quality, adapters of megabytes that merge without a trace.",
            "首选：显存省、效果好，适配器只有几兆，合并后没有痕迹。",
        ),
        paper="Hu et al. 2021, arXiv:2106.09685",
    )

    def problems(self, model: Any) -> list[Problem]:
        """Also names in patterns that no adapted layer has, and experts that are not there."""
        found = super().problems(model)
        for key, pattern in (
            ("rank_pattern", self.config.rank_pattern),
            ("alpha_pattern", self.config.alpha_pattern),
        ):
            missing = [name for name in pattern if not any(_named(n.name, name) for n in self.adapted(model))]
            what = "no adapted layer is called so"
            found += [Problem(f"method.{key}.{name}", what, "name adapted modules") for name in missing]
        own, kind = self.config, model.config.model_type
        if own.experts and not _experts(model):
            found.append(
                Problem("method.experts", f"{kind} has no fused expert weights", "leave out experts")
            )
        if own.experts and (own.init != "gaussian" or own.dropout):
            what = "PEFT's adapters of fused experts have neither dropout nor another start than gaussian"
            found.append(Problem("method.experts", what, "leave out init and dropout"))
        if own.init == "olora" and self.stored_transposed(model):
            what = f"PEFT's OLoRA does not know the Conv1D layers of {kind}"
            found.append(Problem("method.init", what, "use init: pissa"))
        return found

    def peft_config(self, model: Any) -> Any:
        """PEFT's LoraConfig."""
        from peft import EvaConfig, LoraConfig

        own, init = self.config, self.config.init
        more: dict[str, Any] = {"eva_config": EvaConfig(rho=1.0)} if init == "eva" else {}
        if own.experts:
            more["target_parameters"] = _experts(model)
        return LoraConfig(
            r=own.rank, lora_alpha=own.alpha, lora_dropout=own.dropout, use_rslora=own.rslora,
            init_lora_weights=True if init == "gaussian" else init, rank_pattern=dict(own.rank_pattern),
            alpha_pattern=dict(own.alpha_pattern), fan_in_fan_out=self.stored_transposed(model),
            **self.targets(model), **more,
        )  # fmt: skip

    def count(self, model: Any) -> int:
        """Two factors for each adapted layer, and for each expert's matrices."""
        layers = ((layer.name, layer.inputs + layer.outputs) for layer in self.adapted(model))
        dense = sum(self._rank(name) * sides for name, sides in layers)
        shapes = [model.get_parameter(name).shape for name in _experts(model) if self.config.experts]
        return dense + sum(self._rank("") * int(shape[0] * (shape[1] + shape[2])) for shape in shapes)

    def _rank(self, name: str) -> int:
        named = [rank for key, rank in self.config.rank_pattern.items() if _named(name, key)]
        return int(named[0] if named else self.config.rank)

    def lr_scale(self, name: str) -> float:
        """B learns ``lr_ratio`` times as fast."""
        return float(self.config.lr_ratio) if "lora_B" in name else 1.0

    def inject(self, model: Any) -> Any:
        """A PEFT model; what PiSSA and OLoRA took out of the base's weights is kept for :meth:`export`."""
        adapted = super().inject(model)
        if self.config.init in ("pissa", "olora"):
            _residual.remember(adapted)
        return adapted

    def begin(self, model: Any, setting: Setting) -> None:
        """EVA looks at the data's activations."""
        if self.config.init == "eva":
            from peft.tuners.lora.eva import initialize_lora_eva_weights

            batches = list(islice(_without_padding(setting), _LOOKED_AT))
            with quiet():
                initialize_lora_eva_weights(model, batches, show_progress_bar=False)

    def saved(self, model: Any) -> int:
        """Twice as much where the start has to be taken off again."""
        return super().saved(model) * (2 if _residual.remembered(model) else 1)

    def export(self, model: Any, folder: Path) -> None:
        """PEFT's own files; an adapter that began inside the base's weights is saved as its difference to them."""
        super().export(model, folder)
        if start := _residual.remembered(model):
            _residual.subtract(folder, start)


def _named(module: str, name: str) -> bool:
    return f".{module}".endswith(f".{name}")


def _experts(model: Any) -> list[str]:
    """Names of the three-dimensional weights inside the blocks: one matrix for each expert."""
    return [
        f"{name}.{own}"
        for name, block in anatomy.blocks(model)
        for own, p in block.named_parameters()
        if p.ndim == 3
    ]


def _without_padding(setting: Setting) -> Iterator[dict[str, Tensor]]:
    """Batches with a mask over the tokens up to the last that is no padding."""
    for batch in setting.batches():
        ids_BT = batch["input_ids"]
        mask_BT = (ids_BT != setting.codec.pad_id).flip(1).cummax(1).values.flip(1)
        yield {"input_ids": ids_BT, "attention_mask": mask_BT.long()}
