"""The recipe of a plan, with a comment that says why each dial has its value."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from tunewright.advise.configs import NAMED
from tunewright.advise.plan import Plan
from tunewright.advise.question import Question
from tunewright.core.errors import Problem, UserError
from tunewright.core.units import human_bytes, human_seconds
from tunewright.core.words import Words
from tunewright.recipes.schema import as_choice

Tree = dict[str, Any]
Line = tuple[str, Words]
"""A line of YAML, and why it is there."""


def text(question: Question, plan: Plan, language: str, output: str) -> str:
    """YAML that ``recipes.load`` takes.

    Raises:
        UserError: a shape by its name has no weights, and there is no recipe without data.
    """
    situation = question.situation
    found = []
    if situation.model.startswith(NAMED):
        found.append(
            Problem("model", f"{situation.model} is a size and no model", "give a folder or builtin:pico")
        )
    if question.data is None:
        found.append(Problem("data", "there is none to train on", "give data=my.jsonl"))
    if found or question.data is None:
        raise UserError(found)
    index = 1 if language == "zh" else 0
    heads = [f"# {words[index]}" for words in _head(plan)]
    lines = [*_top(question, plan), *_training(plan)]
    body = [f"{line}  # {words[index]}" if words[index] else line for line, words in lines]
    return "\n".join([*heads, *body, f"output: {output}", ""])


def _head(plan: Plan) -> Iterator[Words]:
    took, need = human_seconds(plan.hours * 3600), human_bytes(plan.memory)
    yield Words(
        f"Written by tunewright advise: about {took}, {need} of memory on a device.",
        f"由 tunewright advise 生成：约需 {took}，每个设备 {need} 内存。",
    )
    yield from plan.reasons
    if plan.placement.devices > 1:
        yield Words(
            f"Planned for {plan.placement.devices} devices ({plan.placement.name}); a recipe has no dial for that.",
            f"按 {plan.placement.devices} 个设备规划（{plan.placement.name}）；配方里没有这个设置。",
        )


def _top(question: Question, plan: Plan) -> Iterator[Line]:
    situation, choice, data = question.situation, plan.choice, question.data
    none = Words("", "")
    yield f"model: {_flow(situation.model)}", none
    yield "data:", none
    written = data.model_dump(mode="json", exclude_defaults=True) if data else {}
    for key, value in {**written, "max_length": choice.length}.items():
        why = _WHY["whole" if situation.keeps_all else "cut"] if key == "max_length" else none
        yield f"  {key}: {_flow(value)}", why
    share = plan.trainable / situation.shape.parameters
    yield (
        f"method: {_flow({'name': plan.method, **choice.options})}",
        Words(f"trains {share:.3%} of the parameters", f"训练 {share:.3%} 的参数"),
    )
    yield (
        f"objective: {_flow(_objective(question, choice.objective))}",
        Words(f"the rows are {situation.data.kind}", f"数据类型：{situation.data.kind}"),
    )
    yield f"precision: {choice.precision}", _WHY[choice.precision]
    for key in _KEPT:
        if key in question.written:
            yield f"{key}: {_flow(question.written[key])}", _WHY["kept"]


def _objective(question: Question, name: str) -> Tree:
    """With the options that the recipe gives it; the classes of a classification are those of the data."""
    written = as_choice(question.written.get("objective"), "objective")
    if isinstance(written, dict) and written.get("name") == name:
        return written
    labels = {"labels": list(question.situation.data.labels)} if name == "classification" else {}
    return {"name": name, **labels}


def _training(plan: Plan) -> Iterator[Line]:
    choice = plan.choice
    yield "train:", Words("", "")
    yield f"  epochs: {plan.epochs:g}", _WHY["epochs"]
    yield f"  lr: {_number(plan.lr)}", _WHY["lr"]
    yield f"  tokens_per_batch: {plan.batch}", _WHY["tokens_per_batch"]
    if choice.micro_tokens < plan.batch:
        yield f"  micro_tokens: {choice.micro_tokens}", _WHY["micro_tokens"]
    if choice.checkpointing:
        yield "  gradient_checkpointing: true", _WHY["gradient_checkpointing"]
    dials: Mapping[str, Any] = plan.train
    for key, value in dials.items():
        yield f"  {key}: {_flow(value)}", _WHY[key]
    if "early_stop" in dials:
        yield "  eval_every: 50", _WHY["eval_every"]


_KEPT = ("regularizers", "optimizer", "fast", "evaluate", "trust_remote_code")
"""What advice does not decide stays as the recipe has it."""
_WHY = {
    "kept": Words("as in the recipe", "保持原配方"),
    "whole": Words("no row is cut", "没有行会被截断"),
    "cut": Words("19 of 20 rows are not cut", "95% 的行不会被截断"),
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
    "warmup": Words("short runs at a high rate need more of it", "步数少而学习率高时需要更长的预热"),
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
