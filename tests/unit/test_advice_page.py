"""docs/advice.md is what its script writes, and formulas stand beside what was published."""

import sys
from pathlib import Path

import pytest

from tunewright.advise.rules import rules

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks is a package of the repository, not of what is installed

from benchmarks import advice_page  # noqa: E402


@pytest.mark.parametrize(("language", "name"), [("en", "advice.md"), ("zh", "advice.zh-CN.md")])
def test_the_page_of_advice_is_what_its_script_writes(language: str, name: str) -> None:
    expected = advice_page.page(language, advice_page.figures())
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == expected, "run benchmarks/advice_page.py"
    assert all(f"| {rule.id} |" in expected for rule in rules())


def test_figures_are_of_several_sources_and_most_are_near() -> None:
    found = advice_page.figures()
    assert len({figure.source for figure in found}) >= 8
    assert sum(1 for figure in found if 1 / 1.2 <= figure.ratio <= 1.2) >= 0.7 * len(found)
    memory = [
        figure.ratio for figure in found if figure.unit in ("GB", "GiB") and figure.source == advice_page.LIT
    ]
    assert min(memory) > 0.8
