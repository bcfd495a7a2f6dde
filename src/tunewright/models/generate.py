"""Answers, many at a time, with a KV cache: greedy ones, and several drawn for each prompt."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tunewright.core.units import chunks
from tunewright.data.rows import Message, task_id
from tunewright.data.template import ChatCodec
from tunewright.data.tokens import TASK
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
            found = _generate(model, codec, [ids[i] for i in some], max_new_tokens, do_sample=False)
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
    """How answers are drawn, all at random from the model's own distribution."""

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
    came to that. They follow from torch's random state.
    """
    options = {"do_sample": True, "temperature": how.temperature, "top_p": how.top_p, "top_k": 0}
    answers: list[list[int]] = []
    for some in chunks((ids for ids in prompts for _ in range(how.count)), batch_size):
        answers += (_ended(codec, ids) for ids in _generate(model, codec, some, how.longest, **options))
    return answers


def _generate(
    model: Any, codec: ChatCodec, ids: list[list[int]], longest: int, **options: Any
) -> list[list[int]]:
    """What follows the prompts; what stands after the end of a turn is padding."""
    width = max(map(len, ids))
    # Left padding: all rows end, and so begin to answer, at the same position.
    ids_BT = torch.tensor([[codec.pad_id] * (width - len(i)) + i for i in ids], device=model.device)
    mask_BT = torch.tensor([[0] * (width - len(i)) + [1] * len(i) for i in ids], device=model.device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            out_BT = model.generate(
                input_ids=ids_BT, attention_mask=mask_BT, max_new_tokens=longest, use_cache=True,
                eos_token_id=codec.stop_ids or None, pad_token_id=codec.pad_id, **options,
            )  # fmt: skip
    finally:
        model.train(was_training)
    return [row[width:] for row in out_BT.tolist()]


def _ended(codec: ChatCodec, ids: list[int]) -> list[int]:
    """Up to the first token that ends a turn, that token included."""
    return ids[: _stop(codec, ids) + 1]


def text(codec: ChatCodec, ids: list[int]) -> str:
    """An answer's words, without the token that ends the turn."""
    return str(codec.tokenizer.decode(ids[: _stop(codec, ids)], skip_special_tokens=True)).strip()


def _stop(codec: ChatCodec, ids: list[int]) -> int:
    """Where the first token is that ends a turn; behind the last if none does."""
    return next((place for place, token in enumerate(ids) if token in codec.stop_ids), len(ids))
