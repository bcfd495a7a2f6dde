"""Runs in processes of their own: how one that failed is told, and when enough steps were made."""

import math
import subprocess
import sys
from pathlib import Path

from tunewright import children
from tunewright.core.journal import Journal


def test_a_child_that_the_system_killed_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("one\ntwo\n")
    assert "memory" in children._reason(-9, "", tmp_path / "log")
    assert children._reason(-11, "", tmp_path / "log") == "ended by SIGSEGV: two"


def test_a_few_steps_are_enough_once_they_took_long(tmp_path: Path) -> None:
    log = tmp_path / "events.jsonl"
    assert not children._is_enough(log, 2, math.inf)
    journal = Journal(log)
    for number in range(5):
        assert not children._is_enough(log, 9, 30.0)
        journal.append({"kind": "step", "time": 10.0 * number})
    assert children._is_enough(log, 9, 30.0)
    assert not children._is_enough(log, 9, 50.0)
    assert children._is_enough(log, 5, 50.0)


def test_a_pace_is_that_of_warm_steps() -> None:
    times = [4.0, 7.0, 9.0, 11.0, 13.0]
    steps = [{"kind": "step", "step": n, "time": time, "tokens": 100 * n} for n, time in enumerate(times, 1)]
    begun = [{"kind": "train", "time": 0.0}, *steps]
    assert children.Begun(begun, "").pace() == children.Pace(50.0, 2.0, 3.0)
    assert children.Begun(begun[:2], "").pace() == children.Pace(25.0, 4.0, 0.0)
    assert children.Begun(begun[:4], "").pace() == children.Pace(300 / 9, 3.0, 0.0)


def test_what_does_not_begin_is_told(tmp_path: Path) -> None:
    begun = children.first_steps("model: nowhere\ndata: x.jsonl\n", tmp_path / "run", tmp_path, "one", 3)
    assert "nowhere" in begun.reason
    assert begun.of("step") == []


def test_nothing_heavy_is_loaded_to_try_plans() -> None:
    code = "import sys, tunewright.probe; print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
