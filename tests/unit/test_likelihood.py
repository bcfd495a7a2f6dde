"""What a model makes of tokens, looked at without changing what it makes of the next."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tunewright.models import likelihood
from tunewright.models.announce import announced, listening


def batch() -> dict[str, Tensor]:
    torch.manual_seed(0)
    ids_BT = torch.randint(5, 100, (3, 9))
    return {"input_ids": ids_BT, "labels": torch.nn.functional.pad(ids_BT[:, 1:], (0, 1), value=-100)}


def test_a_model_that_was_looked_at_before_draws_the_same_dropout(make_model: Any) -> None:
    """A run that goes on finds out anew where its model ends, in another step than the run that was not stopped."""
    model = make_model().train()
    model.model.layers[0].mlp.register_forward_hook(
        lambda m, args, out: torch.nn.functional.dropout(out, 0.5, m.training)
    )
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(likelihood.words(model, batch())[0])
    assert torch.equal(*found)
    assert model.training


def test_few_labels_have_the_losses_that_all_have_and_no_more_logits(make_model: Any) -> None:
    """So that to compare two ways of a large vocabulary takes less memory than training does."""
    model, given, seen = make_model().eval(), batch(), []
    given["input_ids"], given["labels"] = (x.repeat(1, 30) for x in given.values())
    model.lm_head.register_forward_hook(lambda m, args, out: seen.append(out.shape[:-1].numel()))
    few = likelihood.thinned(given)
    chosen = few["labels"] != likelihood.IGNORED
    assert chosen.sum() == 120
    assert chosen.any(1).all()
    kept = chosen[given["labels"] != likelihood.IGNORED]
    with torch.no_grad():
        torch.testing.assert_close(
            likelihood.looked_through(model, few).losses_N, likelihood.plain(model, given)[kept]
        )
    assert seen == [120 + 1, 3 * 9 * 30]  # large ones besides; the plain way makes all


def test_what_listens_hears_of_the_rows_that_go_through(make_model: Any) -> None:
    class Listener:
        batch: Any = {}

    model, listener, seen = make_model(), Listener(), []
    model.model.register_forward_hook(
        lambda m, args, out: seen.append((len(out[0]), len(listener.batch["input_ids"])))
    )
    with listening(model, listener), announced(model, batch()):
        likelihood.words(model, batch())
    assert seen == [(3, 3), (3, 3)]


@pytest.mark.parametrize(
    ("most", "numbers"),
    [("_AT_ONCE", lambda vocabulary: 5), ("_LOGITS", lambda vocabulary: 5 * vocabulary + 1)],
)
def test_losses_in_parts_are_those_of_all_logits_and_make_few_at_a_time(
    make_model: Any, monkeypatch: pytest.MonkeyPatch, most: str, numbers: Any
) -> None:
    model, seen = make_model().eval(), []
    monkeypatch.setattr(likelihood, most, numbers(model.config.vocab_size))
    with torch.no_grad():
        whole = likelihood.plain(model, batch())
        model.lm_head.register_forward_hook(lambda m, args, out: seen.append(out.shape[:-1].numel()))
        torch.testing.assert_close(likelihood.in_parts(model, batch()), whole)
    assert seen[-5:] == [5, 5, 5, 5, 4]
    assert max(seen) == 5


def test_a_model_that_caps_its_logits_keeps_its_own_losses(make_model: Any) -> None:
    model = make_model().eval()
    plain = model.forward

    def capped(*args: Any, **more: Any) -> Any:
        out = plain(*args, **more)
        out.logits = torch.tanh(out.logits)
        return out

    model.forward = capped
    with torch.no_grad():
        torch.testing.assert_close(
            likelihood.in_parts(model, batch()), likelihood.plain(model, batch()), rtol=0, atol=0
        )
