"""Losses and gradients of preference objectives are TRL's, on the same batch in fp32."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from tunewright import objectives
from tunewright.data.rows import Message, Row
from tunewright.data.template import ChatCodec
from tunewright.models.likelihood import IGNORED
from tunewright.objectives._pairs import answers
from tunewright.recipes import plugin_config

PAIRS = [
    ("Hi", "Hello.", "Go away, please."),
    ("What falls from the sky?", "Rain falls.", "Stones"),
    ("1", "2", "three"),
]
THEIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sigmoid": ({}, {"loss_type": ["sigmoid"]}),
    "length normalised": ({"length_normalised": True}, {"loss_type": ["sigmoid_norm"]}),
    "ipo": ({"loss": "ipo"}, {"loss_type": ["ipo"]}),
    "hinge": ({"loss": "hinge"}, {"loss_type": ["hinge"]}),
    "robust": ({"loss": "robust", "label_smoothing": 0.1}, {"loss_type": ["robust"], "label_smoothing": 0.1}),
    "apo_zero": ({"loss": "apo_zero"}, {"loss_type": ["apo_zero"]}),
    "apo_down": ({"loss": "apo_down"}, {"loss_type": ["apo_down"]}),
    "sppo": ({"loss": "sppo"}, {"loss_type": ["sppo_hard"]}),
}  # fmt: skip


VERDICTS = [
    (PAIRS[0][0], PAIRS[0][1], True),
    (PAIRS[1][0], PAIRS[1][2], False),
    (PAIRS[2][0], PAIRS[2][1], True),
]
pytestmark = pytest.mark.filterwarnings("default")


def make(tokenizer: Any, **choice: Any) -> Any:
    return objectives.create(choice, plugin_config("objectives", choice), ChatCodec(tokenizer))


def moved(model: Any) -> Any:
    """The model after some training; and a copy."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.02)
    return copy.deepcopy(model)


def masks(batch: Any) -> tuple[Tensor, Tensor]:
    """TRL's: which tokens are real, which are learned, not shifted."""
    learned_RT = torch.nn.functional.pad(batch["labels"] != IGNORED, (1, 0))[:, :-1].long()
    return (torch.arange(batch["input_ids"].shape[1]) < batch["length"][:, None]).long(), learned_RT


def same(loss: Tensor, model: Any, expected: Tensor, other: Any) -> None:
    """Losses to 1e-5, and gradients to 1e-5 of the largest."""
    loss.backward()
    expected.backward()
    # advantages of one sign cancel those of the other: what is left is as exact as what was added
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=2e-6)
    gradients = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        expected_grad = gradients[name].grad
        assert float((parameter.grad - expected_grad).abs().max()) <= 1e-5 * float(
            expected_grad.abs().max()
        ), name


def options(tmp_path: Path) -> dict[str, Any]:
    return {
        "output_dir": str(tmp_path),
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }


@pytest.mark.parametrize("kind", THEIRS)
def test_dpo_is_as_trl_has_it(tokenizer: Any, make_model: Any, tmp_path: Path, kind: str) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    own, theirs = THEIRS[kind]
    dpo, model = make(tokenizer, name="dpo", beta=0.2, **own), make_model()
    rows = [Row("", (Message("user", q),), chosen=c, rejected=r) for q, c, r in PAIRS]
    batch = dpo.collate(list(dpo.encode(rows)))
    dpo.begin(model, [batch])
    with torch.no_grad():
        before = answers(model, batch)
    other = moved(model)

    dataset = Dataset.from_list([{"prompt": q, "chosen": c, "rejected": r} for q, c, r in PAIRS])
    config = DPOConfig(**options(tmp_path), beta=0.2, **theirs)
    trainer = DPOTrainer(other, None, config, train_dataset=dataset, processing_class=tokenizer)
    trainer.precompute_ref_logps = True
    real_RT, learned_RT = masks(batch)
    expected = trainer.compute_loss(trainer.model, {
        "input_ids": batch["input_ids"], "attention_mask": real_RT, "completion_mask": learned_RT,
        "ref_chosen_logps": before.first_B, "ref_rejected_logps": before.second_B,
    })  # fmt: skip
    same(dpo.loss(model, batch)[0], model, expected, other)


@pytest.mark.parametrize(("loss", "theirs"), [("kto", "kto"), ("apo_zero", "apo_zero_unpaired")])
def test_kto_is_as_trl_has_it(
    tokenizer: Any, make_model: Any, tmp_path: Path, loss: str, theirs: str
) -> None:
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    kto, model = make(tokenizer, name="kto", beta=0.2, good=1.5, bad=0.7, loss=loss), make_model()
    rows = [Row("", (Message("user", q), Message("assistant", a)), liked=liked) for q, a, liked in VERDICTS]
    batch = kto.collate(list(kto.encode(rows)))
    kto.begin(model, [batch])
    with torch.no_grad():
        before = answers(model, batch)
    other = moved(model)
    kto.look(model, [batch])

    dataset = Dataset.from_list([{"prompt": q, "completion": a, "label": liked} for q, a, liked in VERDICTS])
    config = KTOConfig(**options(tmp_path), beta=0.2, desirable_weight=1.5, undesirable_weight=0.7, loss_type=theirs,
                       train_sampling_strategy="sequential", per_device_train_batch_size=3)  # fmt: skip
    trainer = KTOTrainer(other, None, config, train_dataset=dataset, processing_class=tokenizer)
    trainer.precompute_ref_logps = True
    real_RT, learned_RT = masks(batch)
    given = {"label": batch["liked"], "ref_logps": before.first_B, "ref_KL_logps": before.second_B}
    for prefix, part in (("", slice(3)), ("KL_", slice(3, None))):
        given |= {f"{prefix}input_ids": batch["input_ids"][part], f"{prefix}attention_mask": real_RT[part],
                  f"{prefix}completion_mask": learned_RT[part]}  # fmt: skip
    same(kto.loss(model, batch)[0], model, trainer.compute_loss(trainer.model, given), other)


def test_dft_is_as_trl_has_it(tokenizer: Any, make_model: Any, tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    sft, model = make(tokenizer, name="sft", dft=True), make_model().train()
    samples = list(sft.encode([Row("", (Message("user", q), Message("assistant", c))) for q, c, _ in PAIRS]))
    batch = {**sft.collate(samples), "length": torch.tensor([len(sample["input_ids"]) for sample in samples])}
    other = copy.deepcopy(model)
    dataset = Dataset.from_list([{"prompt": q, "completion": c} for q, c, _ in PAIRS])
    config = SFTConfig(
        **{**options(tmp_path), "per_device_train_batch_size": 3}, loss_type="dft", max_length=None
    )
    trainer = SFTTrainer(other, config, train_dataset=dataset, processing_class=tokenizer)
    labels_BT = torch.nn.functional.pad(batch["labels"], (1, 0), value=IGNORED)[:, :-1]
    expected = trainer.compute_loss(trainer.model, {
        "input_ids": batch["input_ids"], "labels": labels_BT, "attention_mask": masks(batch)[0],
    })  # fmt: skip
    same(sft.loss(model, batch)[0], model, expected, other)


def drawn(policy: Any, model: Any) -> Any:
    """Answers of a model to three questions, four each, and log-probabilities that they had."""
    rows = [Row("", (Message("user", q), Message("assistant", c))) for q, c, _ in PAIRS]
    questions = list(policy.encode(rows))
    samples = policy.explore(model, questions, objectives.Turn(0, 3))
    rewards_PG = torch.linspace(-1, 2, 12).square().view(3, 4).numpy()
    advantages = policy.advantages(rewards_PG).ravel()
    for sample, advantage in zip(samples, advantages, strict=True):
        sample["advantage"] = numpy.array([advantage], numpy.float32).view(numpy.int32)
    return policy.collate(samples), [len(question["input_ids"]) for question in questions for _ in range(4)]


def as_theirs(batch: Any, prompts: list[int], width: int) -> dict[str, Tensor]:
    """Prompts padded on the left, completions on the right."""
    lengths, longest = batch["length"].tolist(), max(prompts)
    found: dict[str, list[list[int]]] = {
        name: [] for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    }
    for ids, length, prompt in zip(batch["input_ids"].tolist(), lengths, prompts, strict=True):
        said, left, right = length - prompt, longest - prompt, width - (length - prompt)
        found["prompt_ids"].append([0] * left + ids[:prompt])
        found["prompt_mask"].append([0] * left + [1] * prompt)
        found["completion_ids"].append(ids[prompt:length] + [0] * right)
        found["completion_mask"].append([1] * said + [0] * right)
    return {name: torch.tensor(rows) for name, rows in found.items()}


def per_token(values_N: Tensor, mask_BT: Tensor) -> Tensor:
    return torch.zeros(mask_BT.shape).masked_scatter(mask_BT.bool(), values_N)


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": ({}, {"loss_type": "grpo"}),
    "dr_grpo": ({"average": "constant", "scale": "none"}, {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    "dapo": ({"average": "token", "clip_high": 0.28}, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "gspo": ({"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
             {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4}),
}  # fmt: skip


@pytest.mark.parametrize("kind", [*VARIANTS, "rloo"])
def test_grpo_and_rloo_are_as_trl_has_them(
    tokenizer: Any, make_model: Any, tmp_path: Path, kind: str
) -> None:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    own, theirs = VARIANTS.get(kind, ({}, {}))
    name = "rloo" if kind == "rloo" else "grpo"
    policy, model = make(tokenizer, name=name, group=4, longest=6, steps_per_draw=2, **own), make_model()
    batch, prompts = drawn(policy, model)
    other = moved(model)
    dataset = Dataset.from_list([{"prompt": q} for q, *_ in PAIRS])
    shared = {**options(tmp_path), "num_generations": 4, "per_device_train_batch_size": 12, "max_completion_length": 6,
              "beta": 0.0}  # fmt: skip
    kinds = (RLOOTrainer, RLOOConfig) if kind == "rloo" else (GRPOTrainer, GRPOConfig)
    trainer = kinds[0](other, lambda completions, **_: [0.0] * len(completions), args=kinds[1](**shared, **theirs),
                       train_dataset=dataset, processing_class=tokenizer)  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    other.train()
    given = as_theirs(batch, prompts, 6)
    before_BT = per_token(batch["before"], given["completion_mask"])
    given |= {"advantages": batch["advantage"], "old_per_token_logps": before_BT, "old_logps": before_BT.sum(1),
              "num_items_in_batch": given["completion_mask"].sum()}  # fmt: skip
    expected = trainer._compute_loss(trainer.model, given)
    same(policy.loss(model, batch)[0], model, expected, other)


@pytest.mark.parametrize(
    ("choice", "beta"),
    [({"divergence": "forward"}, 0.0), ({"divergence": "reverse"}, 1.0),
     ({"divergence": "jensen_shannon", "mixture": 0.3}, 0.3)],
    ids=["forward", "reverse", "jensen-shannon"],
)  # fmt: skip
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distill(
    make_model: Any, tokenizer: Any, choice: dict[str, Any], beta: float, temperature: float
) -> None:
    from trl.experimental.gkd import GKDTrainer

    objective = make(tokenizer, name="distill", teacher="model:x", temperature=temperature, **choice)
    rows = [
        Row(f"rows:{n}", (Message("user", p), Message("assistant", c))) for n, (p, c, _) in enumerate(PAIRS)
    ]
    batch = objective.batch(list(objective.encode(rows)), torch.device("cpu"))
    teacher, model = make_model().eval(), make_model()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    other = copy.deepcopy(model)
    objective.asked = {"model:x": lambda: SimpleNamespace(model=teacher)}
    loss, figures = objective.loss(model, batch)
    kept = batch["labels"] != IGNORED
    with torch.no_grad():
        taught = teacher(input_ids=batch["input_ids"]).logits[kept]
    expected = GKDTrainer.generalized_jsd_loss(
        other(input_ids=batch["input_ids"]).logits[kept],
        taught,
        beta=beta,
        temperature=temperature,
        reduction="sum",
    ) / int(kept.sum())
    assert figures["divergence"] == pytest.approx(expected.item(), rel=1e-5)
    same(loss, model, temperature**2 * expected, other)
