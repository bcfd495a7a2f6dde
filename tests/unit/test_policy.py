"""Objectives that learn from the model's own answers: what is drawn, what it is worth, what is kept."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tunewright as tw
from tunewright import objectives
from tunewright.core.errors import Problem, RecipeError, UserError
from tunewright.data.rows import Message, Row
from tunewright.data.template import ChatCodec
from tunewright.models.generate import Draw, draw
from tunewright.models.likelihood import token_losses
from tunewright.objectives._rewards import Asked, brevity, contains, exact_match
from tunewright.recipes import plugin_config

QUESTIONS = [("Hi", "Hello."), ("What falls from the sky?", "Rain."), ("1", "2")]


def make(tokenizer: Any, name: str = "grpo", max_length: int = 256, **options: Any) -> Any:
    choice = {"name": name, "group": 3, "longest": 5, **options}
    return objectives.create(
        choice, plugin_config("objectives", choice), ChatCodec(tokenizer, max_length=max_length)
    )


def asked(policy: Any) -> list[Any]:
    return list(policy.encode([Row(f"a:{n}", (Message("user", q), Message("assistant", a)))
                               for n, (q, a) in enumerate(QUESTIONS, 1)]))  # fmt: skip


def test_answers_are_drawn_in_groups_and_follow_from_the_step(tokenizer: Any, make_model: Any) -> None:
    policy, model = make(tokenizer), make_model().train()
    questions = asked(policy)
    first, again, later = (policy.explore(model, questions, objectives.Turn(step, 7)) for step in (0, 0, 1))
    assert len(first) == 9
    for place, sample in enumerate(first):
        prompt = questions[place // 3]["input_ids"]
        assert sample["input_ids"][: len(prompt)].tolist() == prompt.tolist()
        assert 1 <= int(sample["learned"].sum()) == len(sample["input_ids"]) - len(prompt) <= 5
    ids = [[sample["input_ids"].tolist() for sample in some] for some in (first, again, later)]
    assert ids[0] == ids[1] != ids[2]
    assert model.training


def test_answers_are_drawn_from_the_models_own_distribution(tokenizer: Any, make_model: Any) -> None:
    """First tokens of 4,000 draws against the model's probabilities: within four standard deviations each."""
    model, codec = make_model(), ChatCodec(tokenizer)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)  # some tokens stand out
        ids = codec.prompt((Message("user", "Hi"),))
        exact_V = model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)
    torch.manual_seed(0)
    answers = draw(model, codec, [ids], Draw(4000, 1), batch_size=4000)
    counts_V = torch.bincount(torch.tensor([answer[0] for answer in answers]), minlength=len(exact_V))
    spread_V = (4000 * exact_V * (1 - exact_V)).sqrt()
    assert ((counts_V - 4000 * exact_V).abs() <= 4 * spread_V + 1).all()
    assert int((counts_V > 20).sum()) >= 3


def test_advantages_by_their_formulas(tokenizer: Any) -> None:
    rewards = np.array([[1.0, 0.0, 0.5], [2.0, 2.0, 2.0]])
    centred = np.array([[0.5, -0.5, 0.0], [0.0, 0.0, 0.0]])
    np.testing.assert_allclose(make(tokenizer, scale="none").advantages(rewards), centred)
    np.testing.assert_allclose(make(tokenizer).advantages(rewards), centred / np.array([[0.5001], [1e-4]]))
    np.testing.assert_allclose(make(tokenizer, "rloo").advantages(rewards), centred * 1.5)


def test_rewards_by_name() -> None:
    row = Asked("2+2?", "It is 4.")
    assert [exact_match(row, answer) for answer in ("It is  4", "Ｉt is ４。", "it is 4.", "4")] == [
        1,
        1,
        0,
        0,
    ]
    assert [contains(row, answer) for answer in ("Well: It is 4. Yes", "4")] == [1, 0]
    assert [brevity(row, "x" * n) for n in (0, 8, 12, 16, 30)] == [1, 1, 0.5, 0, 0]


def test_rewards_are_weighed_and_told(tokenizer: Any, make_model: Any, tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text(
        "def long(asked, answer):\n    assert asked.question and asked.reference\n    return len(answer)\n"
    )
    policy = make(tokenizer, rewards=("brevity", f"{own}:long"), weights=(0.5, 0.1))
    samples = policy.explore(make_model(), asked(policy), objectives.Turn(0, 1))
    worth = [sample["reward"].view(np.float32)[0] for sample in samples]
    figures = policy._figures
    assert figures["reward"] == pytest.approx(np.mean(worth), rel=1e-6)
    assert figures["reward"] == pytest.approx(
        0.5 * figures["reward.brevity"] + 0.1 * figures[f"reward.{own}:long"]
    )


@pytest.mark.parametrize(
    ("code", "said"),
    [("def own(asked, answer):\n    return 1 / 0\n", "fails on the answer .* ZeroDivisionError"),
     ("def own(asked, answer):\n    return float('nan')\n", "gives nan for"),
     ("def other(asked, answer):\n    return 1\n", "cannot be loaded: AttributeError"),
     ("def own(asked, answer) return 1\n", "cannot be loaded: SyntaxError")],
)  # fmt: skip
def test_a_reward_that_cannot_be_used_is_named(
    tokenizer: Any, make_model: Any, tmp_path: Path, code: str, said: str
) -> None:
    (tmp_path / "own.py").write_text(code)
    with pytest.raises(RecipeError, match=rf"objective.rewards: .*own.py:own {said}"):
        policy = make(tokenizer, rewards=(f"{tmp_path / 'own.py'}:own",))
        policy.explore(make_model(), asked(policy), objectives.Turn(0, 1))


def test_unknown_rewards_come_together_with_the_nearest(tokenizer: Any) -> None:
    with pytest.raises(RecipeError) as caught:
        make(tokenizer, rewards=("exact_mach", "nothing.py:here"))
    first, second = map(str, caught.value.problems)
    assert "no reward 'exact_mach'; fix: did you mean 'exact_match'" in first
    assert "nothing.py:here cannot be loaded" in second


def test_rows_without_a_question_are_named(tokenizer: Any) -> None:
    rows = [
        Row("a:1", text="prose"),
        Row("a:2", (Message("user", "long " * 50),)),
        Row("a:3", (Message("user", "Hi"),)),
    ]
    found = list(make(tokenizer, max_length=32).encode(rows))
    assert [isinstance(item, Problem) for item in found] == [True, True, False]
    assert "no question" in found[0].what
    assert "at most 27 fit beside an answer of 5" in found[1].what


def test_the_loss_does_not_depend_on_how_a_batch_is_cut(tokenizer: Any, make_model: Any) -> None:
    for options in ({}, {"average": "token"}, {"average": "constant", "scale": "none"}):
        policy, model = make(tokenizer, **options), make_model()
        samples = policy.explore(model, asked(policy), objectives.Turn(0, 1))
        for place, sample in enumerate(samples):
            sample["advantage"] = np.array([place - 4.0], np.float32).view(np.int32)
        whole, parts = policy.collate(samples), [policy.collate(samples[:2]), policy.collate(samples[2:])]
        apart = sum(policy.loss(model, part)[0].item() * policy.weight(part) for part in parts)
        apart /= sum(map(policy.weight, parts))
        assert apart == pytest.approx(policy.loss(model, whole)[0].item(), abs=1e-5)


def test_answers_for_several_steps_are_state(tokenizer: Any, make_model: Any) -> None:
    policy, model = make(tokenizer, steps_per_draw=2), make_model()
    questions = asked(policy)
    drawn = policy.explore(model, questions, objectives.Turn(0, 1))
    assert policy.explore(model, questions, objectives.Turn(1, 1)) is drawn
    other = make(tokenizer, steps_per_draw=2)
    other.set_state(policy.state())
    kept = other.explore(model, questions, objectives.Turn(1, 1))
    ours, theirs = policy.collate(drawn), other.collate(kept)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert make(tokenizer).state() == {}


@pytest.mark.parametrize("name", ["grpo", "rloo", "ppo"])
def test_a_run_earns_more_reward(tiny_model_folder: Path, tmp_path: Path, name: str) -> None:
    """Longer answers are worth more; a model of random weights learns that in a few steps."""
    own, data = tmp_path / "own.py", tmp_path / "my.jsonl"
    own.write_text("def long(asked, answer):\n    return len(answer) / 100\n")
    data.write_text(
        "".join(json.dumps({"prompt": f"Say {n}.", "completion": f"{n}"}) + "\n" for n in range(40))
    )
    run = tw.run({
        "model": str(tiny_model_folder), "data": {"train": str(data), "valid_share": 0.2}, "precision": "fp32",
        "objective": {"name": name, "rewards": [f"{own}:long"], "group": 8, "longest": 12, "steps_per_draw": 2,
                      **({"kl": 0.0} if name == "ppo" else {})},
        "method": "full", "train": {"max_steps": 48, "lr": 3e-3, "tokens_per_batch": 2048, "schedule": "constant"},
        "output": str(tmp_path / "run"), "evaluate": {"generate": False},
    }, quiet=True)  # fmt: skip
    (stage,) = run.results["stages"]
    assert stage["after"]["reward"] > stage["before"]["reward"] + 0.05
    assert stage["after"]["loss"] == -stage["after"]["reward"]
    assert stage["train"]["tokens"] > 48 * 100


def test_a_reward_that_was_edited_is_another_input(tiny_model_folder: Path, tmp_path: Path) -> None:
    from tunewright import jobs, recipes

    own = tmp_path / "own.py"

    def told() -> Any:
        own.write_text(
            f"{own.read_text() if own.exists() else ''}\ndef worth(asked, answer):\n    return 1\n"
        )
        (job,) = jobs.check(recipes.load({
            "model": str(tiny_model_folder), "data": "builtin:sums-valid", "output": str(tmp_path / "run"),
            "objective": {"name": "grpo", "rewards": [f"{own}:worth"]},
        }))  # fmt: skip
        return job.inputs

    first, second = told(), told()
    assert {key for key in first if first[key] != second[key]} == {"rewards_sha256"}


def test_a_reward_model_that_is_not_there_is_told_before_anything_runs(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"objective\.rewards: runs/none is neither a folder"):
        tw.run({
            "model": str(tiny_model_folder), "data": "builtin:sums-valid", "output": str(tmp_path / "run"),
            "objective": {"name": "ppo", "rewards": ["model:runs/none"]},
        }, quiet=True)  # fmt: skip


def test_a_bad_reward_is_told_before_anything_is_loaded(tiny_model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no reward 'magic'"):
        tw.run({
            "model": str(tiny_model_folder), "data": "builtin:demo-valid", "output": str(tmp_path / "run"),
            "objective": {"name": "grpo", "rewards": ["magic"]},
        }, quiet=True)  # fmt: skip
    assert not (tmp_path / "run").exists()


# PPO


def ppo(tokenizer: Any, model: Any, **options: Any) -> Any:
    from tunewright.regularizers import Start

    made = make(tokenizer, "ppo", group=1, **options)
    made.attach(model)
    made.start = Start(model, dict(model.named_parameters()))
    return made


def test_advantages_are_generalised_ones(tokenizer: Any, make_model: Any) -> None:
    """Against the definition: the sum of later surprises, each discounted (Schulman et al. 2016, eq. 16)."""
    policy = ppo(tokenizer, make_model(), kl=0.3, gamma=0.9, trace=0.8)
    apart, values, reward = np.array([0.1, -0.4, 0.2, 0.5]), np.array([1.0, 0.5, -0.5, 2.0]), 3.0
    earned = -0.3 * apart + np.array([0, 0, 0, reward])
    following = np.array([0.5, -0.5, 2.0, 0.0])
    surprise = earned + 0.9 * following - values
    exact = [sum((0.9 * 0.8) ** (k - t) * surprise[k] for k in range(t, 4)) for t in range(4)]
    gained, returns = policy._gained(apart, reward, values)
    np.testing.assert_allclose(gained, exact)
    np.testing.assert_allclose(returns, np.array(exact) + values)


def test_all_that_came_of_it_counts_with_a_trace_of_one(tokenizer: Any, make_model: Any) -> None:
    policy = ppo(tokenizer, make_model(), kl=0.0, gamma=1.0, trace=1.0)
    _, returns = policy._gained(np.zeros(3), 2.0, np.array([5.0, -1.0, 0.3]))
    np.testing.assert_allclose(returns, 2.0)


def test_the_loss_is_the_clipped_one(tokenizer: Any, make_model: Any) -> None:
    from tunewright.models import likelihood

    model = make_model()
    policy = ppo(tokenizer, model, clip=0.1, value_clip=0.05, value_weight=0.4)
    with torch.no_grad():
        model.tunewright_value.weight.normal_(generator=torch.Generator().manual_seed(0))
    samples = policy.explore(model, asked(policy), objectives.Turn(0, 1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.02)
    batch = policy.collate(samples)
    now, states = -likelihood.token_losses(model, batch).double(), likelihood.states(model, batch)
    value = model.tunewright_value(states)[:, 0].double()
    gained, returns, foretold, before = (
        batch[n].double() for n in ("advantages", "returns", "values", "before")
    )
    ratio = (now - before).exp()
    policy_loss = torch.maximum(-gained * ratio, -gained * ratio.clamp(0.9, 1.1)).mean()
    near = torch.minimum(torch.maximum(value, foretold - 0.05), foretold + 0.05)
    error = torch.maximum((value - returns) ** 2, (near - returns) ** 2).mean()
    assert policy.loss(model, batch)[0].item() == pytest.approx((policy_loss + 0.2 * error).item(), rel=1e-4)
    assert gained.mean().item() == pytest.approx(0, abs=1e-5)
    assert gained.std(correction=0).item() == pytest.approx(1, abs=1e-4)


def test_divergence_is_from_the_start_and_its_cost_follows(tokenizer: Any, make_model: Any) -> None:
    model = make_model()
    policy = ppo(tokenizer, model, kl=0.1, kl_target=1.0, steps_per_draw=1)
    policy.explore(model, asked(policy), objectives.Turn(0, 1))
    assert policy._figures["divergence"] == 0
    assert policy._strength == pytest.approx(0.1 * 0.9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    policy.explore(model, asked(policy), objectives.Turn(1, 1))
    assert policy._figures["divergence"] > 1
    assert policy._strength == pytest.approx(0.1 * 0.9 * 1.1)
    other = make(tokenizer, "ppo", group=1)
    other.set_state(policy.state())
    assert other._strength == policy._strength


def test_answers_are_drawn_anew_once_the_model_has_moved_too_far(tokenizer: Any, make_model: Any) -> None:
    model = make_model()
    policy = ppo(tokenizer, model, kl_stop=0.5, steps_per_draw=4)
    questions = asked(policy)
    first = policy.explore(model, questions, objectives.Turn(0, 1))
    assert policy.explore(model, questions, objectives.Turn(1, 1)) is first
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    kept, moved = policy.collate(first), policy._moved(model)
    exact = kept["before"].mean() + policy.looked_at(model, lambda: token_losses(model, kept)).mean()
    assert moved == pytest.approx(exact.item(), rel=1e-4)
    assert moved > 0.5
    assert policy.explore(model, questions, objectives.Turn(2, 1)) is not first


def test_what_was_foretold_is_state_too(tokenizer: Any, make_model: Any) -> None:
    model = make_model()
    policy = ppo(tokenizer, model, steps_per_draw=2)
    drawn = policy.explore(model, asked(policy), objectives.Turn(0, 1))
    other = make(tokenizer, "ppo", group=1, steps_per_draw=2)
    other.set_state(policy.state())
    ours, theirs = policy.collate(drawn), other.collate(other._drawn)
    assert ours.keys() == theirs.keys() >= {"advantages", "returns", "values", "before"}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert other._figures == policy._figures


def test_the_value_head_is_no_part_of_the_model_afterwards(tokenizer: Any, make_model: Any) -> None:
    model = make_model()
    before = set(model.state_dict())
    policy = ppo(tokenizer, model)
    assert {"tunewright_value.weight", "tunewright_value.bias"} <= dict(model.named_parameters()).keys()
    policy.release(model)
    assert set(model.state_dict()) == before
