"""The demo's recipe and what it prints; how fast it learns is tested where nothing else runs."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from readme import ROOT

from tunewright import cli, demo


def test_the_demo_is_the_shipped_recipe_in_little_time():
    shipped = yaml.safe_load((ROOT / "recipes/auto.yaml").read_text())
    steps = {"epochs": 1.25, "tokens_per_batch": 1024, "micro_tokens": 1024}
    shorter = {"train": steps, "evaluate": {"max_new_tokens": 16}}
    assert {**shipped, **shorter} == demo.RECIPE


def test_demo_json(tmp_path, tiny_model_folder, monkeypatch, capsys):
    monkeypatch.setattr(
        demo, "RECIPE",
        {**demo.RECIPE, "model": str(tiny_model_folder), "train": {"max_steps": 2, "tokens_per_batch": 256},
         "evaluate": {"limit": 20, "max_new_tokens": 2}},
    )  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["tunewright", "demo", "--output", str(tmp_path / "d"), "--json"])
    with pytest.raises(SystemExit):
        cli.main()
    result = json.loads(capsys.readouterr().out)
    assert result.keys() == {"before", "after", "seconds", "report"}
    assert Path(result["report"]).is_file()
    monkeypatch.setattr(sys, "argv", ["tunewright", "demo", "--output", str(tmp_path / "d")])
    with pytest.raises(SystemExit):
        cli.main()
    said = capsys.readouterr().out
    assert "Report:" in said
    assert said.count("    tunewright ") == 3
