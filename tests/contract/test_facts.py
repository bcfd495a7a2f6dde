"""What every method says of itself, and the recipe that shows it."""

import re
from pathlib import Path

import pytest

from tunewright import methods, recipes
from tunewright.core import plugins
from tunewright.core.words import Words

METHODS = plugins.names("methods")
RECIPES = Path(__file__).parents[2] / "recipes"
YEAR = re.compile(r"\b(19|20)\d\d\b")
CHINESE = re.compile(r"[\u4e00-\u9fff]")


def said_in_both_languages(words: Words) -> bool:
    """In English and in Chinese, neither in the place of the other."""
    return bool(re.search(r"[a-z]", words.en) and not CHINESE.search(words.en) and CHINESE.search(words.zh))


@pytest.mark.parametrize("method", METHODS)
def test_facts_are_complete(method):
    facts = methods.kind(method).facts
    assert all(map(said_in_both_languages, (facts.idea, facts.inference, facts.when)))
    assert facts.keeps_apart is None or said_in_both_languages(facts.keeps_apart)
    assert facts.formula
    assert facts.count
    assert YEAR.search(facts.paper), f"{method}: no year in {facts.paper!r}"


@pytest.mark.parametrize("method", METHODS)
def test_a_method_says_how_fast_it_learns_and_what_it_saves(method):
    kind = methods.kind(method)
    assert 0 < kind.default_lr < 1
    assert kind.folder in ("adapter", "model")
    assert plugins.summary("methods", method)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_has_a_recipe_of_its_name(method):
    recipe = recipes.load(RECIPES / f"{method}.yaml")
    assert method in [stage.method["name"] for stage in recipe.stages]
