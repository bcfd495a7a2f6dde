"""Objectives that judge: rewards and classes, read from words of the vocabulary."""

from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid

from tunewright import objectives
from tunewright.core.errors import Problem, RecipeError
from tunewright.data.rows import Message, Row
from tunewright.data.template import ChatCodec
from tunewright.objectives._words import first_tokens
from tunewright.recipes import plugin_config

PAIRS = [
    ("Hi", "Hello.", "Go away, please.", 0.0),
    ("What falls from the sky?", "Rain falls.", "Stones", 0.5),
    ("1", "2", "three", 0.0),
]


def make(name: str, tokenizer: Any, max_length: int = 256, **options: Any) -> Any:
    choice = {"name": name, **options}
    return objectives.create(
        choice, plugin_config("objectives", choice), ChatCodec(tokenizer, max_length=max_length)
    )


def pairs() -> list[Row]:
    return [Row("", (Message("user", q),), chosen=c, rejected=r, margin=m) for q, c, r, m in PAIRS]


@torch.no_grad()
def rewards_by_hand(model: Any, tokenizer: Any, words: tuple[str, str]) -> torch.Tensor:
    """One conversation at a time, by way of all logits [2, B]."""
    codec, tokens = ChatCodec(tokenizer), first_tokens(tokenizer, words, "")
    found = []
    for side in (1, 2):
        for pair in PAIRS:
            ids = codec.encode(Row("", (Message("user", pair[0]), Message("assistant", str(pair[side]))))).ids
            last_V = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
            found.append(last_V[tokens[0]] - last_V[tokens[1]])
    return torch.stack(found).view(2, -1)


def test_rewards_are_log_odds_of_the_words_after_the_answer(tokenizer: Any, make_model: Any) -> None:
    reward, model = make("reward", tokenizer, words=("yes", "no"), center=0.3), make_model()
    batch = reward.collate(list(reward.encode(pairs())))
    exact = rewards_by_hand(model, tokenizer, ("yes", "no"))
    torch.testing.assert_close(reward.rewards(model, batch).double(), exact.flatten(), rtol=1e-5, atol=1e-5)
    lead_B, margins_B = exact[0] - exact[1], torch.tensor([pair[3] for pair in PAIRS])
    expected_B = -logsigmoid(lead_B - margins_B) + 0.3 * (exact[0] + exact[1]) ** 2
    loss, figures = reward.loss(model, batch)
    assert loss.item() == pytest.approx(float(expected_B.mean()), rel=1e-5)
    assert figures["accuracy"] == pytest.approx(float((lead_B > 0).double().mean()))
    sure_B = torch.maximum(torch.sigmoid(lead_B), torch.sigmoid(-lead_B))
    assert figures["calibration"] == pytest.approx(float(((lead_B > 0).double() - sure_B).mean()), abs=1e-5)


def test_packed_rewards_are_the_padded_ones(tokenizer: Any, make_model: Any) -> None:
    from tunewright.fast.packing import in_one_row
    from tunewright.models import likelihood

    reward, model = make("reward", tokenizer), make_model()
    batch = reward.collate(list(reward.encode(pairs())))
    plain = reward.rewards(model, batch)
    with likelihood.laid_out_by(model, lambda _, given: in_one_row(given)):
        torch.testing.assert_close(reward.rewards(model, batch), plain, rtol=1e-4, atol=1e-5)


def test_words_that_begin_alike_are_told_apart_by_what_follows(tokenizer: Any) -> None:
    one, other = first_tokens(tokenizer, ("abc x", "abc y"), "objective.words")
    assert one != other
    with pytest.raises(
        RecipeError, match=r"objective\.words: the tokenizer does not tell 'abc', 'abc' apart"
    ):
        first_tokens(tokenizer, ("abc", "abc"), "objective.words")
    with pytest.raises(RecipeError, match="choose other words"):
        first_tokens(tokenizer, ("abc", "abc abc"), "objective.words")


CLASSES = ("rain", "sun", "wind")


def labelled(*labels: str) -> list[Row]:
    return [Row(f"a:{i}", text=f"Text number {i} is here.", label=label) for i, label in enumerate(labels, 1)]


def test_classes_are_the_answers_first_tokens(tokenizer: Any, make_model: Any) -> None:
    classification, model = make("classification", tokenizer, labels=CLASSES), make_model()
    rows = labelled("sun", "rain", "sun")
    batch = classification.collate(list(classification.encode(rows)))
    tokens, expected = first_tokens(tokenizer, CLASSES, ""), []
    for row in rows:
        ids = ChatCodec(tokenizer).prompt((Message("user", row.text),))
        logs_C = model(input_ids=torch.tensor([ids])).logits[0, -1, tokens].double().log_softmax(-1)
        expected.append(-logs_C[CLASSES.index(row.label)])
    assert classification.loss(model, batch)[0].item() == pytest.approx(
        torch.stack(expected).mean().item(), rel=1e-5
    )


def test_a_row_of_no_known_class_is_named(tokenizer: Any) -> None:
    found = list(make("classification", tokenizer, 16, labels=CLASSES).encode(
        [*labelled("sum", ""), Row("a:3", text="long " * 50, label="sun")]
    ))  # fmt: skip
    assert all(isinstance(item, Problem) for item in found)
    assert [item.what for item in found][:2] == [
        "the class 'sum', expected one of rain, sun, wind", "no class, expected one of rain, sun, wind"
    ]  # fmt: skip
    assert "'sun'" in found[0].fix
    assert "at most 16 fit" in found[2].what


def test_precision_recall_and_f1_are_the_means_of_the_classes(tokenizer: Any) -> None:
    """Ten rows: class by class by hand; one that neither came up nor was said does not count."""
    classification = make("classification", tokenizer, labels=(*CLASSES, "snow"))
    real, said = "rrrrrsssww", "rrrssssswr"
    names = {"r": "rain", "s": "sun", "w": "wind"}
    shares = {"loss": 0.7, "accuracy": sum(map(str.__eq__, real, said)) / 10}
    for name in (*CLASSES, "snow"):
        mine = [(names[a] == name, names[b] == name) for a, b in zip(real, said, strict=True)]
        shares |= {f"right.{name}": sum(a and b for a, b in mine) / 10, f"is.{name}": sum(a for a, _ in mine) / 10,
                   f"said.{name}": sum(b for _, b in mine) / 10}  # fmt: skip
    told = classification.told(shares)
    precision, recall = (
        {"rain": 3 / 4, "sun": 3 / 5, "wind": 1 / 1},
        {"rain": 3 / 5, "sun": 3 / 3, "wind": 1 / 2},
    )
    assert told["precision"] == pytest.approx(sum(precision.values()) / 3)
    assert told["recall"] == pytest.approx(sum(recall.values()) / 3)
    f1 = [2 * precision[n] * recall[n] / (precision[n] + recall[n]) for n in precision]
    assert told["f1"] == pytest.approx(sum(f1) / 3)
    assert (told["loss"], told["accuracy"]) == (0.7, 0.7)
