"""Answers token by token with a KV cache: a prompt is read once for all its answers, and rows that have ended leave."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tunewright.models.announce import ROUTER, unchanging

_LEAVE = 8
"""Rows that have ended leave once they are so large a part of all: the others' cache is copied then."""
_NEEDED = ("position_ids", "past_key_values", "logits_to_keep")
Choose = Callable[[Tensor], Tensor]
"""Tokens [N] of logits [N, V]."""


def can(model: Any) -> bool:
    """Whether this model decodes here: it takes positions and a cache, has no prompt of its own, nor adapters by row."""
    if getattr(model, "virtual_tokens", 0) or getattr(model, ROUTER, None) is not None:
        return False
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    known = inspect.signature(type(base).forward).parameters
    return all(name in known for name in _NEEDED)


@torch.no_grad()
def decode(
    model: Any,
    ids_BT: Tensor,
    mask_BT: Tensor,
    count: int,
    longest: int,
    stops: Sequence[int],
    choose: Choose,
) -> list[list[int]]:
    """``count`` answers to each left-padded prompt, each of at most ``longest`` tokens; a token of ``stops`` is its last."""
    with unchanging(model):
        cache = _read(model, ids_BT[:, :-1], mask_BT[:, :-1], count)
        mask_NT = mask_BT.repeat_interleave(count, 0)
        given_N = ids_BT[:, -1].repeat_interleave(count)
        places_N = mask_NT.sum(1) - 1
        rows, answers = list(range(len(mask_NT))), [list[int]() for _ in range(len(mask_NT))]
        ends = torch.tensor(list(stops), device=ids_BT.device)
        ended_N = torch.zeros(len(rows), dtype=torch.bool, device=ids_BT.device)
        for _ in range(longest):
            out = model(
                input_ids=given_N[:, None], attention_mask=mask_NT, position_ids=places_N[:, None],
                past_key_values=cache, use_cache=True, logits_to_keep=1,
            )  # fmt: skip
            given_N = choose(out.logits[:, -1])
            for row, token, ended in zip(rows, given_N.tolist(), ended_N.tolist(), strict=True):
                if not ended:
                    answers[row].append(token)
            ended_N |= torch.isin(given_N, ends)
            gone = int(ended_N.sum())
            if gone == len(rows):
                break
            if gone * _LEAVE >= len(rows):
                left = (~ended_N).nonzero()[:, 0]
                cache.batch_select_indices(left)
                mask_NT, given_N, places_N, ended_N = (x[left] for x in (mask_NT, given_N, places_N, ended_N))
                rows = [rows[i] for i in left.tolist()]
            mask_NT = torch.cat([mask_NT, mask_NT.new_ones(len(rows), 1)], 1)
            places_N = places_N + 1
    return answers


def _read(model: Any, ids_BT: Tensor, mask_BT: Tensor, count: int) -> Any:
    """Keys and values of the prompts, ``count`` times each."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config.get_text_config())
    if ids_BT.shape[1]:
        places_BT = (mask_BT.cumsum(1) - 1).clamp_min(0)
        model(
            input_ids=ids_BT, attention_mask=mask_BT, position_ids=places_BT, past_key_values=cache,
            use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        cache.batch_repeat_interleave(count)
    return cache


def greedy(logits_NV: Tensor) -> Tensor:
    """The likeliest."""
    return logits_NV.argmax(-1)


def at_random(temperature: float, top_p: float) -> Choose:
    """Drawn from the softmax at a temperature, of the likeliest words that together have probability ``top_p``."""

    def choose(logits_NV: Tensor) -> Tensor:
        chances_NV = (logits_NV.float() / temperature).softmax(-1)
        if top_p < 1:
            chances_NV = _nucleus(chances_NV, top_p)
        # By the inverse of the summed chances: one random number a row, where torch.multinomial draws one a word.
        sums_NV = chances_NV.cumsum(-1)
        at_N1 = torch.rand(len(sums_NV), 1, device=sums_NV.device) * sums_NV[:, -1:]
        return torch.searchsorted(sums_NV, at_N1, right=True)[:, 0].clamp_max(sums_NV.shape[1] - 1)

    return choose


def _nucleus(chances_NV: Tensor, top_p: float) -> Tensor:
    """The rest have none (Holtzman et al. 2020)."""
    ordered_NV, words_NV = chances_NV.sort(-1, descending=True)
    before_NV = ordered_NV.cumsum(-1) - ordered_NV
    kept_NV = torch.where(before_NV < top_p, ordered_NV, 0.0)
    return torch.zeros_like(chances_NV).scatter(-1, words_NV, kept_NV)
