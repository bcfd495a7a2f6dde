"""The facts of ``facts.json`` as flat (relation, given, answer) records in both languages."""

import functools
import importlib.resources
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tunewright.data.builtin.split import is_held_out


@dataclass(frozen=True, slots=True)
class Fact:
    """``answer`` is what ``relation`` yields for ``given``; ``key`` names the entity for the split.

    ``lang`` is the language of the sentences the fact is stated in, "en" or "zh".
    """

    relation: str
    lang: str
    key: str
    given: str
    answer: str


@functools.cache
def raw() -> dict[str, Any]:
    """The parsed ``facts.json``: table name to its list of entries."""
    file = importlib.resources.files(__package__ or "").joinpath("facts.json")
    loaded: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return loaded


def _countries(lang: str) -> Iterator[Fact]:
    for row in raw()["countries"]:
        key, name, capital = f"country:{row['en']}", row[lang], row[f"capital_{lang}"]
        yield Fact("capital", lang, key, name, capital)
        yield Fact("country", lang, key, capital, name)
        yield Fact("continent", lang, key, name, row[f"continent_{lang}"])
        yield Fact("currency", lang, key, name, row[f"currency_{lang}"])


def _elements(lang: str) -> Iterator[Fact]:
    for row in raw()["elements"]:
        key, name = f"element:{row['en']}", row[lang]
        yield Fact("symbol", lang, key, name, row["symbol"])
        yield Fact("element", lang, key, row["symbol"], name)
        yield Fact("number", lang, key, name, str(row["number"]))


def _words(lang: str) -> Iterator[Fact]:
    for one, other in raw()[f"antonyms_{lang}"]:
        key = f"antonym:{one}:{other}"
        yield Fact("antonym", lang, key, one, other)
        yield Fact("antonym", lang, key, other, one)
    for row in raw()["words"]:
        key = f"noun:{row['en']}"
        yield Fact("to_chinese", lang, key, row["en"], row["zh"])
        yield Fact("to_english", lang, key, row["zh"], row["en"])
    # An animal shares its key with the word of the same name: one entity, one side of the split.
    for row in raw()["animals"]:
        yield Fact("class", lang, f"noun:{row['en']}", row[lang], row[f"class_{lang}"])


@functools.cache
def facts(lang: str) -> dict[str, tuple[Fact, ...]]:
    """Every fact that is stated in ``lang``, by relation."""
    table: dict[str, list[Fact]] = {}
    for fact in (*_countries(lang), *_elements(lang), *_words(lang)):
        table.setdefault(fact.relation, []).append(fact)
    return {relation: tuple(found) for relation, found in table.items()}


@functools.cache
def split_facts(lang: str, held_out: bool) -> dict[str, tuple[Fact, ...]]:
    """The facts of ``lang`` whose entity is, or is not, held out, by relation."""
    return {
        relation: tuple(fact for fact in found if is_held_out(fact.key) == held_out)
        for relation, found in facts(lang).items()
    }


def _article(noun: str) -> str:
    return f"an {noun}" if noun[:1] in "aeiou" else f"a {noun}"


def fill(template: str, fact: Fact) -> str:
    """``template`` with {e} the given and {a} the answer.

    {E} and {A} are capitalised, {ae} and {aa} have an article, {AE} has both.
    """
    given, answer = fact.given, fact.answer
    return template.format(
        e=given,
        a=answer,
        E=given[:1].upper() + given[1:],
        A=answer[:1].upper() + answer[1:],
        ae=_article(given),
        AE=_article(given).capitalize(),
        aa=_article(answer),
    )
