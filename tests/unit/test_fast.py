"""Which techniques a training uses, and why not the others; what a recipe, the doctor and the loop make of them."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from techniques import SHAPE, batch, learn, work
from torch import Tensor, nn
from training import OTHERS, MakeTrainer, kill_at, killed_and_whole, logged, losses
from transformers import LlamaConfig, LlamaForCausalLM

from tunewright import doctor, fast, listing
from tunewright.core import store
from tunewright.core.errors import RecipeError
from tunewright.fast import _native
from tunewright.fast.compile import Compile
from tunewright.fast.micro_batch import MicroBatch
from tunewright.models import likelihood
from tunewright.models.announce import listening
from tunewright.recipes import load

TECHNIQUES = {"arena", "attention", "checkpointing", "compile", "cross_entropy", "frozen_layers", "lora_linear",
              "micro_batch", "offload", "packing", "process", "shared_prompts", "weight_gradients", "wide_products"}  # fmt: skip


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What other tests found on this machine is not here."""
    monkeypatch.setenv("TUNEWRIGHT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def llama(**own: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, **own)).train()


# Which are on


def test_the_one_that_measures_comes_after_all_others() -> None:
    names = fast.names()
    assert set(names) == TECHNIQUES
    assert names == [*sorted(TECHNIQUES - {"micro_batch"}), "micro_batch"]


def test_if_nothing_is_said_those_are_on_that_pay() -> None:
    found = fast.reasons(True, work(llama()))
    assert set(found) == TECHNIQUES
    assert {name for name, reason in found.items() if not reason} >= {"attention", "cross_entropy", "packing"}
    assert "do not pay" in found["compile"]
    assert "ask for it by name" in found["offload"]
    assert "64 tokens were given" in found["micro_batch"]
    assert found == fast.reasons({}, work(llama()))


def test_one_that_is_named_is_on_wherever_it_can_do_anything() -> None:
    plain = fast.reasons(True, work(llama()))
    found = fast.reasons({"offload": True, "lora_linear": True, "attention": False}, work(llama()))
    assert found == {**plain, "offload": "", "attention": "switched off"}
    assert found["lora_linear"]


def test_all_can_be_switched_off() -> None:
    assert fast.reasons(False, work(llama())) == dict.fromkeys(fast.names(), "switched off")


@pytest.mark.parametrize("broken", [False, True])
def test_all_end_with_the_training_also_with_an_error(broken: bool) -> None:
    model, told = llama(), list[dict[str, str]]()
    plain, before = learn(model, batch(9, 12)), {m: dict(vars(m)) for m in model.modules()}
    try:
        with fast.using(True, work(model), told.append):
            learn(model, batch(9, 12))
            assert model.config._attn_implementation == "tunewright_causal"
            assert 1 // (not broken)
    except ZeroDivisionError:
        assert broken
    assert told == [fast.reasons(True, work(model))]
    assert model.config._attn_implementation == "sdpa"
    assert {m: set(vars(m)) for m in model.modules()} == {m: set(own) for m, own in before.items()}
    after = learn(model, batch(9, 12))
    assert torch.equal(after[0], plain[0])
    assert all(torch.equal(after[1][name], gradient) for name, gradient in plain[1].items())


# Looking at the first rows


@dataclass
class Listener:
    batch: Mapping[str, Tensor] = field(default_factory=dict)


@pytest.mark.parametrize("training", [False, True])
def test_a_look_learns_nothing_and_is_announced(training: bool) -> None:
    model, listener, seen = llama().train(training), Listener(), list[Mapping[str, Tensor]]()

    def compute(given: Mapping[str, Tensor]) -> None:
        assert not model.training
        assert not torch.is_grad_enabled()
        assert listener.batch is given
        seen.append(given)

    with listening(model, listener):
        fast.look(work(model, batch(3, 4, 5)), compute, rows=2)
    assert model.training == training
    assert {name: len(tensor) for name, tensor in seen[0].items()} == dict.fromkeys(seen[0], 2)
    assert not listener.batch


def test_a_look_lets_the_model_compute_and_ends_with_its_error() -> None:
    model, rows = llama(), list[int]()
    model.model.register_forward_hook(lambda *given: rows.append(len(given[2][0])))
    fast.look(work(model), partial(fast.through, model))
    assert rows == [1]
    with pytest.raises(IndexError):
        unknown = {"input_ids": torch.tensor([[SHAPE["vocab_size"]]])}
        fast.look(work(model, unknown), partial(fast.through, model))
    assert model.training


# Compiling


def test_compiling_pays_for_a_long_training_only() -> None:
    model = llama()
    count = sum(p.numel() for p in model.parameters())
    seconds = 32.0  # at 1e12 operations a second, 4 of each parameter for each token; a quarter is saved
    for share, pays in ((0.9, False), (1.1, True)):
        reason = Compile().not_worth(work(model, tokens=round(share * seconds * 1e12 / (4 * count))))
        assert (reason == "") == pays
        assert pays or reason == "about 29 seconds of training do not pay for compiling"


def test_compiling_needs_blocks_and_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Compile().why_not(work(nn.Linear(2, 2))) == "the model has no decoder blocks"
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert Compile().why_not(work(llama())) == "there is no C++ compiler"
    monkeypatch.setenv("CXX", "python3")
    assert Compile().why_not(work(llama())) == ""


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # what torch.compile imports
def test_only_what_learns_is_compiled() -> None:
    model, ids_BT = llama(), batch(9, 12)["input_ids"]
    with torch.no_grad():
        trained, measured = model(ids_BT).logits, model.eval()(ids_BT).logits
        with Compile().on(work(model)):
            assert all(block._compiled_call_impl for block in model.model.layers)
            assert torch.equal(model(ids_BT).logits, measured)
            assert torch.equal(model.train()(ids_BT).logits, trained)
    assert not any(block._compiled_call_impl for block in model.model.layers)


def test_what_is_compiled_is_kept_with_what_else_is(tmp_path: Path) -> None:
    """PyTorch settles on a folder of its own as it is imported."""
    asked = "import tunewright, torch._dynamo\nfrom torch._inductor.runtime.cache_dir_utils import cache_dir\nprint(cache_dir())"
    own = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    environment = {**own, "TUNEWRIGHT_CACHE": str(tmp_path)}
    told = subprocess.run(
        [sys.executable, "-c", asked], env=environment, capture_output=True, text=True, check=True
    )
    assert told.stdout.strip() == str(tmp_path / "compiled")


# The number of tokens at a time


@dataclass
class Tries:
    """A step whose seconds are known for every number of tokens."""

    seconds: dict[int, float]
    given: int | None = None
    tried: list[int] = field(default_factory=list)
    taken: list[int] = field(default_factory=list)

    def work(self, model: Any, steps: int = 1000) -> fast.Work:
        def measure(tokens: int) -> float:
            self.tried.append(tokens)
            return self.seconds[tokens]

        portion = fast.Portion(max(self.seconds), self.given, measure, self.taken.append)
        return work(model, steps=steps, portion=portion)

    def use(self, model: Any, **more: Any) -> None:
        with MicroBatch().on(self.work(model, **more)):
            assert len(self.taken) == 1


SECONDS = {4096: 3.0, 2048: 1.5, 1024: 1.2, 512: 1.4}


@pytest.mark.parametrize(
    ("units", "whole", "given", "taken"),
    [
        (True, 8192, None, [4096]), (True, 3000, None, [3000]), (True, 8192, 512, []),
        (False, 8192, None, [1024]), (False, 700, None, [700]),
    ],
)  # fmt: skip
def test_of_compiled_blocks_so_little_is_kept_on_matrix_units_that_more_tokens_are_taken(
    units: bool, whole: int, given: int | None, taken: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_native, "has_units", lambda: units)
    tries = Tries({whole: 1.0}, given)
    with Compile().on(tries.work(llama())):
        assert tries.taken == taken


@pytest.mark.parametrize(
    ("seconds", "fastest"),
    [
        (SECONDS, 1024),
        ({4096: math.inf, 2048: math.inf, 1024: 2.0, 512: 1.9}, 512),
        ({1024: 1.0, 512: 1.0}, 1024),
        ({900: 1.0}, 900),
    ],
)
@pytest.mark.usefixtures("cache")
def test_the_fastest_number_is_taken(seconds: dict[int, float], fastest: int) -> None:
    """What memory has no room for took infinitely long; fewer than 512 are not tried."""
    tries = Tries(seconds)
    tries.use(llama())
    assert tries.tried == 2 * list(seconds)
    assert tries.taken == [fastest]


@pytest.mark.usefixtures("cache")
def test_what_only_the_first_try_takes_does_not_count() -> None:
    tries = Tries({2048: 1.0, 1024: 1.2, 512: 1.5})

    def measure(tokens: int) -> float:
        tries.tried.append(tokens)
        return 5.0 if len(tries.tried) == 1 else tries.seconds[tokens]

    portion = fast.Portion(2048, None, measure, tries.taken.append)
    with MicroBatch().on(work(llama(), steps=1000, portion=portion)):
        assert tries.taken == [2048]


def test_it_is_remembered_for_the_same_work_on_this_machine(cache: Path) -> None:
    Tries(SECONDS).use(llama())
    again = Tries({4096: 0.0})
    again.use(llama())
    assert (again.tried, again.taken) == ([], [1024])
    for model, seconds in ((llama().bfloat16(), SECONDS), (llama(), {2048: 1.0, 1024: 2.0, 512: 3.0})):
        other = Tries(seconds)
        other.use(model)
        assert other.tried
    records = sorted((cache / "micro-batch").iterdir())
    assert len(records) == 3
    for record in records:
        record.write_text("{")
    damaged = Tries(SECONDS)
    damaged.use(llama())
    assert damaged.tried == 2 * list(SECONDS)


@pytest.mark.usefixtures("cache")
def test_trying_must_be_possible_and_worth_it() -> None:
    model = llama()
    assert "700 tokens were given" in MicroBatch().why_not(Tries(SECONDS, given=700).work(model))
    assert MicroBatch().why_not(Tries({1000: 1.0}).work(model)) == "a batch is too small to be cut"
    assert MicroBatch().why_not(Tries({1024: 1.0}).work(model)) == ""
    assert "159 steps are too few" in MicroBatch().not_worth(Tries(SECONDS).work(model, 159))
    assert MicroBatch().not_worth(Tries(SECONDS).work(model, 160)) == ""
    Tries(SECONDS).use(model)
    assert MicroBatch().not_worth(Tries(SECONDS).work(model, 1)) == ""


# In a recipe, and told


def recipe(**more: Any) -> Any:
    return load({"model": "builtin:pico", "data": "rows.jsonl", **more})


def test_a_recipe_has_them_all_or_by_name() -> None:
    assert recipe().stages[0].fast is True
    assert recipe(fast=False).stages[0].fast is False
    stages = [{"name": "one"}, {"name": "two", "fast": {"offload": True}}]
    one, two = recipe(fast={"packing": False}, stages=stages).stages
    assert one.fast == {"packing": False}
    assert two.fast == {"packing": False, "offload": True}


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (
            {"fast": {"atention": True}},
            "fast.atention: there is no such technique; fix: did you mean 'attention'?",
        ),
        (
            {"stages": [{"fast": {"cross-entropy": False}}]},
            "stages.0.fast.cross-entropy: there is no such technique; fix: did you mean 'cross_entropy'?",
        ),
        (
            {"fast": {"warp": True}},
            f"fast.warp: there is no such technique; fix: one of {', '.join(sorted(TECHNIQUES))}",
        ),
    ],
)
def test_a_name_that_is_none_is_refused_with_the_nearest(more: dict[str, Any], problem: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(**more)
    assert str(caught.value) == problem


@pytest.mark.parametrize("wrong", ["some", {"packing": "perhaps"}, ["packing"], {3: True}])
def test_a_switch_is_on_or_off(wrong: Any) -> None:
    with pytest.raises(RecipeError, match="fast"):
        recipe(fast=wrong)


def test_the_doctor_tells_what_a_training_computes_with() -> None:
    found = doctor.environment()
    lines = {line.split()[0]: line for line in doctor.environment_lines(found)}
    training = found["training"]
    assert f"{training['threads']} threads; freed memory is " in lines["training"]
    assert lines["training"].endswith(f"huge pages: {training['huge pages']}")
    assert lines["matrix"] == f"{'matrix units':<13} {', '.join(training['matrix units']) or 'none'}"
    assert json.loads(json.dumps(found))["training"] == training
    bare = {**training, "keeps freed memory": False, "matrix units": []}
    told = doctor.environment_lines({**found, "training": bare})
    assert "left to the C library" in told[-3]
    assert told[-2].split() == ["matrix", "units", "none"]
    assert told[-1] == f"bf16 products {training['bf16 products']}"


def test_the_list_has_a_line_on_each() -> None:
    rows = listing.listed("fast")
    assert {row["name"] for row in rows} == TECHNIQUES
    assert len({row["summary"] for row in rows}) == len(TECHNIQUES)
    assert all(row["summary"].endswith(".") and "\n" not in row["summary"] for row in rows)
    for name in TECHNIQUES:
        idea = fast.technique(name).idea
        assert idea.en.endswith(".")
        assert idea.zh.endswith("。")


# In the loop

LORA = {"name": "lora", "rank": 4}
MOST = dict.fromkeys(
    TECHNIQUES - {"compile", "frozen_layers", "micro_batch", "weight_gradients", "wide_products"}, True
)


def test_the_loop_tells_what_is_on_and_why_the_rest_is_off(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(method=LORA, max_steps=2, fast={"packing": False})
    trainer.run()
    (event,) = logged(tmp_path, "fast")
    assert set(event["on"]) | set(event["off"]) == TECHNIQUES
    assert (
        {"attention", "cross_entropy", "lora_linear", "process"}
        <= set(event["on"])
        == set(trainer.techniques)
    )
    assert event["off"]["packing"] == "switched off"
    assert all(event["off"].values())


def test_switched_off_it_is_the_plain_loop(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    settings = {"method": LORA, "max_steps": 4, "lr": 0.01, "valid": OTHERS, "eval_every": 2}
    for name, switches in (("off", False), ("on", MOST)):
        make_trainer(folder=name, fast=switches, **settings).run()
    (off,), (on,) = logged(tmp_path, "fast", "off"), logged(tmp_path, "fast", "on")
    assert (off["on"], set(off["off"].values())) == ([], {"switched off"})
    assert set(on["on"]) == set(MOST)
    assert losses(tmp_path, "on") == pytest.approx(losses(tmp_path, "off"), abs=1e-4)
    measured = [[e["loss"] for e in logged(tmp_path, "eval", name)] for name in ("on", "off")]
    assert measured[0] == pytest.approx(measured[1], abs=1e-4)


@pytest.mark.parametrize("killed_at", [2, 5])
def test_a_killed_run_goes_on_bit_for_bit(make_trainer: MakeTrainer, tmp_path: Path, killed_at: int) -> None:
    resumed, whole = killed_and_whole(
        make_trainer, tmp_path, killed_at, method=LORA, lr=0.01, max_steps=6, save_every=2, micro_tokens=48,
        valid=OTHERS, eval_every=3, fast=MOST,
    )  # fmt: skip
    assert set(resumed.techniques) == set(whole.techniques) == set(MOST)


BY_TRYING = {"method": LORA, "lr": 0.01, "max_steps": 4, "save_every": 1, "tokens_per_batch": 1024,
             "fast": {"micro_batch": True}}  # fmt: skip


def test_the_number_that_was_found_is_kept_and_remembered(
    make_trainer: MakeTrainer, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        make_trainer(folder="killed", readers=[kill_at(3)], **BY_TRYING).run()
    (path,) = (cache / "micro-batch").iterdir()
    found = store.read_record(path)
    assert str(found["micro_tokens"]) == min(found["seconds"], key=lambda size: found["seconds"][size])
    assert set(found["seconds"]) == {"1024", "512"}
    other = {1024: 512, 512: 1024}[found["micro_tokens"]]
    store.write_record(path, {"micro_tokens": other})
    resumed = make_trainer(folder="killed", **BY_TRYING).run()
    assert resumed.micro_tokens == found["micro_tokens"]
    reason = logged(tmp_path, "fast", "killed")[-1]["off"]["micro_batch"]
    assert reason == f"{found['micro_tokens']} tokens were given, or begun with"
    assert make_trainer(folder="next", **BY_TRYING).run().micro_tokens == other
    assert "micro_batch" in logged(tmp_path, "fast", "next")[0]["on"]


@pytest.mark.usefixtures("cache")
def test_trying_leaves_no_trace_and_a_killed_run_goes_on_bit_for_bit(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    killed_and_whole(make_trainer, tmp_path, 3, **BY_TRYING)
    given = {**BY_TRYING, "micro_tokens": 1024}
    make_trainer(folder="given", **given).run()
    assert losses(tmp_path, "given") == pytest.approx(losses(tmp_path, "whole"), abs=1e-5)


def test_techniques_look_at_the_shortest_rows_without_their_padding() -> None:
    batch = {
        "input_ids": torch.arange(24).view(4, 6), "length": torch.tensor([6, 2, 5, 3]),
        "pairs": torch.tensor([1.0, 2.0]), "labels": torch.arange(24).view(4, 6) + 100,
    }  # fmt: skip
    given = fast.look(work(nn.Linear(2, 2), batch | {fast.LENGTH: batch.pop("length")}), dict, rows=2)
    assert given["input_ids"].tolist() == [[6, 7, 8], [18, 19, 20]]
    assert given["labels"].tolist() == [[106, 107, 108], [118, 119, 120]]
    assert given[fast.LENGTH].tolist() == [2, 3]
    assert given["pairs"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize(("first", "kept"), [(0, 128), (90, 128), (300, 332), (490, 500), (500, 500)])
def test_of_long_rows_no_more_is_looked_at_than_shows_labels(first: int, kept: int) -> None:
    """Rows of 4,096 tokens took 35 seconds before a training's first step."""
    labels = torch.full((2, 500), likelihood.IGNORED)
    labels[0, 3:], labels[1, first:] = 7, 7
    given = {"input_ids": torch.zeros(2, 500, dtype=torch.int64), "labels": labels}
    lengths = torch.tensor([500, 499])
    found = fast.look(work(nn.Linear(2, 2), given | {fast.LENGTH: lengths}), dict, rows=2)
    assert found["input_ids"].shape == found["labels"].shape == (2, kept)
    assert found[fast.LENGTH].tolist() == [min(kept, 500), min(kept, 499)]
