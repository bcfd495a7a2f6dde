"""Every fault of a row that lint names, and the report on good ones."""

import json
from pathlib import Path

import pytest

from tunewright.core.errors import DataError, Problem
from tunewright.data.lint import LintReport, Spread, Tally, check, lint
from tunewright.data.rows import Message, Row, Source


def talk(*turns: str, where: str = "d.jsonl:3", tools: str = "") -> Row:
    """A conversation from turns such as ``"user: hi"``."""
    pairs = (turn.split(": ", 1) for turn in turns)
    return Row(where, tuple(Message(role, content) for role, content in pairs), tools=tools)


GOOD = [
    talk("user: a", "assistant: b"),
    talk("system: s", "user: a", "assistant: b", "user: c", "assistant: d"),
    talk("user: a", "assistant: call", "tool: 1", "tool: 2", "assistant: b", tools="[]"),
    talk("user: tab\tand\r\nline", "assistant: 中文 é 😀"),
    Row("d.txt:1", text="words"),
]


@pytest.mark.parametrize("row", GOOD)
def test_good_rows_pass_unchanged(row: Row) -> None:
    assert list(check([row])) == [row]


BAD = [
    (Row("d.jsonl:3"), "the row is empty, expected turns or a text; fix: fill it in or leave the row out"),
    (Row("d.jsonl:3", text=" \n"), "the text is only white space; fix: fill it in or leave the row out"),
    (talk("user: a", "assistant:  \t"), "turn 2 (assistant) is only white space, expected text"),
    (talk("user: ", "assistant: b"), "turn 1 (user) is empty, expected text"),
    (
        talk("user: a", "asistant: b"),
        "turn 2 has the unknown role 'asistant'; fix: did you mean 'assistant'?",
    ),
    (talk("assistant: b"), "turn 1 is assistant at the beginning, expected system or user"),
    (talk("system: s", "assistant: b"), "turn 2 is assistant after system, expected user"),
    (talk("user: a", "user: b", "assistant: c"), "turn 2 is user after user, expected assistant"),
    (
        talk("user: a", "assistant: b", "assistant: c"),
        "turn 3 is assistant after assistant, expected user or tool",
    ),
    (talk("user: a", "tool: t", "assistant: b"), "turn 2 is tool after user, expected assistant"),
    (
        talk("user: a", "assistant: b", "tool: t", "user: c"),
        "turn 4 is user after tool, expected assistant or tool",
    ),
    (talk("user: a", "system: s", "assistant: b"), "turn 2 is system after user, expected assistant"),
    (talk("user: a"), "the last turn is user, expected assistant; fix: add the answer or drop the last turn"),
    (talk("user: a", "assistant: b", "tool: t"), "the last turn is tool, expected assistant"),
    (talk("user: a\x07", "assistant: b"), "turn 1 (user) holds the control character U+0007 at character 2"),
    (
        talk("user: a", "assistant: \x7fb"),
        "turn 2 (assistant) holds the control character U+007F at character 1",
    ),
    (
        talk("user: a", "assistant: b\x85"),
        "turn 2 (assistant) holds the control character U+0085 at character 2",
    ),
    (
        talk("user: a\ufffd", "assistant: b"),
        "turn 1 (user) holds the replacement character U+FFFD at character 2",
    ),
    (talk("user: a\ud83d", "assistant: b"), "turn 1 (user) holds the lone surrogate U+D83D at character 2"),
    (talk("user: a", "assistant: b", tools="\0"), "tools holds the control character U+0000 at character 1"),
    (
        Row("d.jsonl:3", text="a", family="b\ud800"),
        "family holds the lone surrogate U+D800 at character 2",
    ),
    (
        talk("user: a", "assistant: b", tools="{"),
        "tools is not JSON that can be read (Expecting property name",
    ),
    (
        talk("user: a", "assistant: b", tools='[{"a": NaN}]'),
        "tools is not JSON that can be read (NaN is no JSON",
    ),
    (
        talk("user: a", "assistant: b", tools='{"a": 1}'),
        "tools is not a list of objects; fix: write the tools as",
    ),
    (talk("user: a", "assistant: b", tools="[1]"), "tools is not a list of objects"),
    (talk("user: a", "assistant: b", tools='[{"a": "\\ud800"}]'), "tools holds the lone surrogate U+D800"),
    (
        talk("user: a", "assistant: b", tools='[{"a": ' + "[" * 99 + "]" * 99 + "}]"),
        "tools is nested deeper than 64 levels",
    ),
    (
        talk("user: a", "assistant: b", tools="[" * 9999),
        "tools is not JSON that can be read (maximum recursion",
    ),
    (
        Row("d.jsonl:3", text="\x1b["),
        "the text holds the control character U+001B at character 1; fix: remove it",
    ),
]


@pytest.mark.parametrize(("row", "what"), BAD)
def test_a_bad_row_is_named(row: Row, what: str) -> None:
    (found,) = check([row])
    assert isinstance(found, Problem)
    assert str(found).startswith(f"d.jsonl:3: {what}")


def test_problems_are_passed_on() -> None:
    problem = Problem("d.jsonl:1", "not JSON")
    assert list(check([problem, GOOD[0]])) == [problem, GOOD[0]]


def test_a_row_that_came_before_is_named_with_its_place() -> None:
    turns = ("user: a", "assistant: b")
    rows = [
        talk(*turns, where="c:/x.json:7"),
        talk("user: a", "assistant: c", where="x:8"),
        talk(*turns, where="y:1", tools="[]"),
        talk(*turns, where="y:2"),
        Row("y:3", text="ab"),
        Row("no line", text="a"),
        Row("y:4", text="a"),
    ]
    found = [str(item) for item in check(rows) if isinstance(item, Problem)]
    assert found == [
        "y:2: same as c:/x.json:7; fix: leave one of them out",
        "y:4: same as no line; fix: leave one of them out",
    ]


def test_prose_may_repeat_itself() -> None:
    rows = [Row(f"d.txt:{line}", text="Chapter", prose=True) for line in (1, 5)]
    assert list(check(rows)) == rows


def test_a_bad_row_is_not_remembered() -> None:
    found = list(check([talk("user: a"), talk("user: a")]))
    assert all("the last turn" in str(item) for item in found)


def test_the_report_counts_rows_over_all_sources(tmp_path: Path) -> None:
    pair = {"instruction": "你好", "input": "", "output": "b" * 1234, "family": "chat"}
    rows = [pair, pair, {"instruction": "q", "output": "a", "system": "s"}, {"output": 1}]
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text("\n".join(map(json.dumps, rows)))
    second.write_text(json.dumps({"text": "word"}) + "\n" + json.dumps(pair))
    report = lint([Source(tmp_path)])
    assert [str(problem).partition(";")[0] for problem in report.problems] == [
        f"{first}:2: same as {first}:1",
        f"{first}:4: field 'prompt or question or instruction or 问' is missing, expected text",
        f"{second}:2: same as {first}:1",
    ]
    assert (report.rows, report.good) == (6, 3)
    assert report.roles == {"user": 2, "assistant": 2, "system": 1}
    assert report.turns == Spread(2, 2, 3, 3)
    assert report.characters == Spread(1, 4, 1230, 1234)
    assert report.cjk == pytest.approx(1 / 3)
    assert report.families == {"chat": 1}
    assert report.lines() == [
        "rows: 6 (3 good, 3 with a problem)",
        "turns: user 2, assistant 2, system 1; per conversation 2 least, 2 median, 3 p95, 3 most",
        "answer characters: 1 least, 4 median, 1230 p95, 1234 most",
        "Chinese, Japanese or Korean: 33% of rows",
        "families: chat 1",
    ]


def test_the_spread_is_that_of_the_sorted_lengths() -> None:
    tally = Tally()
    rows = [Row(f"x:{length}", text="x" * length) for length in range(1, 901)]
    assert list(tally.watch(rows)) == rows
    assert tally.report().characters == Spread(1, 450, 855, 900)


def test_facts_are_json() -> None:
    tally = Tally()
    list(tally.watch(check([talk("user: a", "assistant: b"), Problem("x:1", "bad")])))
    facts = json.loads(json.dumps(tally.facts()))
    assert (facts["rows"], facts["good"], facts["problems"]) == (2, 1, 1)
    assert facts["characters"] == {"smallest": 1, "median": 1, "p95": 1, "largest": 1}


def test_a_report_without_good_rows() -> None:
    report = Tally().report()
    assert report == LintReport(0, 0, (), {}, Spread(), Spread(), 0.0, {})
    assert report.lines() == ["rows: 0 (0 good, 0 with a problem)"]


def test_a_source_that_cannot_be_read_raises(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        lint([Source(tmp_path / "no.jsonl")])
