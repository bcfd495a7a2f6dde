"""LISA: what is trained when, what is in memory, and that a killed run goes on bit for bit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training import OTHERS, MakeTrainer, killed_and_whole, losses, same, weights
from transformers import GPT2Config, GPT2LMHeadModel

from tunewright.core.errors import ModelError
from tunewright.methods import Clock
from tunewright.methods.lisa import Config, Lisa
from tunewright.models.load import find, load_model, outline

PERIOD, SEED = 3, 1
"""Of two blocks the second, the first, the second, the first are drawn."""
LISA = {"name": "lisa", "active": 1, "period": PERIOD}


def lisa(**options: Any) -> Lisa:
    return Lisa(Config(**options))


def drawn(step: int, seed: int = SEED, blocks: int = 2, **options: Any) -> set[int]:
    return lisa(**{"active": 1, "period": PERIOD, **options}).drawn(Clock(step, 100, seed), blocks)


def blocks_of(names: Any) -> set[int]:
    return {int(name.split(".")[2]) for name in names if name.startswith("model.layers.")}


# What is drawn


def test_a_draw_holds_for_a_period_and_follows_from_seed_and_period() -> None:
    draws = [drawn(step, blocks=32, active=4) for step in range(30)]
    assert all(len(draw) == 4 for draw in draws)
    for start in range(0, 30, PERIOD):
        assert all(draw == draws[start] for draw in draws[start : start + PERIOD])
    assert len({frozenset(draw) for draw in draws}) == 10
    assert draws[:3] != [drawn(step, seed=2, blocks=32, active=4) for step in range(3)]


def test_all_blocks_are_drawn_equally_often() -> None:
    found = np.bincount([i for step in range(0, 3 * 2000, 3) for i in drawn(step, blocks=8, active=2)])
    assert found.sum() == 2 * 2000
    assert abs(found - 500).max() < 5 * np.sqrt(2000 * 0.25 * 0.75)


def test_more_than_there_are_cannot_be_drawn(make_model: Any) -> None:
    (problem,) = lisa(active=3).problems(make_model())
    assert (problem.where, problem.fix) == ("method.active", "give at most 2")
    with pytest.raises(ModelError, match="3 blocks at a time, but the model has 2"):
        lisa(active=3).apply(make_model())


# What is trained and what is in memory


class Look:
    """Notes at each step what has masters and state, and the weights."""

    trainer: Any

    def __init__(self) -> None:
        self.active: list[set[int]] = []
        self.weights: list[dict[str, torch.Tensor]] = []
        self.held: list[int] = []

    def __call__(self, event: Any) -> None:
        if event["kind"] == "step":
            optimizer = self.trainer.optimizer
            assert {name.partition("|")[0] for name in optimizer.state()} == set(optimizer.masters)
            self.active.append(blocks_of(optimizer.masters))
            self.held.append(sum(master.numel() for master in optimizer.masters.values()))
            self.weights.append(weights(self.trainer))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_only_what_is_active_has_masters_and_moves(make_trainer: MakeTrainer, precision: str) -> None:
    look = Look()
    trainer = look.trainer = make_trainer(
        method=LISA, precision=precision, lr=0.01, max_steps=12, seed=SEED, readers=[look]
    )
    most = trainer.method.at_once(trainer.model)
    started_with = {name: p.numel() for name, p in trainer.optimizer.masters.items()}
    assert sum(started_with.values()) == most < trainer.method.count(trainer.model)
    before = weights(trainer)
    trainer.run()
    assert look.active == [drawn(step) for step in range(12)]
    assert set.union(*look.active) == {0, 1}
    assert look.held == [most] * 12
    for active, after in zip(look.active, look.weights, strict=True):
        changed = {name for name in after if not torch.equal(after[name], before[name])}
        assert blocks_of(changed) == active
        assert {"model.embed_tokens.weight", "lm_head.weight"} <= changed
        before = after


def test_what_may_be_trained_is_everything(tiny_model_folder: Path) -> None:
    shape = outline(find(str(tiny_model_folder)))
    assert lisa().count(shape) == sum(p.numel() for p in shape.parameters())
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_head=4, n_layer=6))
    block = sum(p.numel() for p in gpt2.transformer.h[0].parameters())
    assert lisa(active=2).at_once(gpt2) == lisa().count(gpt2) - 4 * block


def test_all_blocks_at_a_time_are_full_fine_tuning(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    for name, method in (("full", "full"), ("lisa", {"name": "lisa", "active": 2, "period": 1})):
        make_trainer(method=method, folder=name, lr=0.01, max_steps=4).run()
    assert losses(tmp_path, "lisa") == losses(tmp_path, "full")


# Resuming


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("killed_at", [2, 3, 4, 5, 9, 12])
def test_a_killed_run_goes_on_bit_for_bit(
    make_trainer: MakeTrainer, tmp_path: Path, precision: str, killed_at: int
) -> None:
    """Checkpoints lie in the middle of a period, at its last step, and after others were drawn."""
    assert drawn(0) != drawn(3) != drawn(6) != drawn(9)
    settings = {
        "method": LISA, "precision": precision, "lr": 0.01, "max_steps": 12, "micro_tokens": 32,
        "valid": OTHERS, "eval_every": 4, "save_every": 1, "seed": SEED,
    }  # fmt: skip
    killed_and_whole(make_trainer, tmp_path, killed_at, **settings)
    expected = losses(tmp_path, "whole")
    assert losses(tmp_path, "killed") == expected[:killed_at] + expected[killed_at - 1 :]


def test_it_saves_an_ordinary_model(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(method=LISA, lr=0.01, max_steps=4)
    trainer.run()
    trainer.method.export(trainer.model, tmp_path / "saved")
    again = load_model(find(str(tmp_path / "saved")))
    assert same(again.state_dict(), trainer.model.state_dict())
