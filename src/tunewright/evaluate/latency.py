"""How long a model takes to answer one user: a fixed number of tokens after a fixed prompt, at batch 1."""

import statistics
import time
from typing import Any

import torch

from tunewright.data.rows import Message
from tunewright.data.template import ChatCodec
from tunewright.models import decode
from tunewright.models.announce import announced

TOKENS = 32
_TRIES = 5
_PROMPT = "Tell me in a few sentences what the sea looks like in the morning."


def seconds(model: Any, codec: ChatCodec) -> float:
    """Median of a few times for reading the prompt and writing ``TOKENS`` tokens, whatever they are; one try warms up."""
    messages = (Message("user", _PROMPT),)
    ids = codec.prompt(messages) if codec.has_template else list(codec.tokenizer(_PROMPT)["input_ids"])
    ids_BT = torch.tensor([ids[: max(1, codec.max_length - TOKENS)]], device=model.device)
    model.eval()
    with announced(model, {}):
        return statistics.median([_once(model, codec, ids_BT) for _ in range(_TRIES + 1)][1:])


@torch.no_grad()
def _once(model: Any, codec: ChatCodec, ids_BT: torch.Tensor) -> float:
    mask_BT = torch.ones_like(ids_BT)
    began = time.perf_counter()
    if decode.can(model):
        decode.decode(model, ids_BT, mask_BT, 1, TOKENS, (), decode.greedy)
    else:
        model.generate(
            input_ids=ids_BT, attention_mask=mask_BT, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False,
            use_cache=True, pad_token_id=codec.pad_id,
        )  # fmt: skip
    return time.perf_counter() - began  # decode reads every token, so nothing is left to wait for
