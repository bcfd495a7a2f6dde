"""What is asked before anything is trained is answered without the libraries that training needs."""

import subprocess
import sys
from pathlib import Path

import pytest

from tunewright import listing
from tunewright.core import plugins

HEAVY = ("torch", "transformers", "peft")


@pytest.mark.parametrize("what", [*plugins.ROOMS[1:], "data", "models", "templates"])
def test_each_has_a_line_of_its_own(what: str) -> None:
    rows = listing.listed(what)
    assert len({row["name"] for row in rows}) == len(rows) > 0
    lines = listing.lines(rows)
    assert [line.split()[0] for line in lines] == [row["name"] for row in rows]
    assert all(line.endswith(row["summary"]) for line, row in zip(lines, rows, strict=True))


def test_a_summary_is_that_of_the_module() -> None:
    for room in plugins.ROOMS:
        for name in plugins.names(room):
            first = (plugins.load(room, name).__doc__ or "").strip().splitlines()[0]
            assert plugins.summary(room, name) == first


def test_nothing_heavy_is_loaded_to_lint_or_to_list(tmp_path: Path) -> None:
    (tmp_path / "my.jsonl").write_text('{"prompt": "Say one.", "completion": "one"}\n')
    asked = [["lint", "my.jsonl"], *(["list", what] for what in (*plugins.ROOMS[1:], "data", "templates"))]
    code = (
        "import sys; from typer.testing import CliRunner; from tunewright import cli; "
        f"print([CliRunner().invoke(cli.app, words).exit_code for words in {asked}], "
        f"[name for name in {HEAVY} if name in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert said.strip() == f"{[0] * len(asked)} []"
