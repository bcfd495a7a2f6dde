"""NEFTune: uniform noise on embeddings while training (Jain et al. 2023, arXiv:2310.05914, algorithm 1)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tunewright.data.tokens import LENGTH
from tunewright.models.likelihood import IGNORED


@contextmanager
def on_embeddings(model: Any, alpha: float, batch: Mapping[str, Tensor]) -> Iterator[None]:
    """Within, a training model's embeddings are moved by up to alpha / sqrt(tokens of the sample x width)."""
    if not alpha or not model.training:
        yield
        return
    lengths_B = batch.get(LENGTH)
    if lengths_B is None:
        lengths_B = (batch["labels"] != IGNORED).sum(
            1
        )  # a batch by hand says no lengths: what is learned stands for it

    def moved(_: Any, given: Any, states_BTD: Tensor) -> Tensor:
        reach_B = alpha / (lengths_B.to(states_BTD) * states_BTD.shape[2]).sqrt()
        noise_BTD = torch.empty_like(states_BTD).uniform_(-1, 1)
        if len(states_BTD) == len(reach_B):
            return states_BTD + noise_BTD * reach_B[:, None, None]
        reach_M = reach_B.repeat_interleave(
            lengths_B.to(reach_B.device)
        )  # samples one after another in one row
        left = states_BTD.shape[1] - len(reach_M)
        return states_BTD + noise_BTD * torch.nn.functional.pad(reach_M, (0, left))[None, :, None]

    hook = model.get_input_embeddings().register_forward_hook(moved)
    try:
        yield
    finally:
        hook.remove()
