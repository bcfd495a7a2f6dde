"""A comparison from the command line: methods are tried, trials reused, runs and models asked."""

import json
import shutil
import sys

import pytest

import tunewright as tw
from tunewright import cli
from tunewright.core import store


@pytest.fixture
def tunewright(capsys, monkeypatch):
    """Runs the command line in this process: (exit code, the JSON it printed)."""

    def call(*argv: object) -> tuple[int, dict]:
        monkeypatch.setattr(sys, "argv", ["tunewright", *map(str, argv), "--json"])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return stopped.value.code or 0, json.loads(capsys.readouterr().out.splitlines()[-1])

    return call


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "little.yaml"
    path.write_text(
        "model: builtin:pico\ndata: {train: builtin:demo-valid, valid_share: 0.03}\nprecision: fp32\n"
        "train: {max_steps: 2, tokens_per_batch: 256, save_every: 0}\nevaluate: {limit: 4, max_new_tokens: 4}\n"
    )
    return path


def test_methods_are_tried_and_trials_reused(tunewright, recipe, tmp_path):
    out = tmp_path / "out"
    command = ("compare", recipe, "--method", "lora,bitfit", "--sweep", "method.rank=2", "--out", out)
    code, first = tunewright(*command)
    assert code == 0
    assert [row["name"] for row in first["rows"]] == ["lora, rank 2", "bitfit"]
    for row in first["rows"]:
        assert not row["failed"]
        assert row["seconds"] > 0
        assert row["latency"]["merged"]
        assert row["peak_memory"] > 1e8
    assert "One seed: differences may be chance." in first["verdict"]["en"]
    page = (out / "report.html").read_text()
    assert "最好" in page and "Quality against cost" in page and "Training loss over steps" in page
    for name in ("comparison.csv", "comparison.png"):
        assert (out / name).stat().st_size > 100
    kept, gone = (out / "trials" / f"{name}-seed-0" for name in ("lora-rank-2", "bitfit"))
    before = (kept / "events.jsonl").read_bytes()
    shutil.rmtree(gone)
    code, again = tunewright(*command)
    assert code == 0
    assert (kept / "events.jsonl").read_bytes() == before
    assert [row["quality"] for row in again["rows"]] == [row["quality"] for row in first["rows"]]

    code, refused = tunewright(*command, "train.max_steps=3")
    assert code == 2
    assert len(refused["problems"]) == 2

    held_out = tmp_path / "held.jsonl"
    held_out.write_text('{"prompt": "Say one.", "completion": "one"}\n')
    asked = tw.compare(
        [str(kept), "builtin:pico"], held_out=str(held_out), out=str(tmp_path / "asked"), quiet=True
    )
    assert [row["name"] for row in asked.results["rows"]] == ["lora-rank-2-seed-0", "builtin:pico"]
    assert asked.results["rows"][0]["seconds"] == first["rows"][0]["seconds"]
    assert asked.results["rows"][1]["seconds"] is None
    assert store.read_record(asked.folder / "comparison.json") == asked.results
    assert asked.report.exists()
