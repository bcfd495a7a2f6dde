"""The built-in corpus and instruction rows: deterministic, correct, kept apart."""

import functools
import itertools
import re
from collections import Counter
from typing import Any, cast

import pytest

from tunewright.data import builtin
from tunewright.data.builtin import corpus, facts, instructions, skills
from tunewright.data.builtin.split import is_held_out
from tunewright.data.builtin.wording import INLINE, LINES, QUESTIONS, RELATION_WEIGHTS

ADDITION = re.compile(
    r"(\d+) ?\+ ?(\d+)|(\d+) plus (\d+)|sum of (\d+) and (\d+)|(\d+)加上?(\d+)|(\d+)与(\d+)的和"
)
SUBTRACTION = re.compile(r"(\d+) ?- ?(\d+)|(\d+) minus (\d+)|(\d+)减去?(\d+)|(\d+)与(\d+)的差")
TAKING = re.compile(r"Taking (\d+) from (\d+)")
SEQUENCE = re.compile(r"\d+(?:, \d+){3,}|\d+(?:、\d+){3,}")
CHINESE = re.compile(r"[\u4e00-\u9fff]")


def _pairs(pattern: re.Pattern[str], text: str) -> list[tuple[int, int]]:
    found = ([int(part) for part in groups if part] for groups in pattern.findall(text))
    return [(a, b) for a, b in found]


def _steps(text: str) -> list[tuple[int, int]]:
    """(start, step) of every sequence shown in ``text``."""
    shown = ([int(term) for term in re.findall(r"\d+", run)] for run in SEQUENCE.findall(text))
    return [(terms[0], terms[1] - terms[0]) for terms in shown]


@functools.cache
def _texts() -> tuple[str, ...]:
    return tuple(corpus.documents(0, 20_000))


@functools.cache
def _asked(split: str) -> tuple[tuple[str, str, str], ...]:
    """(family, question, answer) of every row of a built-in split."""
    found = []
    for row in builtin.rows(f"demo-{split}"):
        user, reply = cast(Any, row["messages"])
        assert (user["role"], reply["role"]) == ("user", "assistant")
        found.append((str(row["family"]), user["content"], reply["content"]))
    return tuple(found)


def _of(family: str) -> list[tuple[bool, str, str]]:
    """(held out, question, answer) of both splits."""
    return [
        (split == "valid", question, answer)
        for split in ("train", "valid")
        for name, question, answer in _asked(split)
        if name.startswith(family)
    ]


def test_documents_are_a_function_of_seed_and_index() -> None:
    texts = list(corpus.documents(3, 50))
    assert texts == list(corpus.documents(3, 50))
    assert texts[41] == corpus.document(3, 41)
    assert texts != list(corpus.documents(4, 50))


def test_rows_are_deterministic() -> None:
    assert list(instructions.rows("train", 0, 100)) == list(instructions.rows("train", 0, 100))
    assert list(instructions.rows("train", 0, 100)) != list(instructions.rows("train", 1, 100))


def test_split_is_stable_and_about_one_in_six() -> None:
    held = [number for number in range(6_000) if is_held_out(f"item:{number}")]
    assert 900 < len(held) < 1_100
    assert held[:5] == [3, 6, 10, 18, 39]


def test_sources_have_their_sizes() -> None:
    assert sum(1 for _ in builtin.rows("pico-corpus-valid")) == 1_000
    assert (len(_asked("train")), len(_asked("valid"))) == (4_000, 400)
    assert next(iter(builtin.rows("pico-corpus"))) == {"text": _texts()[0]}


def test_unknown_source_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        builtin.rows("nothing")


def test_corpus_asks_nothing() -> None:
    assert not [text for text in _texts() if "?" in text or "？" in text]


def test_corpus_has_both_languages() -> None:
    chinese = sum(1 for text in _texts() if CHINESE.search(text))
    assert 0.35 < chinese / len(_texts()) < 0.65


def test_corpus_has_no_held_out_sum_or_difference() -> None:
    text = "\n".join(_texts())
    sums = _pairs(ADDITION, text)
    taken = [(a, b) for b, a in _pairs(TAKING, text)]
    differences = _pairs(SUBTRACTION, text) + taken
    assert min(len(sums), len(differences)) > 5_000
    assert not [pair for pair in sums if is_held_out(skills.addition_key(*pair))]
    assert not [(a, b) for a, b in differences if is_held_out(f"sub:{a}:{b}")]


def test_corpus_has_no_held_out_sequence() -> None:
    shown = _steps("\n".join(_texts()))
    assert len(shown) > 3_000
    assert not [(start, step) for start, step in shown if is_held_out(f"seq:{start}:{step}")]


def test_corpus_has_no_held_out_story() -> None:
    text = "\n".join(_texts())
    owned = re.findall(r"(\w+) has a (\w+) (\w+)\.", text)
    placed = re.findall(r"(\w+) is ((?:in|at|by|on) the \w+)[ .]", text)
    placed = [(name, place) for name, place in placed if name in skills.NAMES["en"]]
    assert min(len(owned), len(placed)) > 500
    assert not [parts for parts in owned if is_held_out("story:" + ":".join(parts))]
    assert not [parts for parts in placed if is_held_out("place:" + ":".join(parts))]


def test_corpus_has_no_held_out_rewriting() -> None:
    text = "\n".join(_texts())
    found = re.findall(r'"(\w+)" (?:for|in place of) "(\w+)"', text)
    lists = re.findall(r"(.+), in reverse order: (.+)", text)
    assert min(len(found), len(lists)) > 100
    assert not [(old, new) for new, old in found if is_held_out(f"replace:{old}:{new}")]
    for source, result in lists:
        assert result.split() == source.split()[::-1]
        assert not is_held_out(skills.order_key("reverse", source.split()))


def test_corpus_calculates_correctly() -> None:
    text = "\n".join(_texts())
    found = re.findall(r"(\d+) ?([+-]) ?(\d+) ?=\s?(\d+)", text)
    assert len(found) > 3_000
    for a, sign, b, c in found:
        assert int(a) + (int(b) if sign == "+" else -int(b)) == int(c)


def test_facts_are_stated_both_ways() -> None:
    stated = set(
        itertools.chain.from_iterable(
            statement for pool in corpus._statements("en", True).values() for statement in pool
        )
    )
    assert {"Paris is the capital of France.", "The capital of France:\nParis"} <= stated


def test_rows_repeat_no_question() -> None:
    questions = [question for _, question, _ in _asked("train") + _asked("valid")]
    assert len(set(questions)) == len(questions)


def test_questions_and_answers_are_clean() -> None:
    for _, question, answer in _asked("train") + _asked("valid"):
        assert answer
        assert answer == answer.strip()
        assert question == question.strip()
        assert question.isprintable()


def test_families_have_equal_shares() -> None:
    for split, each in (("train", 400), ("valid", 40)):
        shares = Counter(family for family, _, _ in _asked(split))
        assert shares == dict.fromkeys(instructions.FAMILIES, each)


def test_arithmetic_rows_are_right_and_on_their_side() -> None:
    for held, question, answer in _of("arithmetic"):
        a, b = (int(number) for number in re.findall(r"\d+", question))
        added = bool(re.search(r"\+|plus|加", question))
        assert int(answer) == (a + b if added else a - b)
        key = skills.addition_key(a, b) if added else f"sub:{a}:{b}"
        assert is_held_out(key) == held


def test_sequence_rows_are_right_and_on_their_side() -> None:
    for held, question, answer in _of("sequence"):
        terms = [int(term) for term in re.findall(r"\d+", question)]
        start, step = terms[0], terms[1] - terms[0]
        assert [*terms, int(answer)] == [start + step * i for i in range(len(terms) + 1)]
        assert is_held_out(f"seq:{start}:{step}") == held


def test_replaced_words_are_right_and_on_their_side() -> None:
    for held, question, answer in _of("rewrite"):
        words = re.findall(r'"(\w+)"|“(\w+)”', question)
        if not words:
            continue
        one, other = ("".join(word) for word in words)
        old, new = (other, one) if one in answer else (one, other)
        assert answer.replace(new, old) in question
        assert is_held_out(f"replace:{old}:{new}") == held


def test_story_answers_are_copied_from_the_story() -> None:
    for _, question, answer in _of("story"):
        story = re.split(r"(?<=[.。])", question)[:-1]
        assert answer in "".join(story)


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_fact_entities_are_on_one_side(lang: str) -> None:
    train, valid = facts.split_facts(lang, False), facts.split_facts(lang, True)
    for relation in RELATION_WEIGHTS:
        sides = [{fact.key for fact in side[relation]} for side in (train, valid)]
        assert all(sides)
        assert sides[0].isdisjoint(sides[1])


def test_every_relation_has_wordings() -> None:
    for key in itertools.product(RELATION_WEIGHTS, ("en", "zh")):
        assert len(set(INLINE[key] + LINES[key])) >= 8
        assert len(set(QUESTIONS[key])) >= 4


def test_question_wordings_are_not_in_the_corpus() -> None:
    text = "\n".join(_texts())
    for _, question, _ in _asked("valid"):
        assert question not in text


def test_facts_are_unique_and_not_empty() -> None:
    raw = facts.raw()
    for table in ("countries", "elements", "words", "animals"):
        for column in ("en", "zh"):
            names = [row[column] for row in raw[table]]
            assert len(set(names)) == len(names)
        assert all(str(value).strip() for row in raw[table] for value in row.values())
    for column in ("capital_en", "capital_zh"):
        assert len({row[column] for row in raw["countries"]}) == len(raw["countries"])
    for column in ("symbol", "number"):
        assert len({row[column] for row in raw["elements"]}) == len(raw["elements"])


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_each_antonym_is_in_one_pair(lang: str) -> None:
    words = [word for pair in facts.raw()[f"antonyms_{lang}"] for word in pair]
    assert len(set(words)) == len(words)
    assert all(words)
