"""Answers, many at a time, with a KV cache: greedy ones, and several drawn for each prompt."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunewright.core.units import chunks
from tunewright.data.rows import Message, task_id
from tunewright.data.template import ChatCodec
from tunewright.data.tokens import TASK
from tunewright.models import decode
from tunewright.models.announce import announced


def answer(
    model: Any,
    codec: ChatCodec,
    prompts: Sequence[tuple[Message, ...]],
    max_new_tokens: int = 64,
    batch_size: int = 64,
    progress: Callable[[int], None] = lambda done: None,
    tasks: Sequence[str] = (),
) -> list[str]:
    """The model's greedy answer to each conversation, without its end-of-turn token.

    Prompts are sorted by length so that a batch has little padding; answers come back in the given order.
    ``tasks`` names what each is for, where adapters differ by it.
    """
    numbers = [task_id(task) for task in tasks] or [0] * len(prompts)
    room = max(1, context_length(model) - max_new_tokens)
    ids = [codec.prompt(messages)[-room:] for messages in prompts]
    answers = [""] * len(ids)
    done = 0
    for some in chunks(sorted(range(len(ids)), key=lambda i: len(ids[i])), batch_size):
        batch = {TASK: torch.tensor([numbers[i] for i in some], device=model.device)}
        with announced(model, batch):
            found = _answers(model, codec, [ids[i] for i in some], Draw(1, max_new_tokens, temperature=0.0))
        for i, tokens in zip(some, found, strict=True):
            answers[i] = text(codec, tokens)
        done += len(some)
        progress(done)
    return answers


def context_length(model: Any) -> int:
    """The most tokens the model can attend to, less those of a prompt before it; without a limit 2^30."""
    limit = int(getattr(model.config, "max_position_embeddings", None) or 1 << 30)
    return limit - int(getattr(model, "virtual_tokens", 0))


@dataclass(frozen=True)
class Draw:
    """How answers are drawn from the model's own distribution: at random, or at temperature 0 the greedy ones."""

    count: int
    """For each prompt."""
    longest: int
    """In tokens."""
    temperature: float = 1.0
    top_p: float = 1.0


def draw(
    model: Any, codec: ChatCodec, prompts: Sequence[list[int]], how: Draw, batch_size: int = 64
) -> list[list[int]]:
    """``how.count`` answers to each prompt's tokens, as tokens: prompt by prompt, each with the end of its turn if it
    came to that. They follow from torch's random state. A prompt goes through the model once for all its answers.
    """
    answers: list[list[int]] = []
    for some in chunks(prompts, max(1, batch_size // how.count)):
        answers += (_ended(codec, ids) for ids in _answers(model, codec, some, how))
    return answers


def _answers(model: Any, codec: ChatCodec, prompts: list[list[int]], how: Draw) -> list[list[int]]:
    """What follows the prompts; what stands after the end of a turn is padding."""
    width = max(map(len, prompts))
    # Left padding: all rows end, and so begin to answer, at the same position.
    ids_BT = torch.tensor([[codec.pad_id] * (width - len(i)) + i for i in prompts], device=model.device)
    mask_BT = torch.tensor([[0] * (width - len(i)) + [1] * len(i) for i in prompts], device=model.device)
    was_training = model.training
    model.eval()
    try:
        if decode.can(model):
            choose = decode.at_random(how.temperature, how.top_p) if how.temperature else decode.greedy
            return decode.decode(model, ids_BT, mask_BT, how.count, how.longest, codec.stop_ids, choose)
        return _by_transformers(model, codec, ids_BT, mask_BT, how)
    finally:
        model.train(was_training)


@torch.no_grad()
def _by_transformers(
    model: Any, codec: ChatCodec, ids_BT: Tensor, mask_BT: Tensor, how: Draw
) -> list[list[int]]:
    at_random = {"do_sample": True, "temperature": how.temperature, "top_p": how.top_p, "top_k": 0}
    options: dict[str, Any] = at_random if how.temperature else {"do_sample": False}
    out_BT = model.generate(
        input_ids=ids_BT.repeat_interleave(how.count, 0), attention_mask=mask_BT.repeat_interleave(how.count, 0),
        max_new_tokens=how.longest, use_cache=True, eos_token_id=codec.stop_ids or None,
        pad_token_id=codec.pad_id, **options,
    )  # fmt: skip
    return [row[ids_BT.shape[1] :] for row in out_BT.tolist()]


def _ended(codec: ChatCodec, ids: list[int]) -> list[int]:
    """Up to the first token that ends a turn, that token included."""
    return ids[: _stop(codec, ids) + 1]


def text(codec: ChatCodec, ids: list[int]) -> str:
    """An answer's words, without the token that ends the turn."""
    return str(codec.tokenizer.decode(ids[: _stop(codec, ids)], skip_special_tokens=True)).strip()


def _stop(codec: ChatCodec, ids: list[int]) -> int:
    """Where the first token is that ends a turn; behind the last if none does."""
    return next((place for place, token in enumerate(ids) if token in codec.stop_ids), len(ids))
