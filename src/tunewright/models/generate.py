"""Greedy answers, many at a time, with a KV cache."""

from collections.abc import Callable, Sequence
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
            texts = _generate(model, codec, [ids[i] for i in some], max_new_tokens)
        for i, text in zip(some, texts, strict=True):
            answers[i] = text
        done += len(some)
        progress(done)
    return answers


def context_length(model: Any) -> int:
    """The most tokens the model can attend to, less those of a prompt before it; without a limit 2^30."""
    limit = int(getattr(model.config, "max_position_embeddings", None) or 1 << 30)
    return limit - int(getattr(model, "virtual_tokens", 0))


@torch.no_grad()
def _generate(model: Any, codec: ChatCodec, ids: list[list[int]], max_new_tokens: int) -> list[str]:
    longest = max(map(len, ids))
    # Left padding: all rows end, and so begin to answer, at the same position.
    ids_BT = torch.tensor([[codec.pad_id] * (longest - len(i)) + i for i in ids], device=model.device)
    mask_BT = torch.tensor([[0] * (longest - len(i)) + [1] * len(i) for i in ids], device=model.device)
    was_training = model.training
    model.eval()
    out_BT = model.generate(
        input_ids=ids_BT, attention_mask=mask_BT, max_new_tokens=max_new_tokens, do_sample=False,
        eos_token_id=codec.stop_ids or None, pad_token_id=codec.pad_id, use_cache=True,
    )  # fmt: skip
    model.train(was_training)
    return [_text(codec, row[longest:]) for row in out_BT.tolist()]


def _text(codec: ChatCodec, ids: list[int]) -> str:
    """The answer's words, up to the first token that ends a turn."""
    stop = next((i for i, token in enumerate(ids) if token in codec.stop_ids), len(ids))
    return str(codec.tokenizer.decode(ids[:stop], skip_special_tokens=True)).strip()
