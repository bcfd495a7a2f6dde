"""What the tests of speed techniques share: batches, a training as techniques see it, a pass that learns."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tunewright.data.tokens import LENGTH
from tunewright.fast import Batch, Portion, Work
from tunewright.models import likelihood

VOCABULARY = 64
SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
         "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}  # fmt: skip
Found = tuple[Tensor, dict[str, Tensor]]


def batch(*lengths: int, seed: int = 0) -> dict[str, Tensor]:
    """Samples of these lengths, right-padded; every other token is learned."""
    torch.manual_seed(seed)
    ids_BT = torch.randint(1, VOCABULARY, (len(lengths), max(lengths)))
    labels_BT = torch.full_like(ids_BT, likelihood.IGNORED)
    for row, length in enumerate(lengths):
        labels_BT[row, 0 : length - 1 : 2] = ids_BT[row, 1:length:2]
        ids_BT[row, length:] = 0
    return {"input_ids": ids_BT, "labels": labels_BT, LENGTH: torch.tensor(lengths)}


def work(model: Any, *batches: Batch, **changed: Any) -> Work:
    """A long training on these batches, at a number of tokens that was given."""
    portion = Portion(64, 64, lambda tokens: 0.0, lambda tokens: None)
    given = {"steps": 1000, "tokens": 100_000, "epochs": 3.0, "folder": Path("unused"), "portion": portion}
    return Work(**{"model": model, "batches": lambda: iter(batches or (batch(9, 12),)), **given, **changed})


def learn(model: Any, given: Batch) -> Found:
    """Losses [N], and the gradients of their weighted mean: no two count the same."""
    model.zero_grad()
    losses_N = likelihood.token_losses(model, given)
    (losses_N * torch.linspace(0.5, 1.5, len(losses_N))).mean().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return losses_N.detach(), found


def assert_near(one: Found, other: Found, share: float = 1e-5) -> None:
    """Losses and gradients differ by no more than such a share of their norm."""
    assert one[1].keys() == other[1].keys()
    for a, b in [(one[0], other[0]), *((one[1][n], g) for n, g in other[1].items())]:
        assert (a - b).norm() <= share * b.norm().clamp_min(1e-6)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self.called.append(function.name())
        given = {x.untyped_storage().data_ptr() for x in _tensors(args)}
        new = (x for x in _tensors(out) if x.untyped_storage().data_ptr() not in given)
        self.largest = max([self.largest, *(x.numel() for x in new)])
        return out


@contextmanager
def watched() -> Iterator[_Watch]:
    """What is computed within: the names of operations, and the numbers in the largest tensor that is made."""
    with _Watch() as watch:
        yield watch
