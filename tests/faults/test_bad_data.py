"""Rows and files damaged in every way the seed finds: each row becomes a sample or a problem with its line."""

import csv
import gzip
import io
import json
import random
import re
import subprocess
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tunewright.core.errors import DataError, Problem
from tunewright.data import formats, lint, prepare
from tunewright.data.rows import Row, Source
from tunewright.data.template import ChatCodec
from tunewright.data.tokens import ORIGIN, Mixture, Sample
from tunewright.objectives import Objective, pretrain, sft
from tunewright.recipes import DataConfig

Json = dict[str, Any]
Mutate = Callable[[random.Random, Json], object]

ROWS_A_FILE = 40
TEMPLATES = ("auto", "auto", "chatml", "llama3", "llama2", "alpaca", "vicuna", "plain")
SPECIAL = (
    "<|end|>",
    "<|assistant|>",
    "<|im_end|>",
    "<|eot_id|>",
    "</s>",
    "[INST]",
    "{{ 7 * 7 }}",
    "{% if %}",
)
CHARACTERS = (
    *(
        "\0",
        "\x01",
        "\x1b[31m",
        "\x7f",
        "\x85",
        "\x0b",
        "\x0c",
        "\ud800",
        "\udcff",
        "\ufeff",
        "\ufffd",
        "\ufffe",
    ),
    *(
        "\u202e",
        "\u2066",
        "\u200b",
        "\u2028",
        "\u2029",
        "\r",
        "\n",
        "\t",
        "\U0010ffff",
        "\u2060tunewright\u2060",
    ),
)
NO_JSON = ("@deep@", "@huge@", "@wide@")
"""Places for JSON that Python cannot write."""
ODD = (
    None,
    True,
    0,
    -1,
    1e308,
    float("nan"),
    float("inf"),
    "",
    " ",
    [],
    {},
    [[]],
    [{}],
    [None],
    {"a": {"b": []}},
    *NO_JSON,
)
TOOLS = ("{", "[", "5", "null", '"x"', "{}", "[1]", "[[]]", '[{"a": NaN}]', '["\\ud800"]', '[{"a": "\\ud800"}]', "@deep@",
         "[]", '[{"name": "f"}]', '[{"type": "function", "function": {"name": 1}}]', "\0", "NaN", "[{}]")  # fmt: skip


# Good rows, each with a mark of its own


def alpaca(i: int) -> Json:
    return {"instruction": f"Add #{i}#", "input": "1 and 2", "output": f"It is {i}."}


def sharegpt(i: int) -> Json:
    turns = [("human", f"Who #{i}#?"), ("gpt", "I."), ("human", "And now?"), ("gpt", f"Still {i}.")]
    return {"conversations": [{"from": who, "value": what} for who, what in turns]}


def messages(i: int) -> Json:
    turns = [("system", "Be brief."), ("user", f"Say #{i}#"), ("assistant", f"{i}")]
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def pair(i: int) -> Json:
    return {"prompt": f"Which #{i}#?", "completion": f"That {i}."}


def text(i: int) -> Json:
    return {"text": f"Once there were #{i}# of them."}


SHAPES = (alpaca, sharegpt, messages, pair, text)


# What is done to a row


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container with a key of it."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


def _words(row: Json) -> list[tuple[Any, Any]]:
    return [(holder, key) for holder, key in _places(row) if isinstance(holder[key], str)]


def wrong_type(r: random.Random, row: Json) -> object:
    holder, key = r.choice(list(_places(row)))
    holder[key] = r.choice(ODD)
    return row


def missing(r: random.Random, row: Json) -> object:
    holder, key = r.choice(list(_places(row)))
    del holder[key]
    return row


def renamed(r: random.Random, row: Json) -> object:
    holder, key = r.choice([p for p in _places(row) if isinstance(p[0], dict)])
    holder[r.choice(("Output", "answer", "role", "text", "\ud800", "", "a\nb", "x" * 300))] = holder.pop(key)
    return row


def extra(r: random.Random, row: Json) -> object:
    keys = (
        "system",
        "history",
        "tools",
        "family",
        "images",
        "chosen",
        "text",
        "messages",
        "tool_calls",
        "type",
        "x",
    )
    holder = r.choice([row, *(h for h, _ in _places(row) if isinstance(h, dict))])
    holder[r.choice(keys)] = r.choice(
        (*ODD, "\ud800", "\0", [["q", "a"]], [{"type": "text"}], [{"type": [[]]}])
    )
    return row


def nested(r: random.Random, row: Json) -> object:
    holder, key = r.choice(list(_places(row)))
    for _ in range(r.randint(1, 30)):
        holder[key] = [holder[key]] if r.random() < 0.5 else {"text": holder[key]}
    return row


def character(r: random.Random, row: Json) -> object:
    holder, key = r.choice(_words(row))
    at = r.randint(0, len(holder[key]))
    holder[key] = holder[key][:at] + r.choice(CHARACTERS) + holder[key][at:]
    return row


def special(r: random.Random, row: Json) -> object:
    holder, key = r.choice(_words(row))
    holder[key] = r.choice(
        (r.choice(SPECIAL) + holder[key], holder[key] + r.choice(SPECIAL), r.choice(SPECIAL))
    )
    return row


def long(r: random.Random, row: Json) -> object:
    holder, key = r.choice(_words(row))
    holder[key] = holder[key] * r.choice((10, 100, 1000))
    return row


def turns(r: random.Random, row: Json) -> object:
    """Turns in another order, left out, doubled or of one role."""
    listed = next((v for v in row.values() if isinstance(v, list)), None)
    if not listed:
        return {
            **row,
            "history": r.choice(([["q"]], [["q", ""]], [[None, "a"]], "[", [{}], [["q", "a", "b"]])),
        }
    change = r.choice(
        (r.shuffle, list.reverse, list.pop, lambda x: x.append(x[0]), lambda x: x.__delitem__(slice(1, 9)))
    )
    change(listed)
    return row


def tools(r: random.Random, row: Json) -> object:
    return {**row, "tools": r.choice(TOOLS)}


def family(r: random.Random, row: Json) -> object:
    return {**row, "family": r.choice((*CHARACTERS, "x" * 10_000))}


def no_object(r: random.Random, row: Json) -> object:
    return r.choice(([row], list(row), json.dumps(row), *ODD))


def same(r: random.Random, row: Json) -> object:
    return pair(0)


MUTATIONS: tuple[Mutate, ...] = (
    *(
        wrong_type,
        missing,
        renamed,
        extra,
        nested,
        character,
        special,
        long,
        turns,
        tools,
        family,
        no_object,
        same,
    ),
)


def _json_text(r: random.Random, row: object) -> bytes:
    whole = json.dumps(row, ensure_ascii=r.random() < 0.5)
    depth = r.choice((10, 500, *range(880, 1000, 7), 5000))
    for place, written in (
        ("@deep@", "[" * depth + "]" * depth),
        ("@huge@", "9" * r.choice((30, 5000))),
        ("@wide@", '{"a": 1, "a": [' + "0," * 3000 + "1e999]}"),
    ):
        whole = whole.replace(f'"{place}"', written)
    return whole.encode("utf-8", "surrogatepass")


# What is done to a line


def flipped(r: random.Random, line: bytes) -> bytes:
    broken = bytearray(line)
    for _ in range(r.choice((1, 1, 5))):
        broken[r.randrange(len(broken))] = r.randrange(256)
    return bytes(broken)


def cut(r: random.Random, line: bytes) -> bytes:
    return line[: r.randrange(len(line))]


def put_in(r: random.Random, line: bytes) -> bytes:
    odd = (
        b"\xff",
        b"\xed\xa0\x80",
        b"\xc0\xaf",
        b"\0",
        b"\xef\xbb\xbf",
        b"\r",
        b"\xe2\x80\xa8",
        b"\x1c",
        b",",
        b"}",
        b"NaN",
    )
    at = r.randint(0, len(line))
    return line[:at] + r.choice(odd) + line[at:]


def whole_line(r: random.Random, line: bytes) -> bytes:
    return r.choice((b"", b" ", b"\xef\xbb\xbf" + line, line + line, line.decode("utf-8", "replace").encode("utf-16"),
                     line.replace(b'"', b"'"), line[:-1] + b", " + line[1:], b"{", b"[", b"null", b"\x1c", b"#"))  # fmt: skip


DAMAGES = (flipped, cut, put_in, whole_line)


def mutated(r: random.Random, i: int) -> bytes:
    """A row, spoilt once or twice, as a line; at times the line is spoilt as well."""
    row: object = r.choice(SHAPES)(i)
    for mutate in r.sample(MUTATIONS, r.choice((1, 1, 2))):
        if isinstance(row, dict):
            with suppress(IndexError):  # the first change left nothing for the second
                row = mutate(r, row)
    line = _json_text(r, row)
    return r.choice(DAMAGES)(r, line) if r.random() < 0.25 else line


# What must hold


class Setting:
    """A codec and what it is asked of a file."""

    def __init__(self, tokenizer: Any, template: str, objective: str = "sft") -> None:
        codec = ChatCodec(tokenizer, template, max_length=128)
        self.objective: Objective = (
            sft.Sft(sft.Config(), codec)
            if objective == "sft"
            else pretrain.Pretrain(pretrain.Config(block=16), codec)
        )
        self.key = {**codec.key(), "objective": objective}

    def mixture(self, path: Path, on_bad_row: str) -> Mixture:
        preparation = prepare.Preparation(self.objective.encode, self.key, on_bad_row)
        config = DataConfig.model_validate({"train": str(path), "valid_share": 0})
        return prepare.mixture(preparation, config, seed=0)[0]

    def rows(self, path: Path) -> Iterator[Sample | Problem]:
        """As :meth:`both`, but a file without one good row is no error."""
        for row in lint.check(formats.read(Source(path))):
            yield from [row] if isinstance(row, Problem) else self.objective.encode([row])

    def both(self, path: Path) -> tuple[list[Json], list[Problem]]:
        """Samples and problems, found the same whether bad rows stop or are skipped."""
        data = self.mixture(path, "skip")
        if data.problems:
            with pytest.raises(DataError) as caught:
                self.mixture(path, "stop")
            assert list(caught.value.problems) == data.problems
        else:
            assert len(self.mixture(path, "stop")) == len(data)
        samples = [data[i] for i in range(len(data))]
        for sample in samples:
            assert sample["learned"][1:].any()
            assert self.objective.weight(self.objective.collate([sample])) > 0
        return samples, data.problems


def told(path: Path, problems: list[Problem], last: int) -> list[int]:
    """The problems' lines, each well said and in the file."""
    for problem in problems:
        assert problem.what and problem.fix, problem
        assert str(problem).isprintable() and len(str(problem)) < 1000, problem
        assert re.fullmatch(re.escape(str(path)) + r":[1-9]\d*", problem.where), problem
    lines = [int(problem.where.rpartition(":")[2]) for problem in problems]
    assert all(line <= last for line in lines), (lines, last)
    return lines


def _filled(data: bytes) -> list[int]:
    """The lines of a JSONL file that hold anything."""
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    return [number for number, line in enumerate(lines, 1) if line.decode("utf-8", "replace").strip()]


def _jsonl(path: Path, r: random.Random, rows: int) -> bytes:
    good = [json.dumps(shape(10_000 + i)).encode() for i, shape in enumerate(SHAPES[:4])]
    data = b"\n".join([good[0], *(mutated(r, i) for i in range(1, rows + 1)), *good[1:], b""])
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return data


@pytest.mark.row(14)
def test_each_line_is_a_sample_or_a_problem(tmp_path: Path, tokenizer: Any, tally: Any, times: Any) -> None:
    for seed in range(times(300, 6000) // ROWS_A_FILE):
        r = random.Random(seed)
        path = tmp_path / ("rows" + r.choice((".jsonl", ".jsonl.gz", ".txt", ".txt.gz", ".json", ".json.gz")))
        data = _jsonl(path, r, ROWS_A_FILE)
        samples, problems = Setting(tokenizer, r.choice(TEMPLATES)).both(path)
        of_problems = told(path, problems, data.count(b"\n"))
        of_samples = [int(sample[ORIGIN][0]) for sample in samples]
        assert sorted(of_samples + of_problems) == _filled(data), seed
        for line in range(2, ROWS_A_FILE + 2):
            tally.add(True, f"seed {seed}, line {line}")


def _array(r: random.Random, rows: int) -> bytes:
    """A list with a row a line; the first row is on line 2."""
    good = json.dumps(messages(10_000)).encode()
    spoilt = (_json_text(r, r.choice(MUTATIONS)(r, r.choice(SHAPES)(i))) for i in range(1, rows))
    return b"[\n" + b",\n".join([good, *spoilt]) + b"\n]\n"


@pytest.mark.row(14)
def test_each_element_of_a_list_is_told_up_to_where_it_breaks(
    tmp_path: Path, tokenizer: Any, tally: Any, times: Any
) -> None:
    for seed in range(times(80, 1600) // ROWS_A_FILE):
        r = random.Random(seed)
        path = tmp_path / r.choice(("rows.json", "rows.json.gz"))
        data = _array(r, ROWS_A_FILE)
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
        samples, problems = Setting(tokenizer, r.choice(TEMPLATES)).both(path)
        lines = sorted(
            [*told(path, problems, ROWS_A_FILE + 1), *(int(sample[ORIGIN][0]) for sample in samples)]
        )
        broken = [p for p in problems if "rows after it were not read" in p.fix]
        end = told(path, broken, ROWS_A_FILE + 1)[0] if broken else ROWS_A_FILE + 1
        assert lines == list(range(2, end + 1)), seed
        for line in lines:
            tally.add(True, f"seed {seed}, line {line}")


@pytest.mark.row(14)
def test_a_list_with_spoilt_bytes_is_read_as_json_reads_it_or_told(
    tmp_path: Path, tokenizer: Any, tally: Any, times: Any
) -> None:
    good = ("[\n" + ",\n".join(json.dumps(shape(i)) for i in range(4) for shape in SHAPES) + "]").encode()
    path = tmp_path / "rows.json"
    for seed in range(times(30, 600)):
        r = random.Random(seed)
        path.write_bytes(good[:200] + r.choice(DAMAGES[:3])(r, good[200:]))
        samples, problems = Setting(tokenizer, "auto").both(path)
        told(path, problems, path.read_bytes().rstrip().count(b"\n") + 1)
        try:
            expected = len(json.loads(path.read_bytes()))
        except ValueError:
            tally.add(any("not JSON" in p.what or "not UTF-8" in p.what for p in problems), f"seed {seed}")
        else:
            tally.add(len(samples) + len(problems) == expected, f"seed {seed}")


def _cells(r: random.Random, i: int) -> list[str]:
    row = alpaca(i)
    for mutate in r.sample((character, special, long, missing), r.choice((0, 1, 1, 2))):
        mutate(r, row)
    cells = list(map(str, row.values()))
    return [*cells, "one more"] if r.random() < 0.1 else cells


@pytest.mark.row(14)
def test_each_row_of_a_table_in_text_is_a_sample_or_a_problem(
    tmp_path: Path, tokenizer: Any, tally: Any, times: Any
) -> None:
    path = tmp_path / "rows.csv"
    for seed in range(times(80, 1600) // ROWS_A_FILE):
        r = random.Random(seed)
        starts, written = [], io.StringIO(newline="")
        writer = csv.writer(written, quoting=csv.QUOTE_ALL, lineterminator=r.choice(("\n", "\r\n")))
        writer.writerow(alpaca(0))
        for i in range(ROWS_A_FILE):
            starts.append(written.getvalue().count("\n") + 1)
            writer.writerow(_cells(r, i) if i else alpaca(10_000).values())
        path.write_bytes(written.getvalue().encode("utf-8", "surrogatepass"))
        samples, problems = Setting(tokenizer, r.choice(TEMPLATES)).both(path)
        lines = told(path, problems, written.getvalue().count("\n")) + [
            int(sample[ORIGIN][0]) for sample in samples
        ]
        rows = sorted(
            bisect_right(starts, line) - 1 for line in lines
        )  # a row's bad byte may be on a later line
        assert rows == list(range(ROWS_A_FILE)), seed
        for line in starts[1:]:
            tally.add(True, f"seed {seed}, line {line}")


@pytest.mark.row(14)
def test_a_quote_that_is_never_closed_swallows_no_row(tmp_path: Path, tally: Any, times: Any) -> None:
    path = tmp_path / "rows.csv"
    for seed in range(times(40, 400)):
        r = random.Random(seed)
        rows = [f"Which #{i}#,That {i}" for i in range(9)]
        for i in r.sample(range(1, 9), r.choice((1, 1, 2))):
            rows[i] = r.choice((rows[i].replace(",", ',"'), '"' + rows[i], rows[i].replace(",", ',"a"b')))
        path.write_text("prompt,completion\n" + "\n".join(rows) + "\n")
        found = list(formats.read(Source(path)))
        good = [row for row in found if isinstance(row, Row)]
        told(path, [p for p in found if isinstance(p, Problem)], 10)
        whole = all(len(set(re.findall("#[0-9]#", str(row.messages)))) == 1 for row in good)
        tally.add(whole and len(good) < 9 and good[0].messages[1].content == "That 0", f"seed {seed}")


def _columns(r: random.Random, rows: int) -> pa.Table:
    """Columns of whatever type, with nulls, dates out of range and bytes that are no text."""
    words = [r.choice((f"w{i}", None, "", "\0", "\u202e", "x" * 5000, "<|end|>")) for i in range(1, rows)]
    raw = [r.choice((f"b{i}".encode(), b"\xff", b"\xed\xa0\x80", None)) for i in range(1, rows)]
    late = pa.array([0, *(r.choice((2**60, -(2**60), 0, None)) for _ in raw)], pa.timestamp("us"))
    said = [
        [{"role": "user", "content": w}, {"role": r.choice(("assistant", None, "bot")), "content": w}]
        for w in words
    ]
    columns = {
        "text": pa.array(["good", *words]),
        "bytes": pa.array([b"good", *raw], pa.binary()).view(pa.string()),
        "number": pa.array(range(rows)),
        "late": late,
        "raw": pa.array([b"good", *raw], pa.binary()),
        "said": pa.array([messages(10_000)["messages"], *said]),
    }
    names = {
        "prompt": r.choice(("text", "bytes", "late")),
        "completion": r.choice(("text", "bytes", "number", "raw")),
    }
    if r.random() < 0.4:
        names = {
            "messages": r.choice(("said", "said", "text", "raw")),
            "tools": r.choice(("bytes", "said", "text")),
        }
    return pa.table({name: columns[column] for name, column in names.items()} | {"i": columns["number"]})


@pytest.mark.row(14)
def test_each_row_of_a_parquet_file_is_a_sample_or_a_problem(
    tmp_path: Path, tokenizer: Any, tally: Any, times: Any
) -> None:
    path = tmp_path / "rows.parquet"
    for seed in range(times(80, 1200) // ROWS_A_FILE):
        r = random.Random(seed)
        pq.write_table(_columns(r, ROWS_A_FILE), path, row_group_size=r.choice((7, 100)))
        checked = list(Setting(tokenizer, "auto").rows(path))
        problems = [item for item in checked if isinstance(item, Problem)]
        lines = told(path, problems, ROWS_A_FILE)
        lines += [int(item[ORIGIN][0]) for item in checked if not isinstance(item, Problem)]
        assert sorted(lines) == list(range(1, ROWS_A_FILE + 1)), seed
        for line in lines[1:]:
            tally.add(True, f"seed {seed}, row {line}")


@pytest.mark.row(14)
def test_a_parquet_file_with_spoilt_bytes(tmp_path: Path, tokenizer: Any, tally: Any, times: Any) -> None:
    path = tmp_path / "rows.parquet"
    setting = Setting(tokenizer, "auto")
    for seed in range(times(60, 1200)):
        r = random.Random(seed)
        rows = [alpaca(i) for i in range(30)]
        pq.write_table(pa.Table.from_pylist(rows), path, compression=r.choice(("snappy", "none")),
                       write_page_checksum=r.random() < 0.5)  # fmt: skip
        path.write_bytes(r.choice((flipped, cut))(r, path.read_bytes()) or b"P")
        checked = list(setting.rows(path))
        problems = [item for item in checked if isinstance(item, Problem)]
        told(path, problems, len(rows) + 1)
        tally.add(
            len(checked) == 30 or "not Parquet" in problems[-1].what, f"seed {seed}: {len(checked)} rows"
        )


def _expected(data: bytes) -> list[int]:
    """The lines at which a prose file's paragraphs begin, or their bad lines are."""
    found: list[int] = []
    block: list[tuple[int, bool]] = []
    for number, line in enumerate([*data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), b""], 1):
        if line.decode("utf-8", "replace").strip():
            block.append((number, line.decode("utf-8", "ignore").encode() == line))
        elif block:
            bad = [at for at, readable in block if not readable]
            found += bad or [block[0][0]]
            block = []
    return found


@pytest.mark.row(14)
def test_each_paragraph_is_learned_whole_or_told(
    tmp_path: Path, tokenizer: Any, tally: Any, times: Any
) -> None:
    path = tmp_path / "prose.txt"
    setting = Setting(tokenizer, "auto", "pretrain")
    for seed in range(times(40, 800) // ROWS_A_FILE):
        r = random.Random(seed)
        lines = [text(i)["text"].encode() for i in range(ROWS_A_FILE)]
        spoilt = [r.choice(DAMAGES)(r, line) + r.choice((b"\n", b"\n\n", b"\r\n\r\n")) for line in lines]
        data = b"".join([b"It begins.\n\n", *spoilt, b"\n\n", text(0)["text"].encode()])
        path.write_bytes(data)
        samples, problems = setting.both(path)
        told(path, problems, data.count(b"\n") + 1)
        rows = list(lint.check(formats.read(Source(path))))
        assert sorted(int(str(row.where).rpartition(":")[2]) for row in rows) == _expected(data), seed
        good = [tokenizer(row.text)["input_ids"] for row in rows if isinstance(row, Row)]
        assert 0 <= sum(len(ids) + 1 for ids in good) - sum(len(s["input_ids"]) for s in samples) <= 1
        for line in range(ROWS_A_FILE):
            tally.add(True, f"seed {seed}, line {line}")


@pytest.mark.row(14)
def test_cells_of_a_megabyte(tmp_path: Path, tokenizer: Any, tally: Any) -> None:
    much, path = "so it is " * 116_000, tmp_path / "rows.jsonl"
    rows: list[Json] = [
        pair(0), {**pair(1), "completion": much}, {**pair(2), "prompt": much}, {**pair(3), much: much},
        {"messages": [{"role": much, "content": "x"}]}, {**pair(5), "tools": much}, {**pair(6), "tools": "[" * 1_000_000},
        {**pair(7), "family": much}, {"messages": much}, {"messages": [{"role": "user", "content": [{"type": much}]}]},
        {much: 1}, {**pair(8), "history": much},
    ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)))
    samples, problems = Setting(tokenizer, "auto").both(path)
    lines = told(path, problems, len(rows))
    lines += [int(sample[ORIGIN][0]) for sample in samples]
    for line in range(1, len(rows) + 1):
        tally.add(line in lines, f"line {line}")


# The command line


@pytest.mark.row(14)
def test_the_command_line_tells_and_exits_with_2(tmp_path: Path, tiny_model_folder: Path, tally: Any) -> None:
    r = random.Random(1)
    _jsonl(tmp_path / "rows.jsonl", r, 100)
    (tmp_path / "rows.json").write_bytes(_array(r, 30))
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(_jsonl(tmp_path / "x.jsonl", r, 20))[:-9])
    pq.write_table(_columns(r, 40), tmp_path / "rows.parquet")
    recipe = {"model": str(tiny_model_folder), "data": {"train": "rows.jsonl"}, "output": "run"}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    commands = (
        [
            "lint",
            "rows.jsonl",
            "rows.json",
            "torn.jsonl.gz",
            "rows.parquet",
            "--model",
            str(tiny_model_folder),
        ],
        ["run", "recipe.yaml"],
    )
    verb = [sys.executable, "-m", "tunewright"]
    started = [subprocess.Popen([*verb, *c], cwd=tmp_path, stdout=-1, stderr=-1) for c in commands]
    for command, process in zip(commands, started, strict=True):
        out, err = process.communicate(timeout=120)
        ok = process.returncode == 2 and b"Traceback" not in err and re.search(rb":\d+: ", out + err)
        tally.add(bool(ok), f"{command}: exit {process.returncode}, {err[-600:].decode()}")
    assert not (tmp_path / "run").exists()
