"""What the README promises of time: the demo's gain in ninety seconds, on all cores; help in a third of a second."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import readme

from tunewright.models import wide

SLOWER = 1.0 if wide.why_not() else 1.5
"""A processor without instructions for bf16 has narrow vectors, too: what is promised of others takes half as long again."""


def test_the_demo_gains_sixty_points_in_ninety_seconds(tmp_path):
    """With the commands that look at its run."""
    out = readme.typed(readme.commands(of_the_demo=True), tmp_path)
    stage = json.loads((tmp_path / "runs/demo/results.json").read_text())["stages"][0]
    assert stage["after"]["exact_match"] - stage["before"]["exact_match"] >= 0.60
    assert stage["after"]["loss"] < stage["before"]["loss"]
    assert stage["data"]["train"]["samples"] >= 2000
    assert stage["after"]["count"] >= 300
    assert len(stage["after"]["families"]) == 10
    seconds = float(re.search(r"; (\d+) s in all", out)[1])
    assert seconds < SLOWER * 90
    page = (tmp_path / "runs/demo/report.html").read_text()
    assert "<svg" in page
    assert "Samples side by side" in page
    assert page.index("Chosen by the advisor") < page.index("How well it was foretold")


def test_help_answers_in_under_a_third_of_a_second():
    def once() -> float:
        began = time.monotonic()
        subprocess.run(
            [Path(sys.executable).parent / "tunewright", "--help"], check=True, capture_output=True
        )
        return time.monotonic() - began

    assert min(once() for _ in range(3)) < 0.3
