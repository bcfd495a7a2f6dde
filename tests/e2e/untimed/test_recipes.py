"""Every shipped recipe runs."""

from pathlib import Path

import pytest
import yaml

import tunewright as tw

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_recipe_is_valid_and_begins(path, tmp_path, tiny_model_folder):
    """Each recipe runs for two steps on a tiny model."""
    if "../shared/" in path.read_text() and not (ROOT.parent / "shared").exists():
        pytest.skip("its data are not here")
    short = {"max_steps": 2, "tokens_per_batch": 512, "eval_every": 0, "save_every": 0}
    stages = yaml.safe_load(path.read_text()).get("stages", [])
    if stages:  # their data are their own
        more = {f"stages.{n}.train.{key}": value for n in range(len(stages)) for key, value in short.items()}
    else:
        valid = "builtin:pico-corpus-valid" if path.stem.startswith("pretrain") else []
        more = {"data": {"train": "builtin:demo-valid", "valid": valid}, "train": short}
    run = tw.run(
        path, fast={"compile": False}, model=str(tiny_model_folder), output=str(tmp_path / "run"), quiet=True,
        evaluate={"limit": 4, "max_new_tokens": 2}, **more,
    )  # fmt: skip
    assert run.results["status"] == "finished"
