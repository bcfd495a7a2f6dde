"""Words of the vocabulary that stand for a judgement, so that a model that judges is still a language model.

No head is added: every method trains, merges and saves such a model as any other, and nothing new has to be loaded.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tunewright.core.errors import Problem, RecipeError
from tunewright.models import likelihood
from tunewright.models.likelihood import IGNORED
from tunewright.objectives import Batch


def first_tokens(tokenizer: Any, words: Sequence[str], where: str) -> list[int]:
    """The token by which each word is told from the others: the first after what all begin with alike.

    Raises:
        RecipeError: two words share it, or there is none.
    """
    spelled = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
    common = 0
    while all(len(ids) > common for ids in spelled) and len({ids[common] for ids in spelled}) == 1 < len(
        words
    ):
        common += 1
    ids = [ids[common] if len(ids) > common else None for ids in spelled]
    if None in ids or len(set(ids)) < len(ids):
        what = f"the tokenizer does not tell {', '.join(map(repr, words))} apart by their first tokens"
        raise RecipeError(Problem(where, what, "choose other words"))
    return [token for token in ids if token is not None]


def at_last(lengths_B: Tensor, width: int) -> Tensor:
    """Labels [B, T] that ask for the state of each row's last token, and for no other."""
    labels_BT = torch.full((len(lengths_B), width), IGNORED)
    labels_BT[torch.arange(len(lengths_B)), lengths_B - 1] = 0
    return labels_BT


def logits(model: Any, batch: Batch, tokens: Sequence[int]) -> Tensor:
    """The words' logits [N, W], fp32, where the batch has labels."""
    rows, made = likelihood.words(model, batch)
    return made(rows)[:, list(tokens)].float()
