"""AdamW whose moments are held in 8 bits, in blocks with a scale each (Dettmers et al. 2021)."""

from typing import Any

import torch
from torch import Tensor

from tunewright.core.config import Config as BaseConfig
from tunewright.core.words import Words
from tunewright.models import blockwise
from tunewright.optimizers import Facts, Optimizer
from tunewright.optimizers._adam import Adam, State, counter, direction, moments

_BLOCK = 256
_ROOT = "exp_avg_sq_root"
_BOOKS = {"exp_avg": "signed", _ROOT: "unsigned"}
_SMALL = 4096
"""Tensors of fewer numbers keep fp32 moments: they save nothing, and norms and biases are the most sensitive."""


class Config(BaseConfig):
    """AdamW's betas and weight decay are ``train``'s."""


class AdamW8bit(Optimizer):
    """Moments become fp32 for their step and are rounded again after it.

    Unlike in bitsandbytes the second moment is held as its square root, which halves the range of sizes in a block, and
    is never rounded to zero, which would make its weight leap.
    """

    facts = Facts(
        idea=Words(
            "AdamW with both running means in 8 bits, a scale for every 256.",
            "AdamW，两个滑动平均均以 8 比特保存，每 256 个数共用一个缩放系数。",
        ),
        bytes_per_parameter=2 + 2 * 4 / _BLOCK,
        paper="Dettmers et al. 2021, arXiv:2110.02861",
    )

    def make(
        self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]
    ) -> torch.optim.Optimizer:
        """In plain torch, on any device."""
        return _AdamW8bit(groups, lr, betas)

    def start(self, master: Tensor) -> State:
        """Codes (uint8) and scales (fp32) of both moments, all zero; fp32 moments for small tensors."""
        if master.numel() < _SMALL:
            return {**counter(master), **moments(master)}
        blocks = -(-master.numel() // _BLOCK)
        state = counter(master)
        for name in _BOOKS:
            state[f"{name}_codes"] = torch.zeros(master.numel(), dtype=torch.uint8, device=master.device)
            state[f"{name}_scales"] = torch.zeros(blocks, device=master.device)
        return state


class _AdamW8bit(Adam):
    def along(self, gradient: Tensor, state: State, betas: tuple[float, float]) -> Tensor:
        """Adam's direction, by moments that are fp32 only here, and only a part of them at a time."""
        if "exp_avg" in state:
            return direction(gradient, state, betas)
        out = torch.empty_like(gradient, memory_format=torch.contiguous_format)
        size = blockwise.chunk(gradient.device)
        sizes = {"codes": size, "scales": size // _BLOCK}
        cut = {k: torch.split(state[k], sizes[k.rpartition("_")[2]]) for k in state if k != "step"}
        parts = zip(
            torch.split(gradient.reshape(-1), size),
            torch.split(out.view(-1), size),
            strict=True,
        )
        for i, (some, target) in enumerate(parts):
            held = {key: pieces[i] for key, pieces in cut.items()}
            whole = {name: _decoded(held, name, book) for name, book in _BOOKS.items()}
            whole["exp_avg_sq"] = whole[_ROOT].square_()
            target.copy_(direction(some, {"step": state["step"], **whole}, betas))
            whole[_ROOT].sqrt_()
            for name, book in _BOOKS.items():
                _encode(whole[name], held, name, book)
        return out


def _decoded(held: State, name: str, book: str) -> Tensor:
    codes = held[f"{name}_codes"]
    return blockwise.decode(codes, held[f"{name}_scales"], book, _BLOCK, codes.numel())


def _encode(moment: Tensor, held: State, name: str, book: str) -> None:
    codes, scales = blockwise.encode(moment, book, _BLOCK)
    if book == "unsigned":
        codes.clamp_min_(1)  # the smallest number above zero
    held[f"{name}_codes"].copy_(codes)
    held[f"{name}_scales"].copy_(scales)
