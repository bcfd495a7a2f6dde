"""How fast a real model learns real text, on all cores."""

import tunewright as tw
from tunewright.models import wide

SLOWER = 1.0 if wide.why_not() else 1.5
"""As in test_readme.py."""


def test_stories260k_learns_shakespeare_in_a_minute(shared_fixtures, tmp_path):
    def once(name: str) -> dict:
        run = tw.run(
            {
                "model": str(shared_fixtures / "models/stories260k"),
                "data": {"train": str(shared_fixtures / "text/shakespeare_plays.txt"), "valid_share": 0.02},
                "objective": {"name": "pretrain", "block": 128},
                "method": "full",
                "precision": "fp32",
                "train": {"max_steps": 150, "lr": 4e-3, "tokens_per_batch": 4096},
                "output": str(tmp_path / name),
            },
            quiet=True,
        )
        return run.results["stages"][0]

    stage = once("run")
    assert stage["after"]["loss"] <= 0.85 * stage["before"]["loss"]
    if stage["train"]["seconds"] >= SLOWER * 60:  # what else a machine does only ever adds to it
        stage = once("again")
    assert stage["train"]["seconds"] < SLOWER * 60
