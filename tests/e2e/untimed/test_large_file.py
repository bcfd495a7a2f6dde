"""A file larger than what training holds in memory; ``TUNEWRIGHT_LARGE_MB=1024`` makes it a gigabyte."""

import json
import os
import subprocess
import sys
from pathlib import Path

SIZE_MB = int(os.environ.get("TUNEWRIGHT_LARGE_MB", "24"))
LIMIT_MB = 2048 if SIZE_MB >= 1024 else 900
"""The libraries alone take 500 MB or so; the smaller file must not need much more."""
ANSWER = "the quick brown fox jumps over the lazy dog and then goes home to sleep under the old tree. " * 10


def write_rows(path: Path, megabytes: int) -> None:
    with path.open("w") as file:
        number = 0
        while file.tell() < megabytes << 20:
            for _ in range(1000):
                file.write(
                    json.dumps({"prompt": f"Tell me story number {number}.", "completion": ANSWER}) + "\n"
                )
                number += 1


def test_a_large_file_trains_in_little_memory(tmp_path, tiny_model_folder):
    data = tmp_path / "large.jsonl"
    write_rows(data, SIZE_MB)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {tiny_model_folder}\ndata: {{train: {data}, valid_share: 0, max_length: 128}}\n"
        f"train: {{max_steps: 3, tokens_per_batch: 1024}}\noutput: {tmp_path / 'run'}\n"
    )
    command = [sys.executable, "-m", "tunewright", "run", str(recipe), "--json"]
    environment = {**os.environ, "TUNEWRIGHT_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    stage = json.loads(done.stdout)["results"]["stages"][0]
    assert stage["data"]["train"]["files"][0]["rows"] > SIZE_MB * 900
    assert stage["train"]["peak_memory"] < LIMIT_MB << 20, f"{stage['train']['peak_memory'] >> 20} MB"
