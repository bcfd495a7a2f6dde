"""Templates, recipes and archives made to do harm: nothing runs, and each is refused by name, soon and cheaply."""

import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bounded import Bounded, chosen, within

from tunewright.core.errors import ModelError
from tunewright.core.paths import cache_folder
from tunewright.data import template_check
from tunewright.data.template import ChatCodec, template_names


def judge(tally: Any, told: dict[str, Any], canary: Path, place: str, what: str) -> None:
    """Count one payload."""
    refused = told["error"] in ("ModelError", "RecipeError", "DataError", "UserError")
    named = any(place in where and words for where, words, _ in told["problems"])
    tally.add(refused and named and within(told) and not canary.exists(), f"{what}: {told}")
    for name, value in (("seconds", told["seconds"]), ("megabytes", told["growth"] / (1 << 20))):
        tally.note(name, max(tally.notes.get(name, 0), round(value, 3)))


# Chat templates

LOOPS = "{% for a in range(99999) %}" * 3 + "x" + "{% endfor %}" * 3
ESCAPES = {
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "class alone": "{{ ''.__class__ }}",
    "cycler": "{{ cycler.__init__.__globals__.os.mkdir(CANARY) }}",
    "joiner": "{{ joiner.__init__.__globals__['os'].mkdir(CANARY) }}",
    "namespace": "{{ namespace.__init__.__globals__.os.mkdir(CANARY) }}",
    "lipsum": "{{ lipsum.__globals__['os'].mkdir(CANARY) }}",
    "lipsum by attr": "{{ (lipsum|attr('__globals__'))['os'].mkdir(CANARY) }}",
    "lipsum by item": "{{ lipsum['__globals__']['os'].mkdir(CANARY) }}",
    "raise_exception": "{{ raise_exception.__globals__['sys'] }}",
    "strftime_now": "{{ strftime_now.__globals__['sys'] }}",
    "tojson": "{{ self._TemplateReference__context.environment.__class__ }}",
    "format": "{{ '{0.__class__}'.format(1) }}",
    "format_map": "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "hidden in a branch": "{% if messages|length > 999 %}{{ cycler.__init__ }}{% endif %}",
    "changing the messages": "{{ messages.append(1) }}",
    "frame": "{% set g = (m for m in messages) %}{{ g.gi_frame.f_globals }}",
    "generator": "{{ (messages|map('upper')).gi_frame.f_globals }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os.mkdir(CANARY) }}",
    "from import": "{% from 'os' import mkdir %}",
    "extends": "{% extends 'base' %}",
}  # fmt: skip
BOMBS = {
    "loops": LOOPS,
    "loops in a later turn": "{% if messages|length > 3 %}" + LOOPS + "{% endif %}",
    "loops for tools": "{% if tools %}" + LOOPS + "{% endif %}",
    "string": "{{ 'a' * 10**9 }}",
    "string of 150 MB": "{{ 'a' * (150 * 10**6) }}",
    "string in a variable": "{% set n = 10**9 %}{% set a = 'a' * n %}",
    "list": "{{ [0] * 10**9 }}",
    "tuple": "{{ (0,) * 10**9 }}",
    "range": "{{ range(10**9)|list }}",
    "ranges": "{% set n = namespace(a=[]) %}{% for i in range(9999) %}{% set n.a = n.a + range(99999)|list %}{% endfor %}",
    "doubling": "{% set n = namespace(a='a') %}{% for i in range(99) %}{% set n.a = n.a + n.a %}{% endfor %}",
    "doubling of a list": "{% set n = namespace(a=[1]) %}{% for i in range(99) %}{% set n.a = n.a + n.a %}{% endfor %}",
    "joining": "{% set n = namespace(a='a') %}{% for i in range(99) %}{% set n.a = n.a|replace('a', 'aaaaaaaaaa') %}{% endfor %}",
    "center": "{{ 'a'|center(10**9) }}",
    "ljust": "{{ 'a'.ljust(10**9) }}",
    "zfill": "{{ 'a'.zfill(10**9) }}",
    "indent": "{{ ('a\\n' * 90000)|indent(90000) }}",
    "expandtabs": "{{ '\\t'.expandtabs(10**9) }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "format": "{{ '{:>1000000000}'.format(1) }}",
    "tojson": "{{ messages|tojson(indent=10**9) }}",
    "batch": "{{ [1]|batch(10**9, 0)|list }}",
    "slice": "{{ [1]|slice(10**9)|list }}",
    "lipsum": "{{ lipsum(n=10**6) }}",
    "power": "{{ 10**(10**10) }}",
    "power of powers": "{{ (9**(9**8)) % 7 }}",
    "shift by powers": "{% set n = namespace(a=2) %}{% for i in range(99) %}{% set n.a = n.a * n.a %}{% endfor %}",
    "macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "two macros": "{% macro f() %}{{ g() }}{% endmacro %}{% macro g() %}{{ f() }}{% endmacro %}{{ f() }}",
    "macro that branches": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursive loop": "{% for m in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "much text": "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
    "parentheses": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "lists in lists": "{{ " + "[" * 50_000 + "]" * 50_000 + " }}",
    "blocks in blocks": "{% if 1 %}" * 5_000 + "{% endif %}" * 5_000,
    "loops in loops": "{% for a in [1] %}" * 100 + "{% endfor %}" * 100,
    "a long expression": "{{ 1" + " + 1" * 200_000 + " }}",
    "many expressions": "{{ 1 }}" * 140_000,
    "2 MB": "a" * (2 << 20),
    "half a surrogate pair": "\ud800",
    "no template": "{% if %}",
    "an unknown filter": "{{ 1|nosuch }}",
    "an open block": "{% generation %}",
}  # fmt: skip


@pytest.mark.row(16)
@pytest.mark.parametrize("name", ESCAPES)
def test_templates_that_reach_out(
    bounded: Bounded, canary: Path, tmp_path: Path, tally: Any, name: str
) -> None:
    path = tmp_path / "t.jinja"
    path.write_text(ESCAPES[name].replace("CANARY", repr(str(canary))))
    judge(tally, bounded.call("template", path), canary, "data.template", name)


@pytest.mark.row(16)
@pytest.mark.parametrize("name", chosen(BOMBS, 3))
def test_templates_that_use_up_time_or_memory(
    bounded: Bounded, canary: Path, tmp_path: Path, tally: Any, name: str
) -> None:
    path = tmp_path / "t.jinja"
    path.write_text(BOMBS[name], encoding="utf-8", errors="surrogatepass")
    judge(tally, bounded.call("template", path), canary, "data.template", name)


@pytest.mark.row(16)
@pytest.mark.parametrize("where", ["jinja", "config", "additional"])
def test_a_bomb_is_found_wherever_the_template_is(
    bounded: Bounded, tiny_model_folder: Path, canary: Path, tmp_path: Path, tally: Any, where: str
) -> None:
    import json
    import shutil

    folder = Path(shutil.copytree(tiny_model_folder, tmp_path / "copy"))
    if where == "jinja":
        (folder / "chat_template.jinja").write_text(BOMBS["string"])
    elif where == "config":
        (folder / "chat_template.jinja").unlink()
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(
            json.dumps({**settings, "chat_template": BOMBS["string"]})
        )
    else:
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text(BOMBS["string"])
    for call in ("tokenizer", "speaker"):
        judge(tally, bounded.call(call, folder), canary, "data.template", f"{where} through {call}")


GOOD = {
    "no system turn": "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}a",
    "always refuses": "{{ raise_exception('no') }}",
    "marks": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "loop controls": "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "dates": "{{ strftime_now('%d %b %Y') }}{{ messages[0].content }}",
    "tools": "{% if tools %}{{ tools|tojson(indent=4) }}{% endif %}{{ bos_token }}",
    "recursion that ends": "{% macro f(n) %}{{ n }}{% if n %}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(9) }}",
    "wrong for these turns": "{{ messages[99].content.nothing }}{{ 1 / 0 }}",
    "namespace": "{% set n = namespace(a=0) %}{% for m in messages %}{% set n.a = n.a + 1 %}{% endfor %}{{ n.a }}",
}  # fmt: skip


@pytest.mark.row(16)
def test_good_templates_are_used_at_once(
    bounded: Bounded, canary: Path, tmp_path: Path, tally: Any, shared_fixtures: Path
) -> None:
    own = Path(template_check.__file__).parent / "templates"
    real = [*shared_fixtures.rglob("*.jinja"), *(own / f"{name}.jinja" for name in template_names())]
    for name, text in {**{str(p): p.read_text() for p in real}, **GOOD}.items():
        (tmp_path / "t.jinja").write_text(text)
        first, again = (bounded.call("template", tmp_path / "t.jinja") for _ in range(2))
        tally.note("seconds", max(tally.notes.get("seconds", 0), round(first["seconds"], 3)))
        tally.add(not first["error"] and min(first["seconds"], first["processor"]) < 0.3, f"{name}: {first}")
        tally.add(
            not again["error"] and min(again["seconds"], again["processor"]) < 0.02, f"{name} again: {again}"
        )


@pytest.mark.row(16)
def test_what_goes_wrong_in_a_template_is_told_of_the_row(tokenizer: Any, tally: Any) -> None:
    from tunewright.core.errors import DataError
    from tunewright.data.rows import Message, Row

    row = Row("a.jsonl:1", (Message("user", "Hi"), Message("assistant", "Yes")))
    for wrong in ("{{ 1 / 0 }}", "{{ messages[9].a.b }}", "{{ 'a' + 1 }}", "{{ {}['a'].b }}", "{{ 1|join }}"):
        tokenizer.chat_template = wrong
        codec = ChatCodec(tokenizer)
        for use in (lambda c=codec: c.encode(row), lambda c=codec: c.prompt(row.messages)):
            try:
                use()
                tally.add(False, wrong)
            except DataError as error:
                tally.add("the chat template refuses" in str(error), f"{wrong}: {error}")


def test_a_verdict_is_remembered_by_the_templates_text(tokenizer: Any) -> None:
    remembered = cache_folder() / "templates"
    before = len(list(remembered.glob("*.json")))
    for text, more in (
        ("{{ messages[0].content }} 1", 1),
        ("{{ messages[0].content }} 1", 1),
        ("{{ 2 }}", 2),
    ):
        tokenizer.chat_template = text
        ChatCodec(tokenizer)
        assert len(list(remembered.glob("*.json"))) == before + more
    tokenizer.chat_template = BOMBS["string"]
    with pytest.raises(ModelError, match=r"data\.template: .* needs more than 200 MB .*; fix: name one: "):
        ChatCodec(tokenizer)
    assert len(list(remembered.glob("*.json"))) == before + 2
    ChatCodec(tokenizer, "chatml")


# Recipes

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1, y: 2}\n" + "".join(
    f"{after}: &{after} {{<<: [{', '.join([f'*{before}'] * 9)}]}}\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)
YAML: dict[str, str | bytes] = {
    "os.system": "model: !!python/object/apply:os.system ['mkdir CANARY']",
    "os.mkdir": "!!python/object/apply:os.mkdir ['CANARY']",
    "subprocess": "a: !!python/object/apply:subprocess.check_call [['mkdir', 'CANARY']]",
    "new": "a: !!python/object/new:os.mkdir ['CANARY']",
    "eval": "a: !!python/object/apply:eval [\"__import__('os').mkdir('CANARY')\"]",
    "name": "a: !!python/name:os.system",
    "module": "a: !!python/module:os",
    "tuple": "a: !!python/tuple [1]",
    "own tag": "a: !own {b: 1}",
    "tag of another place": "%TAG ! tag:evil,2000:\n---\na: !b c",
    "binary": "a: !!binary 'eHh4'",
    "set": "a: !!set {b, c}",
    "number that is none": "a: !!int abc",
    "truth that is none": "a: !!bool maybe",
    "date that is none": "a: 2001-99-99",
    "laughs": LAUGHS,
    "merges": MERGES,
    "an alias of itself": "a: &a [*a]",
    "a mapping of itself": "a: &a {b: *a}",
    "lists in lists": "a: " + "[" * 60_000,
    "lists in lists, closed": "a: " + "[" * 500 + "]" * 500,
    "mappings in mappings": "{a: " * 20_000,
    "blocks in blocks": "".join(" " * i + "a:\n" for i in range(300)),
    "60 deep": "a: " + "[" * 60 + "]" * 60,
    "30,000 values": "a: [" + "1," * 30_000 + "]",
    "50 MB": b"a: " + b"x" * (50 << 20),
    "50 MB of lists": b"a: [" + b"[]," * (16 << 20),
    "twice the same key": "model: a\nmodel: b",
    "twice the same key, inside": "train: {lr: 1, lr: 2}",
    "NUL": "model: a\0b",
    "bytes": bytes(range(256)) * 100,
    "UTF-16": "model: a".encode("utf-16"),
    "escape sequences": "model: \x1b[2J",
    "half a surrogate pair": 'model: "\\ud800"',
    "a number of 60,000 digits": "a: " + "1" * 60_000,
    "a number in base 60": "a: 1" + ":1" * 30_000,
    "a hexadecimal number": "a: 0x" + "f" * 60_000,
    "two documents": "a: 1\n---\nb: 2",
    "a list as key": "? [a, b]\n: 1",
    "an unknown alias": "a: *b",
    "tabs": "a:\n\t- b",
    "a list": "[1, 2]",
    "nothing": "",
    "zip": b"PK\x03\x04" + bytes(100),
}
OVERRIDES = ("tag of another place", "50 MB", "50 MB of lists", "bytes", "UTF-16", "zip", "a list", "nothing",
             "tuple", "NUL")  # fmt: skip


@pytest.mark.row(16)
@pytest.mark.parametrize("name", YAML)
def test_recipes(bounded: Bounded, canary: Path, tmp_path: Path, tally: Any, name: str) -> None:
    path, content = tmp_path / "recipe.yaml", YAML[name]
    content = content.replace("CANARY", str(canary)) if isinstance(content, str) else content
    path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
    judge(tally, bounded.call("recipe", path), canary, str(path), name)


@pytest.mark.row(16)
def test_twice_the_same_key_is_said_with_its_line(bounded: Bounded, tmp_path: Path, tally: Any) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: a\ndata: b\nmodel: c\n")
    told = bounded.call("recipe", path)["problems"]
    tally.add(told == [[f"{path}:3", "not readable as YAML: the key 'model' is there twice", ""]], str(told))


@pytest.mark.row(16)
@pytest.mark.parametrize("name", chosen(n for n in YAML if n not in OVERRIDES))
def test_overrides(bounded: Bounded, canary: Path, tally: Any, name: str) -> None:
    value = str(YAML[name]).replace("CANARY", str(canary))
    judge(tally, bounded.call("override", f"train={value}"), canary, "train", name)


@pytest.mark.row(16)
def test_an_override_of_great_depth(bounded: Bounded, canary: Path, tally: Any) -> None:
    judge(tally, bounded.call("override", "train" + ".a" * 50_000 + "=1"), canary, "train", "depth")


# Archives


def zipped(canary: Path) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr(f"../../../..{canary}", "slipped out")
        archive.writestr("config.json", "{}")
    return made.getvalue()


def tarred(canary: Path, mode: str = "w") -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode=mode) as archive:
        entry = tarfile.TarInfo(str(canary))
        entry.size = 3
        archive.addfile(entry, io.BytesIO(b"out"))
    return made.getvalue()


ARCHIVES: dict[str, Callable[[Path], bytes]] = {
    ".zip": zipped,
    ".tar": tarred,
    ".tgz": lambda canary: tarred(canary, "w:gz"),
    ".tar.gz": lambda canary: tarred(canary, "w:gz"),
    ".tar.bz2": lambda canary: tarred(canary, "w:bz2"),
    ".tar.xz": lambda canary: tarred(canary, "w:xz"),
    ".7z": zipped,
    ".safetensors": zipped,
    ".jsonl": zipped,
    ".jsonl.gz": lambda canary: tarred(canary, "w:gz"),
    ".parquet": zipped,
    ".csv": tarred,
}


@pytest.mark.row(16)
@pytest.mark.parametrize("ending", ARCHIVES)
@pytest.mark.parametrize("call", ["find", "speaker", "data"])
def test_archives(bounded: Bounded, canary: Path, tmp_path: Path, tally: Any, ending: str, call: str) -> None:
    path = tmp_path / f"archive{ending}"
    path.write_bytes(ARCHIVES[ending](canary))
    place = str(path) if call == "data" else "model"
    judge(tally, bounded.call(call, path), canary, place, f"{ending} through {call}")
    tally.add([p.name for p in tmp_path.iterdir()] == [path.name], f"{ending}: something was unpacked")
