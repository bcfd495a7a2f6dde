"""AdaLoRA: ranks are given to the layers that need them in the course of training (Zhang et al. 2023)."""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from tunewright.core.words import Words
from tunewright.methods import Clock, Facts, Setting
from tunewright.methods._peft import PeftMethod, TargetConfig

_UNKNOWN = 1 << 30
"""Steps of a run that has not begun; :meth:`Adalora.begin` says how many there are."""
_SCORES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


class Config(TargetConfig):
    """The budget of ranks and when it is cut."""

    rank: int = Field(8, ge=1)
    """Mean rank of a layer in the end."""
    init_rank: int = Field(12, ge=1)
    """Rank of every layer at the start."""
    alpha: float = Field(32, gt=0)
    """Scale; the term is multiplied by alpha / current rank, as PEFT does."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    warm: float = Field(0.1, ge=0, lt=1)
    """Share of the steps before ranks are cut."""
    settled: float = Field(0.3, ge=0, lt=1)
    """Share of the steps at the end in which ranks stay as they are."""
    every: int = Field(1, ge=1)
    """Steps between two cuts."""
    beta1: float = Field(0.85, gt=0, lt=1)
    """Decay of the mean sensitivity."""
    beta2: float = Field(0.85, gt=0, lt=1)
    """Decay of its uncertainty."""
    orthogonality: float = Field(0.5, ge=0)
    """Weight of the penalty that keeps P and Q orthogonal."""


class Adalora(PeftMethod):
    """Trains r·(in + out + 1) parameters for each adapted weight and masks those of least importance."""

    default_lr = 1e-3
    saves = "ADALORA"
    reads = ("ADALORA",)
    facts = Facts(
        idea=Words(
            "The change is held as an SVD; singular values that matter least are struck out, layer against layer.",
            "改变量以奇异值分解形式保存；各层竞争，最不重要的奇异值被去掉。",
        ),
        formula="W' = W + (α/r)·P·Λ·Q, Λ diagonal and masked; loss + γ·mean ‖PᵀP − I‖",
        count="Σ r₀·(in + out + 1) over adapted layers",
        inference=Words("none once merged", "合并后无额外开销"),
        when=Words(
            "To learn which layers matter, or to spend a fixed number of parameters best; needs a longer run.",
            "想知道哪些层重要，或把固定参数量花在刀刃上；需要较长的训练。",
        ),
        paper="Zhang et al. 2023, arXiv:2303.10512",
    )

    reads_gradients = True

    def peft_config(self, model: Any) -> Any:
        """PEFT's AdaLoraConfig, whose schedule is set when the number of steps is known."""
        from peft import AdaLoraConfig

        own = self.config
        return AdaLoraConfig(
            init_r=own.init_rank, target_r=min(own.rank, own.init_rank), lora_alpha=own.alpha, deltaT=own.every,
            lora_dropout=own.dropout, beta1=own.beta1, beta2=own.beta2, orth_reg_weight=own.orthogonality,
            total_step=_UNKNOWN, fan_in_fan_out=self.stored_transposed(model), **self.targets(model),
        )  # fmt: skip

    def count(self, model: Any) -> int:
        """P, Q and Λ of each adapted layer at the first rank."""
        return sum(
            self.config.init_rank * (layer.inputs + layer.outputs + 1) for layer in self.adapted(model)
        )

    def begin(self, model: Any, setting: Setting) -> None:
        """The schedule, in steps."""
        steps = setting.clock.steps
        self._peft, self._allocator = model.active_peft_config, model.base_model.rankallocator
        self._peft.total_step = steps
        self._peft.tinit, self._peft.tfinal = int(self.config.warm * steps), int(self.config.settled * steps)

    def penalty(self, model: Any, clock: Clock) -> Tensor | None:
        """γ times the mean Frobenius distance of PᵀP and QQᵀ from the identity."""
        distances = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ("lora_A" in name or "lora_B" in name):
                factor = parameter.float()
                gram_RR = factor @ factor.T if "lora_A" in name else factor.T @ factor
                distances.append(torch.linalg.norm(gram_RR - torch.eye(len(gram_RR), device=factor.device)))
        penalty: Tensor = self.config.orthogonality * torch.stack(distances).mean()
        return penalty

    def after_update(self, model: Any, clock: Clock) -> None:
        """Scores of importance, and the mask that follows from them."""
        last_cut = self._peft.total_step - self._peft.tfinal
        if clock.step + 1 == last_cut and not self._allocator.ipt:
            self._allocator.update_ipt(
                model.base_model.model
            )  # PEFT takes scores in the steps before it only
        model.base_model.update_and_allocate(clock.step + 1)

    def state(self) -> dict[str, Tensor]:
        """Scores by ``score|parameter``, and which ranks are kept by ``kept|parameter``."""
        scores = {f"{key}|{n}": t for key in _SCORES for n, t in getattr(self._allocator, key).items()}
        kept = {f"kept|{name}": torch.tensor(mask) for name, mask in (self._peft.rank_pattern or {}).items()}
        return {**scores, **kept}

    def set_state(self, state: dict[str, Tensor]) -> None:
        """Scores and ranks as they were."""
        self._allocator.reset_ipt()
        self._peft.rank_pattern = None
        for joined, tensor in state.items():
            key, _, name = joined.partition("|")
            if key == "kept":
                self._peft.rank_pattern = {**(self._peft.rank_pattern or {}), name: tensor.tolist()}
            else:
                getattr(self._allocator, key)[name] = tensor

    def saved(self, model: Any) -> int:
        """What is left of P, Q and Λ."""
        kept = _kept(model)
        total = 0
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                module, _, _ = name.removeprefix("base_model.model.").partition(".lora_")
                shares = kept.get(module, [True])
                total += parameter.numel() * sum(shares) // len(shares)
        return total

    def report(self, model: Any) -> dict[str, Any]:
        """The rank that each layer ended with."""
        return {"ranks": {module: sum(mask) for module, mask in _kept(model).items()}}


def _kept(model: Any) -> dict[str, list[bool]]:
    """Module -> which of its ranks are left; PEFT calls them by longer names, other ones after saving."""
    pattern = model.active_peft_config.rank_pattern or {}
    return {name.partition(".lora_E")[0]: mask for name, mask in pattern.items()}
