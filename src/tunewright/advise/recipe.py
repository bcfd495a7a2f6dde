"""The recipe of a plan, with a comment that says why each dial has its value."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from tunewright.advise import reasons
from tunewright.advise.configs import NAMED
from tunewright.advise.plan import Plan
from tunewright.advise.question import Question
from tunewright.core.errors import Problem, UserError
from tunewright.core.units import human_bytes, human_seconds
from tunewright.core.words import Words
from tunewright.recipes.schema import as_choice

Tree = dict[str, Any]
PRECISION, MICRO, LR = "precision", "train.micro_tokens", "train.lr"
_NESTED = ("advised", "data", "train")
"""What is written over several lines."""


def tree(question: Question, plan: Plan, language: str = "en") -> Tree:
    """The plan as a stage of a recipe, with what was foretold of it.

    Raises:
        UserError: a shape by its name has no weights, and there is no recipe without data.
    """
    situation, data = question.situation, question.data
    found = []
    if situation.model.startswith(NAMED):
        found.append(
            Problem("model", f"{situation.model} is a size and no model", "give a folder or builtin:pico")
        )
    if data is None:
        found.append(Problem("data", "there is none to train on", "give data=my.jsonl"))
    if found or data is None:
        raise UserError(found)
    written = data.model_dump(mode="json", exclude_defaults=True)
    made = {
        "advised": _advised(question, plan, 1 if language == "zh" else 0),
        "model": situation.model,
        "data": {**written, "max_length": plan.choice.length},
        "method": {"name": plan.method, **plan.choice.options},
        "objective": _objective(question, plan.choice.objective),
        "precision": plan.choice.precision,
        **{key: question.written[key] for key in _KEPT if key in question.written},
        "train": _training(plan),
    }
    return _laid_over(made, question.written) if question.keeps else made


def _advised(question: Question, plan: Plan, language: int) -> Tree:
    mean = plan.steps * plan.batch / (plan.hours * 3600)  # as the run tells it, with its first steps
    return {
        "method": plan.method,
        "why": [words[language] for words in reasons.of(question.situation, plan)],
        "memory": round(plan.memory),
        "tokens_per_second": _rounded(mean),
        "seconds": _rounded(plan.hours * 3600),
        "tried": plan.measured.steps if plan.measured else 0,
    }


def _rounded(value: float) -> float:
    """To four digits."""
    return float(f"{value:.4g}")


def _training(plan: Plan) -> Tree:
    choice = plan.choice
    return {
        "epochs": float(f"{plan.epochs:g}"),
        "lr": float(f"{plan.lr:.1e}"),
        "warmup": plan.warmup,
        "tokens_per_batch": plan.batch,
        **(
            {"micro_tokens": choice.micro_tokens}
            if MICRO in plan.tuned or choice.micro_tokens < plan.batch
            else {}
        ),
        **({"gradient_checkpointing": True} if choice.checkpointing else {}),
        **plan.train,
        **({"eval_every": 50} if "early_stop" in plan.train else {}),
    }


def _laid_over(made: Tree, written: Mapping[str, Any]) -> Tree:
    """What the recipe says itself, but for the method, stays."""
    whole = dict(made)
    for key, value in written.items():
        if key in _NESTED and isinstance(value, Mapping):
            whole[key] = {**made[key], **value}
        elif key != "method":
            whole[key] = value
    return whole


def text(question: Question, plan: Plan, language: str, output: str) -> str:
    """YAML that ``recipes.load`` takes, with a comment for each dial. UserError as for :func:`tree`."""
    index = 1 if language == "zh" else 0
    whole, why = tree(question, plan, language), _whys(question, plan)
    lines = [f"# {words[index]}" for words in _head(plan)]
    for key, value in [*whole.items(), ("output", output)]:
        told = f"  # {why[key][index]}" if key in why else ""
        if key in _NESTED:
            lines += [
                f"{key}:{told}",
                *_inner(key, value, {name: words[index] for name, words in why.items()}),
            ]
        else:
            lines.append(f"{key}: {_flow(value)}{told}")
    return "\n".join([*lines, ""])


def _inner(key: str, values: Tree, why: Mapping[str, str]) -> Iterator[str]:
    for name, value in values.items():
        told = f"  # {why[f'{key}.{name}']}" if f"{key}.{name}" in why else ""
        if value and key == "advised" and isinstance(value, list):
            yield f"  {name}:"
            yield from (f"  - {_flow(item)}" for item in value)
        else:
            yield f"  {name}: {_number(value) if name == 'lr' else _flow(value)}{told}"


def _head(plan: Plan) -> Iterator[Words]:
    took, need = human_seconds(plan.hours * 3600), human_bytes(plan.memory)
    yield Words(
        f"Written by tunewright advise: about {took}, {need} of memory on a device.",
        f"由 tunewright advise 生成：约需 {took}，每个设备 {need} 内存。",
    )
    if plan.placement.devices > 1:
        yield Words(
            f"Planned for {plan.placement.devices} devices ({plan.placement.name}); a recipe has no dial for that.",
            f"按 {plan.placement.devices} 个设备规划（{plan.placement.name}）；配方里没有这个设置。",
        )


def _whys(question: Question, plan: Plan) -> dict[str, Words]:
    """Why each dial has its value, by its dotted name."""
    situation = question.situation
    share = plan.trainable / situation.shape.parameters
    whys = {
        "advised": _WHY["advised"],
        "data.max_length": _WHY["whole" if situation.keeps_all else "cut"],
        "method": Words(f"trains {share:.3%} of the parameters", f"训练 {share:.3%} 的参数"),
        "objective": Words(f"the rows are {situation.data.kind}", f"数据类型：{situation.data.kind}"),
        "precision": _WHY[plan.choice.precision],
        **dict.fromkeys(_KEPT, _WHY["kept"]),
        **{f"train.{name}": words for name, words in _WHY.items()},
    }
    return whys | dict.fromkeys(plan.tuned, _WHY["tried"])


def _objective(question: Question, name: str) -> Tree:
    """With the options that the recipe gives it; the classes of a classification are those of the data."""
    written = as_choice(question.written.get("objective"), "objective")
    if isinstance(written, dict) and written.get("name") == name:
        return written
    labels = {"labels": list(question.situation.data.labels)} if name == "classification" else {}
    return {"name": name, **labels}


_KEPT = ("regularizers", "optimizer", "fast", "evaluate", "trust_remote_code")
"""What advice does not decide stays as the recipe has it."""
_WHY = {
    "advised": Words("what was foretold; the report says how it came", "预测；报告会给出与实际的对比"),
    "tried": Words("the best of those tried", "实测最优"),
    "kept": Words("as in the recipe", "保持原配方"),
    "whole": Words("no row is cut", "没有行会被截断"),
    "cut": Words("19 of 20 rows are not cut", "95% 的行不会被截断"),
    "fp32": Words("as in the recipe", "保持原配方"),
    "bf16": Words("half the memory of fp32, the same range", "内存为 fp32 的一半，数值范围相同"),
    "fp16": Words("the device has no bf16", "设备不支持 bf16"),
    "epochs": Words("fewer passes the more rows there are", "数据越多，轮数越少"),
    "lr": Words(
        "the method's default; ten times that for models under 50 M, and times what rules say",
        "该方法的默认值；小于 50 M 的模型取十倍，再乘以规则给出的倍数",
    ),
    "tokens_per_batch": Words(
        "some 32 rows, and at least 50 steps if possible", "约 32 行，尽量不少于 50 步"
    ),
    "micro_tokens": Words("what fits in memory at a time", "一次放得进内存的量"),
    "gradient_checkpointing": Words("activations would not fit", "否则激活值放不下"),
    "warmup": Words("some 40 steps, 0.3 of all at most", "约 40 步，最多占 0.3"),
    "early_stop": Words("ends when held-out loss no longer falls", "留出损失不再下降时停止"),
    "eval_every": Words("early stopping looks so often", "早停的检查间隔"),
}


def _number(value: float) -> str:
    """With a point, without which YAML takes it for text: ``2.0e-04``."""
    return f"{value:.1e}"


def _flow(value: Any) -> str:
    """YAML on one line; a text may need quotes."""
    if isinstance(value, str):
        plain = yaml.safe_dump(value, allow_unicode=True, width=1 << 20).removesuffix("\n...\n").strip()
        return plain if "\n" not in plain else json.dumps(value)
    return (
        str(
            yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=1 << 20, sort_keys=False)
        )
        .strip()
        .removesuffix("\n...")
    )
