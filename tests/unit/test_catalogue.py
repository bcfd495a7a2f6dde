"""What is told of each method is computed: shares, memory and where it is refused."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tunewright import catalogue
from tunewright.core import plugins

ROOT = Path(__file__).parents[2]
Tree = dict[str, Any]


@pytest.fixture(scope="module")
def rows() -> dict[str, Tree]:
    """The rows by the method's name."""
    return {row["name"]: row for row in catalogue.method_rows()}


def test_every_method_has_a_row_that_is_json(rows: dict[str, Tree]) -> None:
    assert list(rows) == plugins.names("methods")
    assert json.loads(json.dumps(rows)) == rows


def test_the_reference_is_a_llama_of_seven_billion() -> None:
    total = sum(p.numel() for p in catalogue.outline(catalogue.REFERENCE).parameters())
    assert total == 6_738_415_616  # Touvron et al. 2023, table 2


def test_lora_on_it_is_as_large_as_everybody_says(rows: dict[str, Tree]) -> None:
    assert rows["lora"]["count"] == 39_976_960  # rank 16 on all linear layers of Llama-2-7B
    assert rows["lora"]["share"] == pytest.approx(39_976_960 / 6_738_415_616)


def test_memory_is_that_of_weights_gradients_and_optimizer(rows: dict[str, Tree]) -> None:
    assert rows["full"]["memory_factor"] == 1.0
    lora = 2 * 6_738_415_616 + 16 * 39_976_960
    assert rows["lora"]["memory_factor"] == pytest.approx(lora / (16 * 6_738_415_616))
    assert rows["qlora"]["memory_factor"] < 0.5 * rows["lora"]["memory_factor"]
    assert rows["lisa"]["memory_factor"] < rows["partial"]["memory_factor"] < 1


def test_where_a_method_is_refused_the_row_says_why(rows: dict[str, Tree]) -> None:
    assert set(rows["boft"]["refuses"]) == {"gpt2"}
    assert "Conv1D" in rows["boft"]["refuses"]["gpt2"]
    assert rows["lora"]["refuses"] == rows["full"]["refuses"] == {}


def test_the_table_has_a_line_for_each_method(rows: dict[str, Tree]) -> None:
    table = catalogue.method_table(list(rows.values()))
    names = [
        line.split()[0] for line in table.splitlines() if re.match(r"\w+ +[\d.]+ ?[kMB]? +[\d.]+%", line)
    ]
    assert names == list(rows)
    assert all(len(line) <= 140 for line in table.splitlines())


def test_the_table_speaks_chinese_too(rows: dict[str, Tree]) -> None:
    assert "首选" in catalogue.method_table(list(rows.values()), "zh")


@pytest.mark.parametrize(("language", "name"), [("en", "methods.md"), ("zh", "methods.zh-CN.md")])
def test_the_page_of_methods_is_what_its_script_writes(
    rows: dict[str, Tree], language: str, name: str
) -> None:
    spec = importlib.util.spec_from_file_location("methods_page", ROOT / "scripts/methods_page.py")
    assert spec
    assert spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    measured = json.loads(script.MEASURED.read_text())
    expected = script.page(language, list(rows.values()), measured)
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == expected, "run scripts/methods_page.py"
    assert set(measured["tasks"]["pico"]) == set(plugins.names("methods")) - {"scratch"}
