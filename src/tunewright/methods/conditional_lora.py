"""C-LoRA: several adapters over one frozen base; a rule or a learned router chooses for each prompt."""

from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor
from torch.nn import functional as F

from tunewright.core.errors import ModelError, Problem, nearest
from tunewright.core.words import Words
from tunewright.methods import Clock, Facts, Setting
from tunewright.methods._mixture import MixtureConfig, MixtureMethod, Name, Router, save_one
from tunewright.methods._own import Tensors
from tunewright.methods._prompt_router import PromptRouter
from tunewright.methods._rules import SCRIPTS
from tunewright.models.announce import ROUTER

_RULES, _CENTRE = f"{ROUTER}.rules.", f"{ROUTER}.centre"
_LOOKED_AT = 16
"""Batches by which a learned router knows what all prompts have in common."""
Word = Annotated[str, Field(min_length=1, max_length=64, pattern=r"\S")]


class Config(MixtureConfig):
    """The adapters, their shape, and what chooses among them."""

    adapters: Annotated[int, Field(ge=1, le=64)] | tuple[Name, ...] = 2
    """How many, or their names."""
    router: Literal["learned", "rule"] = "learned"
    """learned: a linear layer on the mean of the prompt's embeddings. rule: the prompt's words, by `rules`."""
    mix: Literal["soft", "top-1"] = "soft"
    """What a learned router's probabilities mean: soft adds all adapters up by them, top-1 takes the likeliest."""
    balance: float = Field(0.01, ge=0)
    """Weight of the penalty on a learned router that prefers some adapters (Fedus et al. 2021, eq. 4)."""
    rules: dict[Name, tuple[Word, ...]] = {}
    """Adapter -> words one of which the prompt holds, or script:han, script:latin. The first that applies counts."""
    default: str = ""
    """The adapter where no rule applies; the first if not given."""

    @field_validator("adapters")
    @classmethod
    def _apart(cls, adapters: int | tuple[str, ...]) -> int | tuple[str, ...]:
        if isinstance(adapters, tuple) and len(set(adapters)) < max(1, len(adapters)):
            raise ValueError("expected names that differ, and at least one")
        return adapters

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        unknown = [n for n in (*self.rules, self.default) if n and n not in self.names]
        if unknown:
            raise ValueError(f"there is no adapter {unknown[0]!r}; {nearest(unknown[0], self.names)}")
        if (self.router == "rule") != bool(self.rules):
            raise ValueError("rules are for router: rule, and it needs some")
        strange = [
            w for words in self.rules.values() for w in words if w.startswith("script:") and w not in SCRIPTS
        ]
        if strange:
            raise ValueError(f"there is no {strange[0]}; {nearest(strange[0], SCRIPTS)}")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters' names: a1, a2 ... for a number of them."""
        if isinstance(self.adapters, tuple):
            return self.adapters
        return tuple(f"a{n}" for n in range(1, self.adapters + 1))


class ConditionalLora(MixtureMethod):
    """Trains every adapter on the rows that are sent to it, and a learned router with them."""

    default_lr = 2e-4
    facts = Facts(
        idea=Words(
            "Each prompt is answered by the adapter, or the mixture of adapters, that a router chooses for it.",
            "路由器为每个提示选择由哪个适配器（或哪种适配器组合）来回答。",
        ),
        formula="h = W·x + Σ_k g_k(prompt)·(α/r)·B_k·A_k·x",
        count="Σ K·r·(in + out) over adapted layers, and K·(d + 1) of a learned router, for K adapters",
        inference=Words(
            "one low-rank product in each adapted layer, K of them with mix: soft; the choice once a prompt",
            "每个被适配的层多一次低秩乘法（mix: soft 时为 K 次），每个提示选择一次",
        ),
        when=Words(
            "Inputs of several kinds in one stream, such as two languages, and no one to say which is which.",
            "一个输入流里混有几类内容（例如两种语言），又没有人标明哪条属于哪类时。",
        ),
        paper="Hu et al. 2021, arXiv:2106.09685; routing and its balance: Fedus et al. 2021, arXiv:2101.03961",
        keeps_apart=Words(
            "which adapter counts depends on the prompt, so no single weight stands for them; extract one of them",
            "用哪个适配器取决于提示，没有单一的权重能代表它们；可以单独取出其中一个",
        ),
    )

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters' names."""
        return tuple(self.config.names)

    def inject(self, model: Any) -> Any:
        """As for all mixtures; nothing has been chosen yet."""
        self._chosen_K = torch.zeros(len(self.names), dtype=torch.float64)
        return super().inject(model)

    def router(self, model: Any) -> Router:
        """By rules or learned, as the config says."""
        return PromptRouter(self.config, model.get_input_embeddings().weight.detach())

    def count(self, model: Any) -> int:
        """The adapters, and a row of the learned router for each."""
        width = model.get_input_embeddings().weight.shape[1]
        learned = len(self.names) * (width + 1) if self.config.router == "learned" else 0
        return super().count(model) + learned

    def begin(self, model: Any, setting: Setting) -> None:
        """Rules become token ids of this tokenizer; a learned router sees what prompts have in common."""
        router = _router(model)
        router.rules.compile(setting.codec)
        if self.config.router == "learned":
            router.look(model, islice(setting.batches(), _LOOKED_AT))

    def before_step(self, model: Any, clock: Clock) -> None:
        """Forget what was seen and counted of a step that is taken again."""
        router = _router(model)
        router.seen.clear()
        router.tally_K.zero_()

    def penalty(self, model: Any, clock: Clock) -> Tensor | None:
        """K·Σ f_k·P_k: the share of rows whose likeliest adapter is k, times its mean probability."""
        router = _router(model)
        if self.config.router == "rule" or not self.config.balance or not router.seen:
            return None
        p_NK = router.probabilities(torch.cat(router.seen))
        share_K = F.one_hot(p_NK.argmax(1), len(self.names)).float().mean(0)
        return self.config.balance * len(self.names) * (share_K * p_NK.mean(0)).sum()  # type: ignore[no-any-return]

    def after_update(self, model: Any, clock: Clock) -> None:
        """Count what the step's rows used."""
        self._chosen_K += _router(model).tally_K

    def state(self) -> Tensors:
        """How much each adapter was used so far."""
        return {"chosen": self._chosen_K}

    def set_state(self, state: Tensors) -> None:
        """The counts again."""
        if unknown := set(state) - {"chosen"}:
            raise ValueError(f"C-LoRA declares the state chosen, found {', '.join(sorted(unknown))}")
        self._chosen_K = state.get("chosen", torch.zeros_like(self._chosen_K)).clone()

    def report(self, model: Any) -> dict[str, Any]:
        """The share of the training rows that used each adapter; rows of several epochs count in each."""
        shares = (self._chosen_K / self._chosen_K.sum().clamp(min=1)).tolist()
        return {"chosen": dict(zip(self.names, shares, strict=True))}

    def tensors(self, model: Any) -> Tensors:
        """What was trained, and what was found out about tokenizer and data."""
        found = _router(model).named_buffers()
        return super().tensors(model) | {f"{ROUTER}.{name}": buffer for name, buffer in found}

    def misses(self, base: Any, header: dict[str, dict[str, Any]]) -> list[str]:
        """As for all methods; only what was trained counts."""
        trained = {n: entry for n, entry in header.items() if not n.startswith((_RULES, _CENTRE))}
        return super().misses(base, trained)

    def fits(self, model: Any, header: dict[str, dict[str, Any]]) -> list[str]:
        """As for all methods; rules are of any length."""
        rules, rest = {}, dict(header)
        for name in [name for name in header if name.startswith(_RULES)]:
            rules[name.removeprefix(_RULES)] = rest.pop(name)
        own = _router(model).rules
        shapes = {f"{_RULES}{n}": {"shape": list(b.shape)} for n, b in own.named_buffers()}
        return own.wrong(rules) + super().fits(model, rest | shapes)

    def fill(self, model: Any, tensors: Tensors) -> None:
        """Put all back."""
        rules = {n.removeprefix(_RULES): t for n, t in tensors.items() if n.startswith(_RULES)}
        _router(model).rules.fill(rules)
        super().fill(model, {n: t for n, t in tensors.items() if not n.startswith(_RULES)})


def _router(model: Any) -> PromptRouter:
    router = model.get_submodule(ROUTER)
    assert isinstance(router, PromptRouter), "the method was applied to another model"  # noqa: S101 our own bug
    return router


def extract(model: Any, name: str, folder: Path) -> None:
    """Save one adapter of a model as an ordinary LoRA, which PEFT loads, into an existing folder.

    It gives what the model gives for prompts that use this adapter alone. ModelError if there is none of the name.
    """
    names = _router(model).names
    if name not in names:
        raise ModelError(Problem("adapter", f"there is no adapter {name!r}", nearest(name, names)))
    save_one(model, names.index(name), folder)
