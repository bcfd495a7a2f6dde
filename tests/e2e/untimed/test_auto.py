"""``method: auto`` from end to end: plans are tried in processes of their own, the run follows, its report tells both."""

import json
import subprocess
import sys


def test_a_recipe_that_leaves_its_method_open(tmp_path):
    path, out = tmp_path / "open.yaml", tmp_path / "runs" / "one"
    path.write_text(
        "model: builtin:pico\ndata: {train: builtin:demo-valid, valid_share: 0.03}\n"
        "method: {name: auto, tries: 1, rates: false}\nprecision: fp32\n"
        "train: {max_steps: 3, tokens_per_batch: 256, micro_tokens: 256}\nevaluate: {limit: 4, max_new_tokens: 4}\n"
        f"output: {out}\n"
    )
    command = [sys.executable, "-m", "tunewright", "run", str(path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    stage = json.loads((out / "results.json").read_text())["stages"][0]
    method = stage["method"]["name"]
    assert f"trying {method}: 10 steps" in said
    assert f"advised {method}: " in said
    told = stage["advised"]
    assert told["tried"] == 3
    assert any("Tried for 3 steps" in why for why in told["why"])
    assert 0.8 < told["memory"] / stage["train"]["peak_memory"] < 1.1
    page = (out / "report.html").read_text()
    assert page.index(f"Why {method}") < page.index("How well it was foretold")
    events = (out / "events.jsonl").read_text()
    assert events.count('"kind": "advised"') == 1
