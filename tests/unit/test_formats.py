"""Every shape of row that is read, every bad one with its file:line, and folders of datasets."""

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunewright.core.errors import DataError, Problem
from tunewright.data import lint, readers
from tunewright.data.formats import read, sources
from tunewright.data.rows import Message, Row, Source

ALPACA = {"instruction": "Add", "input": "1 and 2", "output": "3"}
USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(path: Path, **settings: object) -> list[Row | Problem]:
    return list(read(Source(path, **settings)))


def one(tmp_path: Path, row: object, **settings: object) -> Row:
    (found,) = rows_of(write(tmp_path / "d.jsonl", row), **settings)
    assert isinstance(found, Row), found
    return found


def bad(tmp_path: Path, row: object, **settings: object) -> str:
    """The problem of a row on line 2, after a good one; without the folder's name."""
    good = {"messages": [USER, ASSISTANT]}
    found = rows_of(write(tmp_path / "d.jsonl", good, row), **settings)[1]
    assert isinstance(found, Problem), found
    assert found.where == f"{tmp_path}/d.jsonl:2"
    return str(found).removeprefix(f"{tmp_path}/")


def said(row: Row) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in row.messages]


def refused(source: Source) -> str:
    with pytest.raises(DataError) as caught:
        read(source)
    return str(caught.value)


def unexpanded(*paths: Path) -> str:
    with pytest.raises(DataError) as caught:
        sources(map(Source, paths))
    return str(caught.value)


# Shapes


def test_alpaca(tmp_path: Path) -> None:
    row = one(tmp_path, ALPACA)
    assert said(row) == [("user", "Add\n\n1 and 2"), ("assistant", "3")]
    assert row.where == f"{tmp_path}/d.jsonl:1"


def test_alpaca_system_history_tools_and_family(tmp_path: Path) -> None:
    extra = {"system": "Be brief", "history": [["a", "b"]], "tools": [{"name": "加"}], "family": "math"}
    row = one(tmp_path, {**ALPACA, "input": None, **extra})
    asked = [("system", "Be brief"), ("user", "a"), ("assistant", "b"), ("user", "Add"), ("assistant", "3")]
    assert said(row) == asked
    assert (row.tools, row.family) == ('[{"name": "加"}]', "math")


def test_sharegpt_roles(tmp_path: Path) -> None:
    names = ("system", "human", "function_call", "observation", "gpt", "user", "chatgpt", "tool", "bot")
    turns = [{"from": name, "value": name} for name in names]
    roles = ["system", "user", "assistant", "tool", "assistant", "user", "assistant", "tool", "assistant"]
    assert [role for role, _ in said(one(tmp_path, {"conversations": turns}))] == roles


def test_sharegpt_system_field_goes_first_but_not_twice(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    row = one(tmp_path, {"system": "s", "conversations": turns, "tools": "[]"})
    assert said(row) == [("system", "s"), ("user", "q"), ("assistant", "a")]
    assert row.tools == "[]"
    row = one(tmp_path, {"system": "s", "conversations": [{"from": "system", "value": "own"}, *turns]})
    assert said(row)[0] == ("system", "own")


def test_messages_in_parts(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "value": "two"}]
    row = one(tmp_path, {"messages": [{"role": "user", "content": parts}, ASSISTANT]})
    assert said(row) == [("user", "one two"), ("assistant", "hello")]


@pytest.mark.parametrize(
    ("prompt", "response"),
    [
        ("prompt", "completion"),
        ("question", "answer"),
        ("instruction", "response"),
        ("prompt", "response"),
        ("问", "答"),
        ("prompt", "output"),
    ],
)
def test_pairs(tmp_path: Path, prompt: str, response: str) -> None:
    assert said(one(tmp_path, {prompt: "q", response: "a"})) == [("user", "q"), ("assistant", "a")]


def test_text(tmp_path: Path) -> None:
    assert one(tmp_path, {"text": "words", "family": "web"}) == Row(
        f"{tmp_path}/d.jsonl:1", text="words", family="web"
    )


def test_format_overrules_detection(tmp_path: Path) -> None:
    assert one(tmp_path, {**ALPACA, "text": "words"}, format="text").text == "words"
    both = {"question": "q", "answer": "a", "messages": [USER, ASSISTANT]}
    assert said(one(tmp_path, both, format="prompt-completion"))[0] == ("user", "q")


def test_columns_overrule_names(tmp_path: Path) -> None:
    columns = (("prompt", "Question"), ("response", "Best Answer"))
    row = one(tmp_path, {"Question": "q", "Best Answer": "a"}, columns=columns)
    assert said(row) == [("user", "q"), ("assistant", "a")]
    assert one(tmp_path, {"body": "words"}, columns=(("text", "body"),)).text == "words"
    assert said(one(tmp_path, {"chat": [USER, ASSISTANT]}, columns=(("messages", "chat"),))) == [
        ("user", "hi"),
        ("assistant", "hello"),
    ]


def test_a_column_taken_by_the_mapping_is_not_used_twice(tmp_path: Path) -> None:
    columns = (("prompt", "input"), ("response", "target"))
    assert said(one(tmp_path, {"input": "q", "target": "a"}, format="alpaca", columns=columns))[0] == (
        "user",
        "q",
    )


def test_tags_overrule_keys_and_roles(tmp_path: Path) -> None:
    tags = (("role_tag", "who"), ("content_tag", "says"), ("user_tag", "gpt"), ("assistant_tag", "Bob"))
    turns = [{"who": "gpt", "says": "q"}, {"who": "Bob", "says": "a"}]
    assert said(one(tmp_path, {"conversations": turns}, tags=tags)) == [("user", "q"), ("assistant", "a")]


def test_a_preference_row_with_an_answer_of_its_own_is_a_row(tmp_path: Path) -> None:
    assert said(one(tmp_path, {**ALPACA, "chosen": "3", "rejected": "4"}))[-1] == ("assistant", "3")


# Bad rows


WRONG = [
    ({**ALPACA, "output": 3}, "field 'output' is a number, expected text; fix: mend the row"),
    ({**ALPACA, "output": None}, "field 'output' is null, expected text; fix: mend the row"),
    ({**ALPACA, "output": True}, "field 'output' is true or false, expected text; fix: mend the row"),
    ({**ALPACA, "input": ["x"]}, "field 'input' is a list, expected text; fix: mend the row"),
    (
        {"instruction": "x"},
        "field 'output' is missing, expected text; fix: add the field or map it with columns",
    ),
    ({"prompt": "x"}, "field 'completion or answer or response or 答 or output' is missing, expected text"),
    ({**ALPACA, "history": "no"}, "field 'history' is text, expected a list"),
    ({**ALPACA, "history": [["q"]]}, "field 'history[0]' is a list, expected a list of question and answer"),
    ({**ALPACA, "history": [["q", 1]]}, "field 'history[0]' is a number, expected text"),
    ({**ALPACA, "tools": 5}, "field 'tools' is a number, expected a list or its JSON text"),
    ({**ALPACA, "family": 5}, "field 'family' is a number, expected text"),
    (
        {"messages": [{"role": "user", "content": [{"type": [["image"]]}]}]},
        "field 'messages[0].content[0]' is of type 'a list', expected 'text'",
    ),
    ({**ALPACA, "system": 5}, "field 'system' is a number, expected text"),
    ({"messages": None}, "field 'messages' is null, expected a list"),
    ({"messages": "hi"}, "field 'messages' is text, expected a list"),
    ({"messages": ["hi"]}, "field 'messages[0]' is text, expected an object"),
    ({"messages": [{"role": "user"}]}, "field 'messages[0].content' is missing, expected text"),
    ({"messages": [USER, {"role": "assistant", "content": None}]}, "field 'messages[1].content' is null"),
    ({"conversations": [{"value": "x"}]}, "field 'conversations[0].from' is missing, expected text"),
    (
        {"messages": [{"role": "asistant", "content": "x"}]},
        "field 'messages[0].role' is 'asistant', expected a known role; fix: did you mean 'assistant'?",
    ),
    (
        {"messages": [USER, {**ASSISTANT, "tool_calls": [{}]}]},
        "field 'messages[1].tool_calls' is not supported",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "field 'messages[0].content[0]' is of type 'image_url', expected 'text':"
        " multimodal content is not supported",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "reasoning", "value": "x"}]}]},
        "field 'messages[0].content[0]' is of type 'reasoning', expected 'text'; fix: write it into the text",
    ),
    (
        {"messages": [{"role": "user", "content": ["x"]}]},
        "field 'messages[0].content[0]' is text, expected an object",
    ),
    (
        {"messages": [{"role": "user", "content": [{"text": 1}]}]},
        "field 'messages[0].content[0].text' is a number",
    ),
    ({"messages": [USER, ASSISTANT], "images": ["1.jpg"]}, "images: multimodal content is not supported"),
    (
        {"messages": [USER], "chosen": "a"},
        "field 'rejected' is missing, expected an answer beside the other one",
    ),
    (
        {"chosen": "a", "rejected": "b"},
        "the answers have no question; fix: give both answers to one question",
    ),
    ({"text": "a", "label": 1.5}, "field 'label' is a number, expected the name or the number of a class"),
    (
        {"prompt": "q", "chosen": "a", "rejected": "b", "margin": "x"},
        "field 'margin' is text, expected a number",
    ),
    ({"text": 1.5}, "field 'text' is a number, expected text"),
    ({"titel": "x", "body": "y"}, "no known field; found 'titel', 'body', expected instruction and output"),
    ({}, "no known field; found none"),
    (["a"], "the row is a list, expected an object; fix: write each row as {...}"),
    ("words", "the row is text, expected an object"),
    (None, "the row is null, expected an object"),
]


@pytest.mark.parametrize(("row", "what"), WRONG)
def test_a_bad_row_is_named(tmp_path: Path, row: object, what: str) -> None:
    assert bad(tmp_path, row).startswith(f"d.jsonl:2: {what}")


def test_a_mapped_column_that_no_row_has(tmp_path: Path) -> None:
    found = bad(tmp_path, {"prompt": "q"}, format="prompt-completion", columns=(("response", "anser"),))
    assert found.startswith("d.jsonl:2: field 'anser' is missing, expected text")


# Files


def test_jsonl_keeps_line_numbers_over_blank_and_broken_lines(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    good = json.dumps(ALPACA).encode()
    path.write_bytes(b"\xef\xbb\xbf" + good + b"\r\n\n{broken\n" + b'{"text": "\xff"}\n' + good)
    found = rows_of(path)
    assert [item.where for item in found] == [f"{path}:{line}" for line in (1, 3, 4, 5)]
    assert str(found[1]).startswith(f"{path}:3: not JSON: Expecting property name")
    assert str(found[2]) == f"{path}:4: byte 0xff is not UTF-8; fix: save the file as UTF-8"


def test_json_numbers_and_depth_that_python_refuses(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("9" * 5000 + "\n" + "[" * 100_000 + "\n")
    assert [str(item)[len(str(path)) :][:3] for item in rows_of(path)] == [":1:", ":2:"]


def test_a_json_array_gives_each_row_its_first_line(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text(
        "\ufeff" + json.dumps([ALPACA, {"text": "a\nb"}, {"text": 1}], indent=2), encoding="utf-8"
    )
    assert [item.where for item in rows_of(path)] == [f"{path}:{line}" for line in (2, 7, 10)]


def test_a_json_array_that_breaks_off(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    for text, what in (
        ('[\n{"text": "a"},\n', "2: not JSON: the file ends too early"),
        ('[\n{"text": "a"}\n{"text": "b"}]', "3: not JSON: expected ',' or ']' after a row"),
        ('[\n{"text": "a"}]\n]', "3: not JSON: text after the closing ']'"),
        ('[\n{"text": "a"},\n' + "[" * 100_000, "3: not JSON"),
    ):
        path.write_text(text)
        row, problem = rows_of(path)
        assert isinstance(row, Row)
        assert str(problem).startswith(f"{path}:{what}")


def test_a_json_row_that_is_not_utf8_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_bytes(b'[{"text": "a"},\n{"text":\n"\xe9"},\n{"text": "\xe4\xb8\xad"}]')
    first, second, third = rows_of(path)
    assert str(second).startswith(f"{path}:3: byte 0xe9 is not UTF-8")
    assert first == Row(f"{path}:1", text="a")
    assert third == Row(f"{path}:4", text="中")


def test_json_that_is_jsonl_or_one_object(tmp_path: Path) -> None:
    path = write(tmp_path / "d.json", {"text": "a"}, {"text": "b"})
    assert rows_of(path) == [Row(f"{path}:1", text="a"), Row(f"{path}:2", text="b")]
    path.write_text(json.dumps({"text": "a"}, indent=2) + "\n" + json.dumps({"text": "b"}, indent=2))
    assert rows_of(path) == [Row(f"{path}:1", text="a"), Row(f"{path}:4", text="b")]


def test_plain_text_is_read_by_paragraph(tmp_path: Path) -> None:
    path = tmp_path / "d.txt"
    path.write_bytes(b"\none\ntwo\n \t\n\nthree\nbad \xff\n\nfour")
    first, second, third = rows_of(path)
    assert first == Row(f"{path}:2", text="one\ntwo", prose=True)
    assert str(second).startswith(f"{path}:7: byte 0xff is not UTF-8")
    assert third == Row(f"{path}:9", text="four", prose=True)


def test_a_long_paragraph_is_cut_at_a_line_end(tmp_path: Path) -> None:
    path = tmp_path / "d.txt"
    path.write_text(("x" * 9999 + "\n") * 10)
    found = [item for item in rows_of(path) if isinstance(item, Row)]
    assert [item.where for item in found] == [f"{path}:1", f"{path}:8"]
    assert "\n".join(item.text for item in found) + "\n" == path.read_text()


def test_txt_that_holds_json_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "d.txt", {"问": "q", "答": "a"})
    (row,) = rows_of(path)
    assert isinstance(row, Row) and said(row) == [("user", "q"), ("assistant", "a")]
    (row,) = rows_of(path, format="plain")
    assert isinstance(row, Row) and row.text.startswith('{"问"')


def test_csv_rows_span_lines(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_bytes(
        b'\xef\xbb\xbfquestion,answer,history\n"a\nb",c,\n\nd,"e ""f""","[[""x"", ""y""]]"\ng\n\xff,h,\ni,,\n'
    )
    found = rows_of(path)
    assert [item.where for item in found] == [f"{path}:{line}" for line in (2, 5, 6, 7, 8)]
    assert isinstance(found[0], Row) and said(found[0]) == [("user", "a\nb"), ("assistant", "c")]
    assert isinstance(found[1], Row) and said(found[1])[:2] == [("user", "x"), ("assistant", "y")]
    assert str(found[2]).startswith(f"{path}:6: 1 cells, expected 3 as in the header")
    assert "byte 0xff" in str(found[3])


def test_csv_with_a_stray_carriage_return(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_bytes(b"text\na\rb\nc\n")
    problem, row = rows_of(path)
    assert str(problem).startswith(f"{path}:2: not CSV: new-line character")
    assert row == Row(f"{path}:3", text="c")


def test_csv_quotes_that_are_not_closed_swallow_no_row(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text('prompt,completion\na,b\nc,"d\ne,"f"\ng,h\ni,"j\nk,l\n')
    (first, broken, second, rest) = rows_of(path)
    assert [said(row)[1][1] for row in (first, second) if isinstance(row, Row)] == ["b", "h"]
    assert str(broken).startswith(f"{path}:3: not CSV from here to line 4: ',' expected after '\"'")
    assert str(rest).startswith(f"{path}:6: not CSV from here to line 7: unexpected end of data")


def test_a_bad_byte_in_csv_costs_its_own_row_only(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_bytes(b'prompt,completion\na,"b\xff\nstill b"\nc,"d" e\nf,"g\xff" h\ni,j\n')
    found = [str(row) if isinstance(row, Problem) else said(row)[0][1] for row in rows_of(path)]
    assert found[0].startswith(f"{path}:2: byte 0xff is not UTF-8")
    assert found[1].startswith(f"{path}:4: not CSV: ")
    assert found[2].startswith(f"{path}:5: byte 0xff is not UTF-8")
    assert found[3:] == ["i"]


@pytest.mark.parametrize(
    ("header", "what"),
    [
        (b"prompt,completion\xff", "byte 0xff is not UTF-8; without a header no row was read"),
        (b'"prompt"s,completion', "without a header no row was read"),
        (b"prompt,completion,completion", "the column 'completion' is there twice; fix: rename one of them"),
    ],
)
def test_a_csv_header_that_is_wrong_makes_no_row_the_header(tmp_path: Path, header: bytes, what: str) -> None:
    path = tmp_path / "d.csv"
    path.write_bytes(header + b"\nq,a\nr,b\n")
    (problem,) = rows_of(path)
    assert str(problem).startswith(f"{path}:1: ")
    assert what in str(problem)


@pytest.mark.parametrize(
    ("array", "what"),
    [
        (pa.array([0, 2**60], pa.timestamp("us")), "date value out of range"),
        (pa.array([0, 2**62], pa.duration("ms")), "too large"),
        (pa.array([b"x", b"\xff"], pa.binary()).view(pa.string()), "invalid start byte"),
    ],
)
def test_a_parquet_value_that_python_cannot_hold(tmp_path: Path, array: pa.Array, what: str) -> None:
    path = tmp_path / "d.parquet"
    pq.write_table(pa.table({"text": ["one", "two"], "when": array}), path)
    row, problem = rows_of(path)
    assert isinstance(row, Row)
    assert str(problem).startswith(f"{path}:2: a row that cannot be read (")
    assert what in str(problem)


def test_parquet_columns_of_one_name_and_bytes_that_changed(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["text", "text"]), path)
    assert [str(row) for row in rows_of(path)] == [
        f"{path}:1: the column 'text' is there twice; fix: rename one of them; no row was read"
    ]
    table = pa.table({"text": ["the words"]})
    pq.write_table(table, path, compression="none", write_page_checksum=True, use_dictionary=False)
    path.write_bytes(path.read_bytes().replace(b"the words", b"the sword"))
    assert "not Parquet that can be read" in str(rows_of(path)[0])


def test_csv_answers_longer_than_the_module_allows(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text("text\n" + "x" * 200_000 + "\n")
    (row,) = rows_of(path)
    assert isinstance(row, Row) and len(row.text) == 200_000


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    rows = [{"messages": [USER, ASSISTANT], "family": None}, {"messages": None, "family": "x"}]
    pq.write_table(pa.Table.from_pylist(rows * 300), path, row_group_size=200)
    found = rows_of(path)
    assert len(found) == 600
    assert found[598] == Row(f"{path}:599", (Message("user", "hi"), Message("assistant", "hello")))
    assert str(found[599]).startswith(f"{path}:600: field 'messages' is null, expected a list")


def test_parquet_with_a_text_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    broken = pa.array([b"a", b"\xff", b"c"]).view(pa.string())
    pq.write_table(pa.table({"text": broken}), path)
    first, second, third = rows_of(path)
    assert (first, third) == (Row(f"{path}:1", text="a"), Row(f"{path}:3", text="c"))
    assert str(second).startswith(f"{path}:2: a row that cannot be read")


def test_damaged_containers_are_problems(tmp_path: Path) -> None:
    parquet = tmp_path / "d.parquet"
    parquet.write_bytes(b"PAR1 nothing PAR1")
    assert str(rows_of(parquet)[0]).startswith(f"{parquet}:1: not Parquet that can be read")
    packed = gzip.compress(b'{"text": "a"}\n' * 100_000)
    for name, data in (("d.jsonl.gz", packed[: len(packed) // 2]), ("e.jsonl.gz", b"not gzip")):
        path = tmp_path / name
        path.write_bytes(data)
        assert "cannot be read from here on" in str(rows_of(path)[-1])
    path = tmp_path / "d.json.gz"
    path.write_bytes(gzip.compress(b'[{"text": "a"}]')[:-9])
    assert "cannot be read" in str(rows_of(path)[-1])


@pytest.mark.parametrize(
    ("name", "data"), [("d.jsonl.gz", '{"text": "a"}'), ("d.json.gz", '[{"text": "a"}]'), ("d.TXT.gz", "a")]
)
def test_gzip(tmp_path: Path, name: str, data: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(data.encode()))
    assert rows_of(path) == [Row(f"{path}:1", text="a", prose=".TXT" in name)]


def test_a_line_without_end_is_one_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "LONGEST_LINE", 1 << 20)
    path = tmp_path / "d.jsonl"
    path.write_text("x" * (3 << 20) + '\n{"text": "a"}\n')
    problem, row = rows_of(path)
    assert str(problem).startswith(f"{path}:1: the line is longer than 1 MB")
    assert row == Row(f"{path}:2", text="a")


# Files that cannot be read at all


def test_an_absent_file_names_its_nearest_sibling(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ALPACA)
    assert refused(Source(tmp_path / "trian.jsonl")).endswith(
        "no such file; fix: did you mean 'train.jsonl'?"
    )
    assert "nor is there a folder" in refused(Source(tmp_path / "no" / "d.jsonl"))
    assert "fix: check the path" in refused(Source(tmp_path / "zzz"))


def test_files_refused_at_the_call(tmp_path: Path) -> None:
    assert "a folder, expected a file" in refused(Source(tmp_path))
    assert "File name too long" in refused(Source(tmp_path / ("x" * 300)))
    (tmp_path / "d.docx").write_text("x")
    assert "unknown extension '.docx'; fix: use .json, .jsonl" in refused(Source(tmp_path / "d.docx"))
    for name, text in (
        ("d.jsonl", ""),
        ("e.jsonl", "\n \n"),
        ("f.json", "[]"),
        ("g.csv", "text\n"),
        ("h.txt", "\n"),
    ):
        (tmp_path / name).write_text(text)
        assert refused(Source(tmp_path / name)).startswith(f"{tmp_path}/{name}: the file is empty")


def test_unknown_names_come_together(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", ALPACA)
    source = Source(path, "alpacca", (("respnse", "x"),), (("rol_tag", "x"),))
    assert refused(source).splitlines() == [
        f"{path}: unknown format 'alpacca'; fix: did you mean 'alpaca'?",
        f"{path}: unknown column 'respnse'; fix: did you mean 'response'?",
        f"{path}: unknown tag 'rol_tag'; fix: did you mean 'role_tag'?",
    ]
    assert "format 'plain' cannot read .jsonl; fix: use format 'text'" in refused(Source(path, "plain"))


# Folders


INFO = {
    "one": {"file_name": "one.json"},
    "chat": {
        "file_name": "chat.json",
        "formatting": "sharegpt",
        "columns": {"messages": "turns", "tools": "functions"},
        "tags": {"role_tag": "who", "content_tag": "says", "user_tag": "me", "assistant_tag": "it"},
    },
    "open": {"file_name": "open.json", "formatting": "openai"},
    "web": {"file_name": "web.jsonl", "columns": {"prompt": "body"}},
    "wiki": {"file_name": "wiki.txt", "columns": {"prompt": "text"}},
    "dpo": {"file_name": "dpo.json", "ranking": True},
    "kto": {"file_name": "dpo.json", "columns": {"kto_tag": "label"}},
    "pictures": {"file_name": "one.json", "columns": {"images": "images"}},
    "remote": {"hf_hub_url": "someone/remote"},
    "gone": {"file_name": "oen.json"},
    "outside": {"file_name": "../secret.json"},
    "odd": {"file_name": "\0.json"},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "data"
    place.mkdir()
    (place / "dataset_info.json").write_text(json.dumps(INFO))
    (place / "one.json").write_text(json.dumps([ALPACA]))
    turns = [{"who": "me", "says": "q"}, {"who": "it", "says": "a"}]
    (place / "chat.json").write_text(json.dumps([{"turns": turns, "functions": "[1]"}]))
    (place / "open.json").write_text(json.dumps([{"messages": [USER, ASSISTANT]}]))
    (place / "dpo.json").write_text(json.dumps([{"prompt": "q", "chosen": "a", "rejected": "b"}]))
    (place / "wiki.txt").write_text("a\n\nb")
    write(place / "web.jsonl", {"body": "words"})
    write(tmp_path / "secret.json", ALPACA)
    return place


def test_a_folder_is_its_supervised_datasets(folder: Path) -> None:
    names = ["one.json", "chat.json", "open.json", "web.jsonl", "wiki.txt"]
    for path in (folder, folder / "dataset_info.json"):
        found = sources([Source(path, weight=2)])
        assert [source.path.name for source in found] == names
        assert {source.weight for source in found} == {2}
    found_rows = [row for source in found for row in read(source)]
    assert all(isinstance(row, Row) for row in found_rows)
    assert [row.text for row in found_rows if isinstance(row, Row) and not row.messages] == [
        "words",
        "a",
        "b",
    ]


def test_named_datasets_carry_their_columns_and_tags(folder: Path) -> None:
    for path in (Path(f"{folder}:chat,one"), Path(f"{folder}/dataset_info.json:chat, one")):
        chat, alpaca = sources([Source(path)])
        assert (chat.path, chat.format) == (folder / "chat.json", "sharegpt")
        assert (alpaca.path, alpaca.format) == (folder / "one.json", "alpaca")
        (row,) = read(chat)
        assert (
            isinstance(row, Row) and said(row) == [("user", "q"), ("assistant", "a")] and row.tools == "[1]"
        )


def test_a_preference_dataset_can_be_named(folder: Path) -> None:
    (source,) = sources([Source(Path(f"{folder}:dpo"))])
    row = next(read(source))
    assert isinstance(row, Row)
    assert row.compares


def test_the_source_overrules_the_list(folder: Path) -> None:
    asked = Source(Path(f"{folder}:web"), "prompt-completion", (("prompt", "body"), ("response", "body")))
    (source,) = sources([asked])
    assert source.format == "prompt-completion"
    assert dict(source.columns) == {"text": "body", "prompt": "body", "response": "body"}


def test_datasets_that_cannot_be_used_come_together(folder: Path) -> None:
    info, fix = folder / "dataset_info.json", f"fix: name a file in {folder}, by its path from there"
    found = unexpanded(
        Path(f"{folder}:on,remote,gone,outside,odd"), folder / "no.json", Path(f"{folder}:dpoo")
    )
    assert found.splitlines() == [
        f"{info}: no dataset is called 'on'; fix: did you mean 'one'?",
        f"{info}: remote: no local file (it names hf_hub_url 'someone/remote');"
        " fix: download it first and set its file_name",
        f"{folder}/oen.json: no such file; fix: did you mean 'open.json'?",
        f"{info}: outside: '../secret.json' leads out of {folder}; {fix}",
        f"{info}: odd: '\\x00.json' holds the control character U+0000; {fix}",
        f"{info}: no dataset is called 'dpoo'; fix: did you mean 'dpo'?",
        f"{folder}/no.json: no such file; fix: did you mean 'one.json'?",
    ]


def test_a_symbolic_link_does_not_lead_out(folder: Path) -> None:
    (folder / "open.json").unlink()
    (folder / "open.json").symlink_to(folder.parent / "secret.json")
    assert f"leads out of {folder}" in unexpanded(Path(f"{folder}:open"))
    (folder / "parts").mkdir()
    (folder / "parts" / "1.json").symlink_to(folder.parent / "secret.json")
    (folder / "dataset_info.json").write_text('{"parts": {"file_name": "parts"}}')
    assert f"leads out of {folder}" in unexpanded(Path(f"{folder}:parts"))


@pytest.mark.parametrize(
    ("info", "what"),
    [
        ("{", "not JSON that can be read"),
        ("[]", "not an object"),
        ('{"a": 1}', "a: not an object, expected an entry"),
        ('{"a": {"file_name": 1}}', "a: file_name is 1, expected text"),
        ('{"a": {"columns": {"prompt": 1}}}', "a: columns is {'prompt': 1}, expected an object of texts"),
        ('{"a": {"tags": []}}', "a: tags is [], expected an object of texts"),
        (
            '{"a": {"file_name": "a.json", "formatting": "alpca"}}',
            "unknown formatting 'alpca'; fix: did you mean",
        ),
        ('{"a": {"hf_hub_url": "x/y"}}', "no dataset with a local file of supervised text"),
    ],
)
def test_a_list_that_is_wrong(tmp_path: Path, info: str, what: str) -> None:
    (tmp_path / "dataset_info.json").write_text(info)
    (tmp_path / "a.json").write_text("[]")
    assert what in unexpanded(tmp_path)


def test_a_plain_folder_is_its_data_files(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.csv", "notes.md", ".hidden.json"):
        (tmp_path / name).write_text("x")
    assert sources([Source(tmp_path, "text")]) == [
        Source(tmp_path / "a.csv", "text"),
        Source(tmp_path / "b.jsonl", "text"),
    ]
    assert "no dataset_info.json here that would list one" in unexpanded(Path(f"{tmp_path}:one"))
    (tmp_path / "empty").mkdir()
    assert "no data file in this folder" in unexpanded(tmp_path / "empty")


def test_a_dataset_may_be_a_folder(folder: Path) -> None:
    (folder / "parts").mkdir()
    write(folder / "parts" / "2.jsonl", ALPACA)
    write(folder / "parts" / "1.jsonl", ALPACA)
    (folder / "dataset_info.json").write_text('{"parts": {"file_name": "parts"}}')
    assert [source.path.name for source in sources([Source(folder)])] == ["1.jsonl", "2.jsonl"]


def test_a_file_stays_as_it_is_if_it_can_be_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a:b.jsonl", ALPACA)
    asked = [Source(path), Source(tmp_path / "no:such")]
    assert sources(asked[:1]) == asked[:1]
    assert "no such file" in unexpanded(asked[1].path)
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert "a pipe or a device, expected a file" in unexpanded(tmp_path / "pipe.jsonl")
    assert "cannot be opened" in unexpanded(tmp_path / ("x" * 300))


# Anything at all


KEYS = ("instruction", "input", "output", "history", "system", "tools", "family", "messages", "conversations")
KEYS += ("text", "prompt", "completion", "chosen", "images", "from", "value", "role", "content", "type")
WORDS = st.sampled_from(("user", "gpt", "text", "image_url", "[]", "[[1]]", "")) | st.text(max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | WORDS, inner, max_size=4)
    ),
    max_leaves=12,
)
CONVERSATION = {"messages": [USER, ASSISTANT], "conversations": [{"from": "human", "value": "x"}]}


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(KEYS), VALUES), max_size=3),
    VALUES,
    st.binary(max_size=12),
    st.integers(0, 99),
)
def test_no_mutated_row_raises(
    tmp_path_factory: pytest.TempPathFactory,
    changes: list[tuple[str, object]],
    value: object,
    noise: bytes,
    at: int,
) -> None:
    rows = [ALPACA | dict(changes), CONVERSATION | dict(changes), dict(changes), value]
    data = "\n".join(map(json.dumps, rows)).encode()
    at = at * len(data) // 100
    place = tmp_path_factory.mktemp("mutated")
    for name, format_ in (
        ("d.jsonl", "auto"),
        ("d.json", "messages"),
        ("d.csv", "auto"),
        ("d.txt", "alpaca"),
    ):
        path = place / name
        path.write_bytes(data + b"\n" + data[:at] + noise + data[at:])
        try:
            items = list(lint.check(read(Source(path, format_))))
        except DataError as error:
            assert "empty" in str(error)
            continue
        assert all(item.where.startswith(f"{path}:") for item in items)


@pytest.mark.parametrize(
    "row",
    [{"prompt": [USER], "completion": [ASSISTANT]}, {"prompt": [USER], "completion": "hello"},
     {"prompt": json.dumps([USER]), "completion": json.dumps([ASSISTANT])},
     {"prompt": [{"from": "human", "value": "hi"}], "completion": [{"from": "gpt", "value": "hello"}]}],
)  # fmt: skip
def test_a_prompt_and_its_answer_may_be_turns(tmp_path: Path, row: object) -> None:
    assert said(one(tmp_path, row)) == [("user", "hi"), ("assistant", "hello")]


def test_a_turn_in_a_prompt_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    told = bad(tmp_path, {"prompt": [USER, {"role": "wizard", "content": "x"}], "completion": "y"})
    assert "field 'prompt[1].role' is 'wizard', expected a known role" in told
    assert "field 'prompt' is a list, expected text" in bad(tmp_path, {"prompt": [1], "completion": "y"})
