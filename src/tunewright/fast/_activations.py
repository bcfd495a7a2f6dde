"""What is kept for the backward pass, and how much of it there is room for."""

from itertools import chain
from typing import Any

import torch

from tunewright.core.machine import available_memory
from tunewright.fast import Work
from tunewright.models.memory import storage

_SHARE = 0.5
"""Of the memory that is free, for what decoder blocks keep: the rest is for logits, the loss, what an
operation needs in passing, and what the allocator cannot use again."""


def room(work: Work) -> int:
    """Bytes that activations may take on the model's device, before a training makes its first gradient."""
    trained = (p for p in work.model.parameters() if p.requires_grad)
    gradients = sum(p.numel() * (p.element_size() + 4) for p in trained)  # with the fp32 ones of the masters
    free = available_memory() if work.device.type == "cpu" else _free_on(work.device)
    return max(0, int((free - gradients) * _SHARE))


def _free_on(device: torch.device) -> int:
    cached: int = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return cached + int(torch.cuda.mem_get_info(device)[0])


def lasting(model: Any) -> frozenset[int]:
    """The storages of parameters and buffers: they are there anyhow."""
    return frozenset(map(storage, chain(model.parameters(), model.buffers())))
