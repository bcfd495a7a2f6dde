"""What holds a model to what it knew: formulas, old data, what is measured of it."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import tunewright as tw
from tunewright import regularizers
from tunewright.core import plugins
from tunewright.core.errors import UserError
from tunewright.objectives import Batch
from tunewright.recipes import load, plugin_config
from tunewright.regularizers import Old, Start


def make(name: str, **options: Any) -> Any:
    (made,) = regularizers.create(
        [{"name": name, **options}], lambda choice: plugin_config("regularizers", choice)
    )
    return made


def batch(seed: int, rows: int = 2) -> Batch:
    ids_BT = torch.randint(5, 100, (rows, 9), generator=torch.Generator().manual_seed(seed))
    labels_BT = torch.nn.functional.pad(ids_BT[:, 1:], (0, 1), value=-100)
    return {"input_ids": ids_BT, "labels": labels_BT}


def started(model: Any) -> Start:
    return Start(model, {name: p for name, p in model.named_parameters() if p.requires_grad})


def move(model: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.01)


def test_l2sp_is_half_the_weighted_squared_distance(make_model: Any) -> None:
    model, l2sp = make_model(), make("l2sp", weight=0.3)
    first = copy.deepcopy(model)
    l2sp.begin(started(model), None)
    assert l2sp.penalty(model).item() == 0
    move(model)
    pairs = list(zip(model.parameters(), first.parameters(), strict=True))
    exact = 0.15 * sum((p.double() - q.double()).square().sum() for p, q in pairs)
    penalty = l2sp.penalty(model)
    assert penalty.item() == pytest.approx(exact.item(), rel=1e-5)
    penalty.backward()
    for p, q in pairs:
        torch.testing.assert_close(p.grad, 0.3 * (p - q).detach())


def test_ewc_weighs_by_the_squared_gradients_of_single_old_samples(make_model: Any) -> None:
    from tunewright.models.likelihood import token_losses

    model = make_model()
    ewc = make("ewc", weight=2.0, samples=3)
    olds = [batch(seed, 1) for seed in range(5)]
    exact = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
    for old in olds[:3]:
        model.zero_grad()
        token_losses(model, old).mean().backward()
        for name, parameter in model.named_parameters():
            exact[name] += parameter.grad.double().square() / 3
    model.zero_grad()
    first = copy.deepcopy(model)
    ewc.begin(
        started(model),
        Old(
            lambda: iter(olds),
            lambda model, old: token_losses(model, old).mean(),
            3,
            lambda picked: olds[picked[0]],
        ),
    )
    assert all(parameter.grad is None for parameter in model.parameters())
    move(model)
    named = zip(model.named_parameters(), first.parameters(), strict=True)
    expected = sum((exact[name] * (p.double() - q.double()).square()).sum() for (name, p), q in named)
    assert ewc.penalty(model).item() == pytest.approx(expected.item(), rel=1e-4)


def test_lwf_is_the_divergence_from_what_was_said_before(make_model: Any) -> None:
    model, given = make_model(), batch(1)
    first, lwf = copy.deepcopy(model), make("lwf", weight=0.5, temperature=2.0)
    lwf.begin(started(model), None)
    lwf.look(model, [given], 0.0)
    assert lwf.loss(model, given).item() == pytest.approx(0, abs=1e-6)
    move(model)
    kept = given["labels"] != -100

    def logs(of: Any) -> torch.Tensor:
        return (of(input_ids=given["input_ids"]).logits[kept].double() / 2).log_softmax(-1)

    with torch.no_grad():
        before = logs(first)
    exact = 0.5 * 4 * (before.exp() * (before - logs(model))).sum(-1).mean()
    lwf.look(model, [given], 0.0)
    loss = lwf.loss(model, given)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-4)
    loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    exact.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-3, atol=1e-6)


def test_the_start_stands_in_and_leaves_no_trace(make_model: Any) -> None:
    model, given = make_model(), batch(1)["input_ids"]
    start = started(model)
    with torch.no_grad():
        before = model(input_ids=given).logits
        move(model)
        after = model(input_ids=given).logits
        with start.standing_in(model):
            assert torch.equal(model(input_ids=given).logits, before)
        assert torch.equal(model(input_ids=given).logits, after)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """New conversations, old ones, and old text."""
    new = [{"prompt": f"Say {n}.", "completion": f"{n} it is"} for n in range(40)]
    old = [{"prompt": f"Name letter {n}.", "completion": chr(97 + n)} for n in range(20)]
    texts = [{"text": f"Chapter {n}. The cat slept."} for n in range(10)]
    for name, rows in (("new", new), ("old", old), ("texts", texts)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: str(tmp_path / f"{name}.jsonl") for name in ("new", "old", "texts")}


def recipe(model: Path, files: dict[str, str], output: Path, **more: Any) -> dict[str, Any]:
    return {
        "model": str(model), "data": {"train": files["new"], "valid_share": 0.1}, "precision": "fp32", "output": str(output),
        "train": {"max_steps": 6, "lr": 3e-2, "tokens_per_batch": 256}, "evaluate": {"generate": False}, **more,
    }  # fmt: skip


def test_old_data_are_measured_and_held(
    tiny_model_folder: Path, files: dict[str, str], tmp_path: Path
) -> None:
    """A strong penalty keeps the weights where they were; without one they move."""
    old = {"evaluate": {"generate": False, "old": {"letters": files["old"], "prose": files["texts"]}}}
    free = tw.run(recipe(tiny_model_folder, files, tmp_path / "free", **old), quiet=True)
    held = tw.run(recipe(tiny_model_folder, files, tmp_path / "held", **old,
                         regularizers=["l2sp", {"name": "ewc", "data": files["old"], "weight": 1e7, "samples": 8}]),
                  quiet=True)  # fmt: skip
    stages = [run.results["stages"][0] for run in (free, held)]
    assert stages[0]["before"]["old"] == stages[1]["before"]["old"]
    assert stages[0]["before"]["old"].keys() == {"letters", "prose"}
    moved = [abs(stage["after"]["old"]["letters"] - stage["before"]["old"]["letters"]) for stage in stages]
    assert moved[1] < moved[0] / 2
    assert "The old data “letters”" in held.report.read_text()
    events = [json.loads(line) for line in (held.folder / "events.jsonl").read_text().splitlines()]
    assert any(event["kind"] == "step" and event["penalty"] > 0 for event in events)


def test_replayed_data_have_their_share(
    tiny_model_folder: Path, files: dict[str, str], tmp_path: Path
) -> None:
    from tunewright import jobs

    held = {"regularizers": {"name": "replay", "data": files["old"], "ratio": 0.25}}
    (job,) = jobs.check(load(recipe(tiny_model_folder, files, tmp_path / "run", **held)))
    new, old = (len(table) for table in job.data.tables)
    drawn = job.data.epoch(0)
    assert (drawn >= new).mean() == pytest.approx(0.25, abs=0.02)
    assert old == 20
    (plain,) = jobs.check(load(recipe(tiny_model_folder, files, tmp_path / "run")))
    assert len(plain.data.tables) == 1
    assert plain.inputs["old_sha256"] == []


def test_what_is_wrong_with_old_data_is_told(
    tiny_model_folder: Path, files: dict[str, str], tmp_path: Path
) -> None:
    held = {
        "regularizers": [
            "ewc",
            {"name": "replay", "data": files["old"], "ratio": 0.5},
            {"name": "ewc", "data": "none.jsonl"},
        ]
    }
    with pytest.raises(UserError) as caught:
        tw.run(recipe(tiny_model_folder, files, tmp_path / "run", **held), quiet=True)
    said = str(caught.value)
    assert "regularizers.0.data: ewc needs old data" in said
    assert "none.jsonl" in said
    with pytest.raises(UserError, match="nothing new is left"):
        both = [{"name": "replay", "data": files["old"], "ratio": 0.5}] * 2
        tw.run(recipe(tiny_model_folder, files, tmp_path / "run", regularizers=both), quiet=True)
    with pytest.raises(UserError, match=r"regularizers.0.name: .*'l2ps'.* did you mean 'l2sp'"):
        load(recipe(tiny_model_folder, files, tmp_path / "run", regularizers="l2ps"))
    with pytest.raises(UserError, match=r"regularizers.0.wieght"):
        load(recipe(tiny_model_folder, files, tmp_path / "run", regularizers={"name": "l2sp", "wieght": 1}))


def test_dann_teaches_the_classifier_and_turns_the_models_gradient_round(make_model: Any) -> None:
    from tunewright.models import likelihood

    model, dann, given, other = make_model().double(), make("dann", weight=0.3, width=4), batch(1), batch(2)
    torch.manual_seed(0)
    dann.attach(model)
    dann.begin(started(model), Old(lambda: iter(()), lambda m, b: m, 5, lambda picked: other))
    dann.look(model, [given], 0.5)
    dann.loss(model, given).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    means = [likelihood.states(model, some).view(2, 8, -1).mean(1) for some in (given, other)]
    logits_B = model.tunewright_domain(torch.cat(means))[:, 0]
    exact = -torch.nn.functional.logsigmoid(torch.cat([-logits_B[:2], logits_B[2:]])).mean()
    exact.backward()
    risen = 0.3 * (2 / (1 + math.exp(-5.0)) - 1)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            times = 1.0 if "tunewright_domain" in name else -risen
            torch.testing.assert_close(found[name], times * parameter.grad, rtol=1e-4, atol=1e-9)
    right = float(((logits_B > 0) == torch.tensor([False, False, True, True])).float().mean())
    assert dann.figures() == {"domain_accuracy": right}
    dann.release(model)
    assert not any("domain" in name for name, _ in model.named_parameters())


def test_dann_begins_at_nothing_and_draws_as_torch_says(make_model: Any) -> None:
    model, dann, drawn = make_model(), make("dann"), []

    def batch_of(picked: Any) -> Batch:
        drawn.append(picked)
        return batch(4, rows=len(picked))

    dann.attach(model)
    dann.begin(started(model), Old(lambda: iter(()), lambda m, b: m, 50, batch_of))
    for _ in range(2):
        torch.manual_seed(3)
        dann.look(model, [batch(1), batch(2, rows=3)], 0.0)
    assert drawn[:2] == drawn[2:] and [len(picked) for picked in drawn] == [2, 3, 2, 3]
    given = batch(1)
    dann.look(model, [given], 0.0)
    dann.loss(model, given).backward()
    assert all(
        not p.grad.any() for n, p in model.named_parameters() if p.grad is not None and "domain" not in n
    )


@pytest.mark.parametrize("name", plugins.names("regularizers"))
@pytest.mark.parametrize("objective", ["sft", "dpo", "reward"])
def test_every_one_goes_with_every_kind_of_objective(
    tiny_model_folder: Path, tmp_path: Path, name: str, objective: str
) -> None:
    rows = [
        {"prompt": f"Say {n}.", "completion": f"{n}", "chosen": f"{n}", "rejected": f"not {n}"}
        for n in range(24)
    ]
    for kind in ("new", "old"):
        (tmp_path / f"{kind}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows[kind == "old" :: 2])
        )
    kept = {
        "name": name,
        **({"data": str(tmp_path / "old.jsonl")} if regularizers.kind(name).wants_old else {}),
    }
    run = tw.run({
        "model": str(tiny_model_folder), "data": {"train": str(tmp_path / "new.jsonl"), "valid_share": 0}, "precision": "fp32",
        "objective": objective, "regularizers": [kept], "train": {"max_steps": 2, "tokens_per_batch": 256},
        "output": str(tmp_path / "run"), "evaluate": {"generate": False},
    }, quiet=True)  # fmt: skip
    assert run.results["stages"][0]["train"]["steps"] == 2
