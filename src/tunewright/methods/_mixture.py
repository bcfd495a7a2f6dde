"""Several LoRA adapters over one frozen base, each row of a batch with its own: what such methods share.

Shapes: B rows, N of them, T positions, I inputs, O outputs, R rank, K adapters.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from tunewright.core.errors import Problem
from tunewright.methods import _adapter
from tunewright.methods._own import OwnMethod
from tunewright.methods._peft import TargetConfig
from tunewright.models import anatomy
from tunewright.models.announce import ROUTER

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
"""An adapter's name, which may become that of a folder."""
_EXPERTS = ".experts."


class MixtureConfig(TargetConfig):
    """The shape of each adapter."""

    rank: int = Field(8, ge=1)
    """Rank r of the two factors A [r, in] and B [out, r] of every adapter."""
    alpha: float = Field(16, gt=0)
    """Scale; an adapter's term is multiplied by alpha / rank."""


class Group(NamedTuple):
    """``rows`` [N] that use an adapter, None for all; ``gates`` [N] are their weights for it, None for ones."""

    adapter: int
    rows: Tensor | None = None
    gates: Tensor | None = None


Groups = tuple[Group, ...]


def one_each(choice_B: Tensor, count: int) -> Groups:
    """Groups in which every row uses the adapter of its number and no other."""
    rows = [(k, (choice_B == k).nonzero().flatten()) for k in range(count)]
    return tuple(Group(k, None if len(at) == len(choice_B) else at) for k, at in rows if len(at))


@dataclass
class Routes:
    """What the rows at hand use; the adapted layers read it, the router writes it."""

    rows: int = 0
    groups: Groups = ()


class MixedLinear(nn.Module):
    """base(x) + Σ_k g_k·(alpha/r)·B_k·A_k·x with each row's own g [K].

    The factors are apart for each adapter: one that no row uses gets no gradient, and no optimizer moves it.
    """

    def __init__(self, base: nn.Module, layer: anatomy.Linear, like: Tensor, router: "Router") -> None:
        super().__init__()
        config, count = router.config, len(router.names)
        self.base, self.routes, self.is_conv1d = base, router.routes, layer.is_conv1d
        self.scale = config.alpha / config.rank
        sides_A, sides_B = (config.rank, layer.inputs), (layer.outputs, config.rank)
        self.lora_A = nn.ParameterList(like.new_empty(sides_A) for _ in range(count))
        self.lora_B = nn.ParameterList(like.new_zeros(sides_B) for _ in range(count))
        for A_RI in self.lora_A:
            nn.init.kaiming_uniform_(A_RI, a=5**0.5)  # as PEFT does

    def forward(self, x: Tensor) -> Tensor:
        """``x`` is [B, T, I], or [B·T, I] where a layer is given the positions in one row."""
        base: Tensor = self.base(x)
        if not self.routes.groups:
            return base
        x_BTI = x.reshape(self.routes.rows, -1, x.shape[-1])
        y_BTO = base.reshape(self.routes.rows, -1, base.shape[-1])
        for group in self.routes.groups:
            y_BTO = self._plus(y_BTO, x_BTI, group)
        return y_BTO.reshape(base.shape)

    def _plus(self, y_BTO: Tensor, x_BTI: Tensor, group: Group) -> Tensor:
        A_RI, B_OR = self.lora_A[group.adapter], self.lora_B[group.adapter]
        rows_N, gates_N = group.rows, group.gates
        x_NTI = x_BTI if rows_N is None else x_BTI[rows_N]
        term_NTO = F.linear(F.linear(x_NTI, A_RI), B_OR) * self.scale
        if gates_N is not None:
            term_NTO = term_NTO * gates_N[:, None, None]
        term_NTO = term_NTO.to(y_BTO.dtype)
        return y_BTO + term_NTO if rows_N is None else y_BTO.index_add(0, rows_N, term_NTO)


class Router(nn.Module):
    """Chooses, before each forward pass of a model, which adapters its rows use.

    What was chosen for a prompt holds for the tokens that follow: it goes with the KV cache. Under gradient
    checkpointing a backward pass must come before the next forward pass, since layers look here again.
    """

    def __init__(self, names: tuple[str, ...], config: Any) -> None:
        super().__init__()
        self.names, self.config = names, config
        self.routes = Routes()
        self.batch: Mapping[str, Tensor] = {}
        self._kept: WeakKeyDictionary[Any, Groups] = WeakKeyDictionary()

    @abstractmethod
    def groups(self, model: Any, ids_BT: Tensor, real_BT: Tensor) -> Groups:
        """The groups of these rows. ``real_BT`` is True where a token is no padding, as far as it is known."""

    def before(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of the model. ValueError if there are no ``input_ids`` to go by."""
        cache = kwargs.get("past_key_values")
        ids_BT = args[0] if args else kwargs.get("input_ids")
        if ids_BT is None:
            raise ValueError("the choice of adapters goes by input_ids, and the model was given none")
        if cache is not None and cache in self._kept and cache.get_seq_length() > 0:
            groups = self._kept[cache]
        else:
            groups = self.groups(model, ids_BT, _real(ids_BT, kwargs.get("attention_mask")))
        self.routes.rows, self.routes.groups = len(ids_BT), groups

    def after(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A forward hook of the model: what was chosen goes with the cache that was filled."""
        cache = getattr(output, "past_key_values", None)
        if cache is not None:
            self._kept[cache] = self.routes.groups


def _real(ids_BT: Tensor, mask: Any) -> Tensor:
    if isinstance(mask, Tensor) and mask.shape == ids_BT.shape:
        return mask.bool()
    return torch.ones_like(ids_BT, dtype=torch.bool)


class MixtureMethod(OwnMethod):
    """A subclass names the adapters and makes the router."""

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The adapters' names."""

    @abstractmethod
    def router(self, model: Any) -> Router:
        """What chooses among them, not trained yet."""

    def problems(self, model: Any) -> list[Problem]:
        """No layer of that name, or layers that see tokens without the rows they belong to."""
        adapted, where = self.adapted(model), "method.target_modules"
        if not adapted:
            fix = "name modules that the model has: tunewright list methods"
            return [Problem(where, "no layer of the model has such a name", fix)]
        inside = [layer.name for layer in adapted if _EXPERTS in layer.name]
        what = f"{inside[0]} sees tokens of all rows mixed" if inside else ""
        return [Problem(where, what, "name modules outside of the experts")] if inside else []

    def adapted(self, model: Any) -> list[anatomy.Linear]:
        """The linear layers that will have adapters."""
        wanted = self.config.target_modules
        found = anatomy.targets(model, wanted)
        return found if wanted != "all-linear" else [n for n in found if _EXPERTS not in n.name]

    def inject(self, model: Any) -> Any:
        """The model itself: its layers wrapped, its forward passes watched by the router."""
        model.requires_grad_(False)
        router, like = self.router(model), model.get_input_embeddings().weight.detach()
        for layer in self.adapted(model):
            parent, _, own = layer.name.rpartition(".")
            mixed = MixedLinear(model.get_submodule(layer.name), layer, like, router)
            setattr(model.get_submodule(parent), own, mixed)
        model.add_module(ROUTER, router)
        model.register_forward_pre_hook(router.before, with_kwargs=True)
        model.register_forward_hook(router.after, with_kwargs=True)
        return model

    def count(self, model: Any) -> int:
        """Two factors for each adapter of each adapted layer."""
        sides = sum(layer.inputs + layer.outputs for layer in self.adapted(model))
        return int(len(self.names) * self.config.rank * sides)


def save_one(model: Any, adapter: int, folder: Path) -> None:
    """One of the adapters as an ordinary LoRA of PEFT's, in an existing folder."""
    from peft import LoraConfig

    config = model.get_submodule(ROUTER).config
    layers = {name: m for name, m in model.named_modules() if isinstance(m, MixedLinear)}
    tensors = {
        f"{_adapter.PREFIX}{name}.{factor}.weight": getattr(layer, factor)[adapter].detach().cpu()
        for name, layer in layers.items()
        for factor in ("lora_A", "lora_B")
    }
    save_file(tensors, folder / _adapter.WEIGHTS, metadata={"format": "pt"})
    LoraConfig(
        r=config.rank, lora_alpha=config.alpha, target_modules=sorted(layers), task_type="CAUSAL_LM",
        fan_in_fan_out=any(layer.is_conv1d for layer in layers.values()), inference_mode=True,
        base_model_name_or_path=str(model.config.name_or_path),
    ).save_pretrained(str(folder))  # fmt: skip
