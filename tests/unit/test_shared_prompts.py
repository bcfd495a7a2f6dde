"""Prompts that several answers share: computed once, with each answer's loss and gradients as if it stood alone."""

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from techniques import SHAPE, VOCABULARY, assert_near, learn, work
from torch import Tensor
from torch.library import opcheck
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import tunewright as tw
from tunewright.core import events
from tunewright.data.tokens import LENGTH
from tunewright.fast import _shared_attention
from tunewright.fast.shared_prompts import SharedPrompts, shared
from tunewright.models import likelihood


def group(*parts: tuple[int, int, int], seed: int = 0) -> dict[str, Tensor]:
    """Rows of (which prompt, its length, its answer's length): answers are learned, prompts are alike by their number."""
    longest = max(asked + said for _, asked, said in parts)
    ids_BT = torch.zeros(len(parts), longest, dtype=torch.long)
    labels_BT = torch.full_like(ids_BT, likelihood.IGNORED)
    said_by = torch.Generator().manual_seed(seed)
    for row, (prompt, asked, said) in enumerate(parts):
        of_prompt = torch.Generator().manual_seed(1000 + prompt)
        ids_BT[row, :asked] = torch.randint(1, VOCABULARY, (200,), generator=of_prompt)[:asked]
        ids_BT[row, asked : asked + said] = torch.randint(1, VOCABULARY, (said,), generator=said_by)
        labels_BT[row, asked - 1 : asked + said - 1] = ids_BT[row, asked : asked + said]
    lengths_B = torch.tensor([asked + said for _, asked, said in parts])
    return {"input_ids": ids_BT, "labels": labels_BT, LENGTH: lengths_B}


PAIRS = ((0, 20, 9), (1, 30, 4), (0, 20, 15), (1, 30, 7))
GROUP = tuple((0, 25, n) for n in (3, 9, 1, 6))
MIXED = ((0, 12, 5), (2, 9, 30), (0, 12, 6), (3, 40, 2), (0, 12, 1), (3, 40, 8))


def make(kind: str = "llama", **more: Any) -> Any:
    torch.manual_seed(0)
    if kind == "gpt2":
        sizes = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
        off = {
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "bos_token_id": None,
            "eos_token_id": None,
        }
        return GPT2LMHeadModel(GPT2Config(**{**sizes, **off, "initializer_range": 0.2, **more})).train()
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, **more})).train()


@pytest.mark.parametrize("parts", [PAIRS, GROUP, MIXED], ids=["pairs", "group", "mixed"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_losses_and_gradients_are_those_of_whole_rows(kind: str, parts: Any) -> None:
    model, given = make(kind), group(*parts)
    plain = learn(model, given)
    technique = SharedPrompts()
    assert technique.why_not(work(model, given)) == ""
    with technique.on(work(model, given)):
        assert_near(learn(model, given), plain)
    assert torch.equal(learn(model, given)[0], plain[0])


@pytest.mark.parametrize("width", [32, 64])
def test_on_matrix_units_it_is_as_near_to_the_exact_result_as_whole_rows(width: int) -> None:
    model, given = make(head_dim=width), group(*MIXED)
    exact = learn(model.double(), given)
    rough = model.bfloat16()
    plain = learn(rough, given)
    with SharedPrompts().on(work(rough, given)):
        own = learn(rough, given)
    for name, right in exact[1].items():
        error, allowed = ((found[1][name].double() - right).norm() for found in (own, plain))
        assert error <= 1.5 * allowed, name


def test_fewer_tokens_go_through_the_model() -> None:
    model, given = make(), group(*((0, 200, n) for n in (3, 9, 1, 6)))
    seen: list[int] = []
    model.model.layers[0].mlp.register_forward_hook(lambda m, args, out: seen.append(out.shape[1]))
    with SharedPrompts().on(work(model, given)):
        learn(model, given)
    assert seen == [
        224
    ]  # 200 and 19 and 3 tokens at which the first answers begin, filled up; whole rows have 819


def test_who_shares_what() -> None:
    owners, counts = shared(group(*PAIRS))
    assert sorted(counts) == [0, 0, 19, 29]  # all of a prompt but its last token, at which the answers differ
    assert [owners[i] == i for i in range(4)] == [count == 0 for count in counts]
    assert all(PAIRS[owner][0] == PAIRS[row][0] for row, owner in enumerate(owners))
    assert shared(group((0, 8, 3), (0, 8, 4)))[1] == [0, 0]  # too little


def test_a_row_leaves_nothing_that_it_learns() -> None:
    given = group(*GROUP)
    given["labels"][:, :24] = given["input_ids"][:, 1:25]  # all of it is learned
    assert shared(given)[1] == [0, 0, 0, 0]


def test_questions_that_only_begin_alike_are_shared_with_their_own_kind() -> None:
    given = group(*PAIRS)
    given["input_ids"][:, :9] = 7  # a system prompt, as it were
    assert sorted(shared(given)[1]) == [0, 0, 19, 29]
    instructions = group(*((prompt, 30, 5) for prompt in range(4)))
    instructions["input_ids"][:, :12] = 7
    assert sorted(shared(instructions)[1]) == [0, 12, 12, 12]


def test_a_long_beginning_is_worth_more_than_a_short_question_of_ones_own() -> None:
    given = group(*PAIRS)
    given["input_ids"][:, :18] = 7
    # Of the question that has 30 tokens both answers leave 18, or one leaves 29.
    owners, counts = shared(given)
    assert sorted(counts) == [0, 18, 18, 19]
    assert len(set(owners)) == 1


def test_answers_that_begin_alike_too_leave_only_their_prompt() -> None:
    given = group(*GROUP)
    given["input_ids"][1:, 25] = given["input_ids"][0, 25]
    assert sorted(shared(given)[1]) == [0, 24, 24, 24]


def most_saved(ids_BT: np.ndarray, free_B: np.ndarray) -> int:
    """By all ways of choosing who has tokens of their own: what the others leave to whichever serves them best."""
    rows = range(len(ids_BT))

    def left(row: int, owner: int) -> int:
        differ = np.flatnonzero(ids_BT[row] != ids_BT[owner])
        count = min(int(differ[0]), int(free_B[row]))
        return count if count >= 8 else 0

    choices = (owners for size in rows for owners in combinations(rows, size + 1))
    return max(
        sum(max(left(row, owner) for owner in owners) for row in rows if row not in owners)
        for owners in choices
    )


def test_rows_leave_what_they_have_in_common_and_nine_tenths_of_the_most_that_can_be() -> None:
    draw, saved, most = np.random.default_rng(0), 0, 0
    for _ in range(60):
        rows = int(draw.integers(2, 7))
        lengths_B = draw.integers(30, 40, rows)
        ids_BT = np.zeros((rows, 40), np.int64)
        for row, length in enumerate(lengths_B):
            ids_BT[row, :length] = draw.integers(1, 9, length)
            if row and draw.random() < 0.8:
                begun = int(draw.integers(5, 25))
                ids_BT[row, :begun] = ids_BT[draw.integers(row), :begun]
        labels_BT = np.full_like(ids_BT, likelihood.IGNORED)
        labels_BT[np.arange(rows), lengths_B - 3] = 1
        given = {"input_ids": ids_BT, "labels": labels_BT, LENGTH: lengths_B}
        owners, counts = shared({name: torch.from_numpy(x) for name, x in given.items()})
        for row, (owner, count) in enumerate(zip(owners, counts, strict=True)):
            assert (ids_BT[row, :count] == ids_BT[owner, :count]).all()
            assert count <= lengths_B[row] - 3
            assert counts[owner] == 0
        saved, most = saved + sum(counts), most + most_saved(ids_BT, lengths_B - 3)
    assert 0.9 * most <= saved <= most


@pytest.mark.parametrize("alike", [0, 30])
def test_rows_that_begin_alike_are_told_from_others(alike: int) -> None:
    given = group(*((prompt, 40, 9) for prompt in range(5)))
    given["input_ids"][:, :alike] = 7
    reason = SharedPrompts().not_worth(work(make(), given))
    assert reason == ("" if alike else "samples do not begin alike")


def test_where_it_cannot_be() -> None:
    model, given = make(), group(*PAIRS)
    assert "do not begin alike" in SharedPrompts().not_worth(work(model, group((0, 30, 5), (1, 30, 5))))
    assert SharedPrompts().not_worth(work(model, given, answers=True)) == ""
    assert "drops at random" in SharedPrompts().why_not(work(make("gpt2", attn_pdrop=0.1), given))
    model.config._attn_implementation = "eager"
    assert SharedPrompts().why_not(work(model, given)) == "the model's attention is eager"


def test_operations_are_what_they_are_declared_to_be() -> None:
    query, key, value = (torch.randn(1, n, 40, 32).requires_grad_() for n in (4, 2, 2))
    ends, prefixes = (
        torch.tensor([0, 20, 28, 33], dtype=torch.int32),
        torch.tensor([[0, 0], [0, 12], [0, 15]]),
    )
    opcheck(_shared_attention._attend, (query, key, value, ends, prefixes, 0.2))


@pytest.mark.parametrize(
    "objective", [{"name": "dpo", "beta": 0.3}, {"name": "orpo"}, {"name": "grpo", "group": 3, "longest": 6}]
)
def test_a_run_learns_the_same(tiny_model_folder: Path, tmp_path: Path, objective: dict[str, Any]) -> None:
    worth = tmp_path / "worth.py"
    worth.write_text("def worth(asked, answer):\n    return len(answer) % 7\n")
    if objective["name"] == "grpo":
        objective = {**objective, "rewards": [f"{worth}:worth"]}
    found = {}
    for on in (False, True):
        run = tw.run({
            "model": str(tiny_model_folder), "data": "builtin:polite-valid" if objective["name"] != "grpo" else "builtin:sums-valid",
            "objective": objective, "method": "full", "precision": "fp32", "evaluate": {"enabled": False},
            "output": str(tmp_path / f"run-{on}"), "train": {"max_steps": 3, "lr": 1e-3, "tokens_per_batch": 512},
            "fast": {"shared_prompts": on, "packing": False, "compile": False},
        }, quiet=True)  # fmt: skip
        found[on] = [
            event["loss"] for event in events.read(run.folder / "events.jsonl") if event["kind"] == "step"
        ]
        assert ("shared_prompts" in run.results["stages"][0]["fast"]) is on
    assert found[True] == pytest.approx(found[False], rel=1e-4, abs=1e-6)


def test_attention_that_is_not_plain_is_refused_and_not_computed_wrongly() -> None:
    model, given = make(), group(*PAIRS)
    with SharedPrompts().on(work(model, given)):
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.5
        with pytest.raises(ValueError, match="only where attention is plain"):
            learn(model, given)


def test_rows_with_one_system_prompt_learn_the_same(tiny_model_folder: Path, tmp_path: Path) -> None:
    system = {"role": "system", "content": "Answer with one word, and never say why. " * 3}
    turns = [(f"What comes after {n}?", f"{n + 1}") for n in range(40)]
    talks = [
        [system, {"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        for asked, said in turns
    ]
    data = tmp_path / "talks.jsonl"
    data.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    found = {}
    for on in (None, False):
        run = tw.run({
            "model": str(tiny_model_folder), "data": {"train": str(data), "valid_share": 0}, "method": "full", "precision": "fp32",
            "output": str(tmp_path / f"run-{on}"), "evaluate": {"enabled": False},
            "train": {"max_steps": 3, "lr": 1e-3, "tokens_per_batch": 1024, "micro_tokens": 256},
            "fast": {"compile": False} if on is None else {"compile": False, "shared_prompts": on},
        }, quiet=True)  # fmt: skip
        found[on] = [
            event["loss"] for event in events.read(run.folder / "events.jsonl") if event["kind"] == "step"
        ]
        assert ("shared_prompts" in run.results["stages"][0]["fast"]) is (on is None)
    assert found[None] == pytest.approx(found[False], rel=1e-4, abs=1e-6)
