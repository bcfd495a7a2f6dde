"""Two answers to one question, in the shapes that files have; what is wrong with them is told by file and line."""

import json
from pathlib import Path
from typing import Any

import pytest

from tunewright.core.errors import Problem
from tunewright.data import lint, preferences
from tunewright.data.formats import read
from tunewright.data.rows import Message, Row, Source

USER, ANSWER = Message("user", "Hi"), Message("assistant", "Hello.")
TURN = {"from": "gpt", "value": "Good."}


def found(tmp_path: Path, *records: Any, **source: Any) -> list[Row | Problem]:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return list(lint.check(read(Source(path, **source))))


def one(tmp_path: Path, record: Any, **source: Any) -> Row:
    (row,) = found(tmp_path, record, **source)
    assert isinstance(row, Row), row
    return row


def fault(tmp_path: Path, record: Any) -> str:
    (problem,) = found(tmp_path, record)
    assert isinstance(problem, Problem)
    assert problem.where.endswith("pairs.jsonl:1")
    return str(problem)


TALK = [{"role": "user", "content": "Hi"}]
GOOD, BAD = {"role": "assistant", "content": "Good."}, {"role": "assistant", "content": "Bad."}
SHAPES = {
    "a prompt and two texts": {"prompt": "Hi", "chosen": "Good.", "rejected": "Bad."},
    "a question and two responses": {"question": "Hi", "response_chosen": "Good.", "response_rejected": "Bad.", "history": []},
    "turns and two turns": {"conversations": [{"from": "human", "value": "Hi"}], "chosen": TURN,
                            "rejected": {"from": "gpt", "value": "Bad."}},
    "a prompt of turns and two lists of one": {"prompt": TALK, "chosen": [GOOD], "rejected": [BAD]},
    "turns and two texts": {"messages": TALK, "chosen": "Good.", "rejected": "Bad."},
    "two conversations": {"chosen": [*TALK, GOOD], "rejected": [*TALK, BAD]},
    "a prompt and two conversations": {"prompt": "Hi", "chosen": [*TALK, GOOD], "rejected": [*TALK, BAD]},
    "conversations by another name": {"chosen_messages": [*TALK, GOOD], "rejected_messages": [*TALK, BAD]},
    "two transcripts": {"chosen": "\n\nHuman: Hi\n\nAssistant: Good.", "rejected": "\n\nHuman: Hi\n\nAssistant: Bad."},
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_the_same_row(tmp_path: Path, shape: str) -> None:
    row = one(tmp_path, SHAPES[shape])
    assert (row.messages, row.chosen, row.rejected) == ((USER,), "Good.", "Bad.")
    assert row.compares and not row.answered


def test_an_answer_of_its_own_stays_beside_the_two(tmp_path: Path) -> None:
    row = one(
        tmp_path,
        {"instruction": "Hi", "input": "", "output": "Hello.", "chosen": "Good.", "rejected": "Bad."},
    )
    assert row.messages == (USER, ANSWER)
    assert row.prompt == (USER,)
    assert row.answering(row.chosen) == Row(row.where, (USER, Message("assistant", "Good.")))


def test_a_system_turn_earlier_turns_and_tools_belong_to_the_question(tmp_path: Path) -> None:
    tools = '[{"name": "weather"}]'
    row = one(tmp_path, {"system": "Be brief.", "history": [["a", "b"]], "question": "c", "tools": tools,
                         "response_chosen": "d", "response_rejected": "e"})  # fmt: skip
    assert [(m.role, m.content) for m in row.messages] == [
        ("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c")]  # fmt: skip
    assert row.tools == tools


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    columns = (("prompt", "q"), ("chosen", "better"), ("rejected", "worse"))
    row = one(tmp_path, {"q": "Hi", "better": "Good.", "worse": "Bad."}, columns=columns)
    assert (row.messages, row.chosen, row.rejected) == ((USER,), "Good.", "Bad.")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"rejected": "Good. "}, "are the same"),
        ({"rejected": ""}, "the rejected answer is empty"),
        ({"chosen": " \n"}, "the chosen answer is only white space"),
        ({"rejected": None}, "field 'rejected' is null"),
        ({"rejected": 3}, "field 'rejected' is a number"),
        ({"chosen": [*TALK, GOOD], "rejected": [{"role": "user", "content": "Hey"}, BAD]}, "part at turn 1"),
        ({"chosen": [*TALK, GOOD], "rejected": [*TALK, BAD, *TALK, BAD]}, "part at turn 2"),
        ({"chosen": [*TALK, GOOD, *TALK], "rejected": [*TALK, GOOD, *TALK]}, "ends with a turn of user"),
        ({"chosen": "bad \x00 character"}, "the chosen answer holds the control character U+0000"),
    ],
)
def test_what_is_wrong_is_told(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    assert said in fault(tmp_path, {"prompt": "Hi", "chosen": "Good.", "rejected": "Bad.", **changed})


def test_a_side_that_is_missing_is_told(tmp_path: Path) -> None:
    assert "field 'chosen' is missing" in fault(tmp_path, {"prompt": "Hi", "rejected": "Bad."})


def test_answers_without_a_question_are_told(tmp_path: Path) -> None:
    assert "have no question" in fault(tmp_path, {"chosen": "Good.", "rejected": "Bad."})


def test_the_same_pair_twice_is_told_and_another_choice_is_not(tmp_path: Path) -> None:
    pair = {"prompt": "Hi", "chosen": "Good.", "rejected": "Bad."}
    kinds = [type(row) for row in found(tmp_path, pair, pair, {**pair, "rejected": "Worse."})]
    assert kinds == [Row, Problem, Row]


def test_transcripts_keep_what_speakers_write() -> None:
    text = "\n\nHuman: One\n\nstill one\n\nAssistant: Two: a\n\nHuman: Three\n\nAssistant:"
    assert [(m.role, m.content) for m in preferences.transcript(text)] == [
        ("user", "One\n\nstill one"), ("assistant", "Two: a"), ("user", "Three"), ("assistant", "")]  # fmt: skip
    assert preferences.transcript("Human: no") == []


@pytest.mark.parametrize(("label", "liked"), [(True, True), (False, False), ("yes", None)])
def test_a_verdict_is_read(tmp_path: Path, label: Any, liked: bool | None) -> None:
    row = one(tmp_path, {"messages": [*TALK, GOOD], "label": label})
    assert row.liked is liked
