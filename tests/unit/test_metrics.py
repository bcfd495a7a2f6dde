"""Scores of one answer against its reference, worked out by hand."""

import pytest

from tunewright.core.answers import exact_match, normalised
from tunewright.evaluate.metrics import token_f1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  Four. ", "Four"),
        ("a \n\t b", "a b"),
        ("是的。", "是的"),
        ("ＡＢＣ１２", "ABC12"),
        ("3.14", "3.14"),
        ("Four .", "Four"),
        ("", ""),
    ],
)
def test_normalised(text: str, expected: str) -> None:
    assert normalised(text) == expected


@pytest.mark.parametrize(("answer", "reference"), [("Four.", "Four"), (" a  b ", "a b"), ("好。", "好")])
def test_white_space_and_the_last_full_stop_do_not_matter(answer: str, reference: str) -> None:
    assert exact_match(answer, reference) == 1.0


@pytest.mark.parametrize(
    ("answer", "reference"), [("four", "Four"), ("Four!", "Four"), ("", "Four"), ("3.1", "31")]
)
def test_anything_else_does(answer: str, reference: str) -> None:
    assert exact_match(answer, reference) == 0.0


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("The cat, sat!", "the CAT sat", 1.0),
        ("a b", "b c", 0.5),  # one common word: precision 1/2, recall 1/2
        ("a a a", "a", 0.5),  # a repeated word counts once: precision 1/3, recall 1
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("cat", "", 0.0),
        ("", "", 1.0),
        ("...", "!", 1.0),  # no word on either side
    ],
)
def test_token_f1(answer: str, reference: str, score: float) -> None:
    assert token_f1(answer, reference) == pytest.approx(score)


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("我爱猫", "我爱狗", 2 / 3),  # two of three characters
        ("3个苹果", "5个苹果", 0.75),  # three of four, the number being one word
        ("用Python写", "用Python", 0.8),  # two common words of three and two
    ],
)
def test_a_chinese_character_counts_as_a_word(answer: str, reference: str, score: float) -> None:
    assert token_f1(answer, reference) == pytest.approx(score)
