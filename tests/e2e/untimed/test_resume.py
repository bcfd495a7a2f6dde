"""A run killed at any moment ends, when started again, with the same bytes as one that was not.

Here from the shell, once: fault tests do so for every objective and precision, contract tests for every method.
"""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from safetensors.numpy import load_file

STEPS = 12


def command(recipe: Path, output: Path) -> list[str]:
    return [sys.executable, "-m", "tunewright", "run", str(recipe), f"output={output}"]


def steps_so_far(output: Path) -> int:
    log = output / "events.jsonl"
    lines = log.read_bytes().split(b"\n")[:-1] if log.exists() else []
    return max((json.loads(line).get("step", 0) for line in lines), default=0)


def kill_at(recipe: Path, output: Path, step: int) -> None:
    """Start the run and SIGKILL it once the step is done."""
    process = subprocess.Popen(command(recipe, output), stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None and steps_so_far(output) < step:
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def test_killed_and_resumed_gives_the_same_bytes(tmp_path, tiny_model_folder):
    data = tmp_path / "my.jsonl"
    data.write_text(
        "\n".join(json.dumps({"prompt": f"Say {n}.", "completion": f"{n} it is"}) for n in range(60))
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {tiny_model_folder}\ndata: {{train: {data}, valid_share: 0.1}}\nmethod: {{name: lora, dropout: 0.1}}\n"
        f"train: {{max_steps: {STEPS}, lr: 1.0e-3, tokens_per_batch: 96, micro_tokens: 32, save_every: 2, "
        "eval_every: 3}\nevaluate: {generate: false}\n"
    )
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    subprocess.run(command(recipe, whole), check=True, stderr=subprocess.DEVNULL)
    kill_at(recipe, broken, 5)
    assert not (broken / "results.json").exists()
    kill_at(recipe, broken, 9)
    done = subprocess.run(command(recipe, broken), check=True, stderr=subprocess.PIPE, text=True)
    assert "resumed from the checkpoint of step" in done.stderr

    adapter = "stages/sft/adapter/adapter_model.safetensors"
    assert (whole / adapter).read_bytes() == (broken / adapter).read_bytes()
    last = f"stages/sft/checkpoints/step-{STEPS:08d}/optimizer.safetensors"
    kept, resumed = load_file(whole / last), load_file(broken / last)
    assert kept.keys() == resumed.keys()
    assert all((kept[name] == resumed[name]).all() for name in kept)
