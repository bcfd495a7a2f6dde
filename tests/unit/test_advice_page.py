"""docs/advice.md is what its script writes, and formulas stand beside what was published."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tunewright.advise.rules import rules

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("advice_page", ROOT / "scripts/advice_page.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("language", "name"), [("en", "advice.md"), ("zh", "advice.zh-CN.md")])
def test_the_page_of_advice_is_what_its_script_writes(script: Any, language: str, name: str) -> None:
    expected = script.page(language, script.figures())
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == expected, "run scripts/advice_page.py"
    assert all(f"| {rule.id} |" in expected for rule in rules())


def test_figures_are_of_several_sources_and_most_are_near(script: Any) -> None:
    found = script.figures()
    assert len({figure.source for figure in found}) >= 8
    assert sum(1 for figure in found if 1 / 1.2 <= figure.ratio <= 1.2) >= 0.7 * len(found)
    memory = [
        figure.ratio for figure in found if figure.unit in ("GB", "GiB") and figure.source == script.LIT
    ]
    assert min(memory) > 0.8
