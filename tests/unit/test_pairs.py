"""Objectives on two answers: their formulas in float64, TRL's numbers, the model before training as reference."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tunewright import objectives
from tunewright.core.errors import DataError, Problem, RecipeError
from tunewright.data.rows import Message, Row
from tunewright.data.template import ChatCodec
from tunewright.models.likelihood import IGNORED
from tunewright.objectives._pairs import Answers, answers
from tunewright.objectives.dpo import _LOSSES
from tunewright.recipes import plugin_config

PAIRS = [
    ("Hi", "Hello.", "Go away, please."),
    ("What falls from the sky?", "Rain falls.", "Stones"),
    ("1", "2", "three"),
]


def make(name: str, tokenizer: Any, max_length: int = 256, **options: Any) -> Any:
    choice = {"name": name, **options}
    return objectives.create(
        choice, plugin_config("objectives", choice), ChatCodec(tokenizer, max_length=max_length)
    )


def rows(*pairs: tuple[str, str, str]) -> list[Row]:
    return [
        Row(f"a:{i}", (Message("user", q),), chosen=c, rejected=r) for i, (q, c, r) in enumerate(pairs, 1)
    ]


def batch_of(objective: Any) -> Any:
    return objective.collate(list(objective.encode(rows(*PAIRS))))


@torch.no_grad()
def by_hand(model: Any, tokenizer: Any) -> Answers:
    """Log-probabilities of the answers' tokens alone, one conversation at a time, in float64."""
    codec, sides = ChatCodec(tokenizer), []
    for side in (1, 2):
        for pair in PAIRS:
            prompt = codec.prompt((Message("user", pair[0]),))
            whole = codec.encode(Row("", (Message("user", pair[0]), Message("assistant", pair[side]))))
            logs_TV = model(input_ids=torch.tensor([whole.ids])).logits[0].double().log_softmax(-1)
            at = [t for t in range(len(prompt), len(whole.ids)) if whole.learned[t]]
            sides.append((sum(logs_TV[t - 1, whole.ids[t]] for t in at), float(len(at))))
    sums, counts = (torch.stack([torch.as_tensor(x[i], dtype=torch.float64) for x in sides]) for i in (0, 1))
    return Answers(*sums.chunk(2), *counts.chunk(2))


def test_answers_are_as_likely_as_by_hand(tokenizer: Any, make_model: Any) -> None:
    model = make_model()
    found, exact = answers(model, batch_of(make("dpo", tokenizer))), by_hand(model, tokenizer)
    torch.testing.assert_close(found.first_B.double(), exact.first_B, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.second_B.double(), exact.second_B, rtol=1e-5, atol=1e-5)
    assert found.first_tokens_B.tolist() == exact.first_tokens_B.tolist()
    assert found.second_tokens_B.tolist() == exact.second_tokens_B.tolist()


def test_only_the_last_answer_counts(tokenizer: Any) -> None:
    turns = tuple(
        Message(role, text) for role, text in (("user", "a"), ("assistant", "b c d"), ("user", "e"))
    )
    (sample,) = make("dpo", tokenizer).encode([Row("a:1", turns, chosen="f", rejected="g h")])
    batch = make("dpo", tokenizer).collate([sample])
    said = [tokenizer.decode([t for t in row.tolist() if t != IGNORED]) for row in batch["labels"]]
    assert [
        text.removesuffix(tokenizer.decode(ChatCodec(tokenizer).stop_ids[-1:])).strip() for text in said
    ] == ["f", "g h"]


def test_rows_that_cannot_be_compared_are_named(tokenizer: Any) -> None:
    single = Row("a:1", (Message("user", "Hi"), Message("assistant", "Hello.")))
    long = Row("a:2", (Message("user", "Hi"),), chosen="Yes.", rejected="x")
    cut = Row("a:3", (Message("user", "long " * 50),), chosen="Yes.", rejected="No.")
    found = list(make("dpo", tokenizer, max_length=24).encode([single, long, cut]))
    assert [isinstance(item, Problem) for item in found] == [True, False, True]
    assert "expected two to choose from" in found[0].what
    assert "no token of the chosen answer is left within max_length 24" in found[2].what


# Formulas


B = 0.3
LIKELIER = (
    torch.tensor([0.4, -1.0, 3.0], dtype=torch.float64),
    torch.tensor([-0.2, 0.5, 2.0], dtype=torch.float64),
)


def sig(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


FORMULAS: dict[str, tuple[dict[str, Any], Callable[[Tensor, Tensor], Tensor]]] = {
    "sigmoid": ({}, lambda c, r: -torch.log(sig(B * (c - r)))),
    "smoothed": ({"label_smoothing": 0.2},
                 lambda c, r: -0.8 * torch.log(sig(B * (c - r))) - 0.2 * torch.log(sig(-B * (c - r)))),
    "robust": ({"loss": "robust", "label_smoothing": 0.2},
               lambda c, r: (-0.8 * torch.log(sig(B * (c - r))) + 0.2 * torch.log(sig(-B * (c - r)))) / 0.6),
    "hinge": ({"loss": "hinge"}, lambda c, r: (1 - B * (c - r)).clamp_min(0)),
    "ipo": ({"loss": "ipo"}, lambda c, r: (c - r - 1 / (2 * B)) ** 2),
    "apo_zero": ({"loss": "apo_zero"}, lambda c, r: 1 - sig(B * c) + sig(B * r)),
    "apo_down": ({"loss": "apo_down"}, lambda c, r: sig(B * c) + 1 - sig(B * (c - r))),
    "sppo": ({"loss": "sppo"}, lambda c, r: (c - 0.5 / B) ** 2 + (r + 0.5 / B) ** 2),
}  # fmt: skip


@pytest.mark.parametrize("kind", FORMULAS)
def test_the_family_by_its_formulas(tokenizer: Any, kind: str) -> None:
    options, formula = FORMULAS[kind]
    dpo = make("dpo", tokenizer, beta=B, **options)
    torch.testing.assert_close(_LOSSES[dpo.config.loss](dpo.config, *LIKELIER), formula(*LIKELIER))


FOUND = Answers(
    *(torch.tensor(x, dtype=torch.float64) for x in ([-3.0, -8.0], [-9.0, -4.0], [2.0, 4.0], [3.0, 4.0]))
)


def test_length_normalised_is_of_a_token(tokenizer: Any) -> None:
    dpo = make("dpo", tokenizer, beta=B, length_normalised=True)
    dpo._said = {1: (-4.0, -6.0), 2: (-8.0, -8.0)}
    losses_B, chosen_B, rejected_B = dpo.losses(FOUND, {"number": torch.tensor([1, 2])})
    lead_B = torch.tensor([1 / 2 + 3 / 3, 0.0 - 4 / 4], dtype=torch.float64)
    torch.testing.assert_close(losses_B, -logsigmoid(B * lead_B))
    torch.testing.assert_close(chosen_B - rejected_B, B * lead_B)


def test_simpo_by_its_formula(tokenizer: Any) -> None:
    losses_B, *_ = make("simpo", tokenizer, beta=2.0, gamma=0.7).losses(FOUND, {})
    lead_B = torch.tensor([-1.5 + 3, -2 + 1.0], dtype=torch.float64)
    torch.testing.assert_close(losses_B, -torch.log(sig(2 * lead_B - 0.7)))


def test_orpo_by_its_formula(tokenizer: Any) -> None:
    losses_B, *_ = make("orpo", tokenizer, beta=0.4).losses(FOUND, {})
    c, r = (torch.exp(torch.tensor(x, dtype=torch.float64)) for x in ([-1.5, -2.0], [-3.0, -1.0]))
    odds = (c / (1 - c)) / (r / (1 - r))
    torch.testing.assert_close(losses_B, -torch.log(c) - 0.4 * torch.log(sig(torch.log(odds))))


def test_odds_of_certain_answers_are_finite(tokenizer: Any) -> None:
    sums = [torch.tensor([0.0, -1e-9, -500.0], requires_grad=True) for _ in range(2)]
    losses_B, *_ = make("orpo", tokenizer).losses(Answers(*sums, torch.ones(3), torch.ones(3)), {})
    losses_B.sum().backward()
    assert all(torch.isfinite(x).all() for x in (losses_B, *(x.grad for x in sums)))


@pytest.mark.parametrize(
    ("options", "said"),
    [({"loss": "hinge", "label_smoothing": 0.1}, "label_smoothing"), ({"loss": "robust"}, "robust needs"),
     ({"loss": "ipo", "length_normalised": True}, "length_normalised")],
)  # fmt: skip
def test_options_that_contradict_are_refused(tokenizer: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        make("dpo", tokenizer, **options)


VERDICTS = [("Hi", "Hello.", True), ("What falls from the sky?", "Stones", False), ("1", "2", True)]


def verdict_rows() -> list[Row]:
    return [Row(f"a:{i}", (Message("user", q), Message("assistant", a)), liked=liked)
            for i, (q, a, liked) in enumerate(VERDICTS, 1)]  # fmt: skip


def test_kto_by_its_formula(tokenizer: Any, make_model: Any) -> None:
    kto, model = make("kto", tokenizer, beta=0.4, good=1.2, bad=0.8), make_model()
    batch = kto.collate(list(kto.encode(verdict_rows())))
    kto.begin(model, [batch])
    with torch.no_grad():
        before = answers(model, batch)
        for parameter in model.parameters():
            parameter.mul_(1.05)
        after = answers(model, batch)
    likelier_B = after.first_B - before.first_B
    z = float((after.second_B - before.second_B).mean().clamp(min=0))
    expected = [
        1.2 * (1 - sig(0.4 * (r - z))) if liked else 0.8 * (1 - sig(0.4 * (z - r)))
        for r, (*_, liked) in zip(likelier_B, VERDICTS, strict=True)
    ]
    kto.look(model, [batch])
    loss, figures = kto.loss(model, batch)
    assert loss.item() == pytest.approx(float(sum(expected)) / 3, abs=1e-5)
    assert figures["divergence"] == pytest.approx(z, abs=1e-5)


def test_the_divergence_is_of_each_prompt_with_the_answer_before(tokenizer: Any) -> None:
    kto = make("kto", tokenizer)
    batch = kto.collate(list(kto.encode(verdict_rows())))
    stop = tokenizer.decode(ChatCodec(tokenizer).stop_ids[-1:])
    said = [tokenizer.decode(row[row != IGNORED]).removesuffix(stop).strip() for row in batch["labels"]]
    assert said == ["Hello.", "Stones", "2", "2", "Hello.", "Stones"]
    assert batch["liked"].tolist() == [True, False, True]


def test_kto_does_not_depend_on_how_a_batch_is_cut(tokenizer: Any, make_model: Any) -> None:
    kto, model = make("kto", tokenizer), make_model()
    samples = list(kto.encode(verdict_rows()))
    whole, parts = kto.collate(samples), [kto.collate(samples[:1]), kto.collate(samples[1:])]
    kto.begin(model, [whole])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    kto.look(model, [whole])
    together = kto.loss(model, whole)[0].item()
    kto.look(model, parts)
    apart = sum(kto.loss(model, part)[0].item() * kto.weight(part) for part in parts) / 3
    assert apart == pytest.approx(together, abs=1e-6)


def test_rows_without_a_verdict_are_named(tokenizer: Any) -> None:
    found = list(make("kto", tokenizer).encode([*verdict_rows()[:1], *rows(PAIRS[0])]))
    assert [isinstance(item, Problem) for item in found] == [False, True]
    assert "no verdict" in found[1].what


# The reference


def test_before_training_the_model_is_its_own_reference(tokenizer: Any, make_model: Any) -> None:
    dpo, model = make("dpo", tokenizer), make_model()
    loss, figures = dpo.loss(model, batch_of(dpo))
    assert loss.item() == pytest.approx(0.693147, abs=1e-6)
    assert figures["margin"] == 0
    loss.backward()
    assert any(p.grad.abs().sum() > 0 for p in model.parameters() if p.grad is not None)


def test_the_reference_is_the_model_as_it_was(tokenizer: Any, make_model: Any) -> None:
    dpo, model = make("dpo", tokenizer, beta=0.5), make_model()
    batch = batch_of(dpo)
    before = by_hand(model, tokenizer)
    dpo.begin(model, [batch])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    dpo.begin(model, [batch])  # what is known stays
    after = by_hand(model, tokenizer)
    lead_B = (after.first_B - before.first_B) - (after.second_B - before.second_B)
    loss, figures = dpo.loss(model, batch)
    assert loss.item() == pytest.approx(float(-logsigmoid(0.5 * lead_B).mean()), abs=1e-5)
    assert figures["margin"] == pytest.approx(float(0.5 * lead_B.mean()), abs=1e-4)
    other = make("dpo", tokenizer, beta=0.5)
    other.set_state(dpo.state())
    assert other.loss(model, batch)[0].item() == loss.item()


def test_rows_that_came_later_have_no_reference(tokenizer: Any, make_model: Any) -> None:
    dpo, model = make("dpo", tokenizer), make_model()
    dpo.begin(model, [dpo.collate(list(dpo.encode(rows(*PAIRS[:2]))))])
    with pytest.raises(DataError, match="never asked about 1 rows"):
        dpo.loss(model, batch_of(dpo))


def test_state_of_another_kind_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="rollouts"):
        make("dpo", tokenizer).set_state({"rollouts": torch.zeros(1)})
