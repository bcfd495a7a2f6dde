"""Advice as people and programs read it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tunewright.advise import reasons
from tunewright.advise.plan import Plan
from tunewright.advise.situation import Situation
from tunewright.core.units import human_bytes, human_count, human_seconds
from tunewright.core.words import Words

Tree = dict[str, Any]
Cell = Callable[[Plan], str]
_HOUR = 3600
_NAMES = {
    "weights": Words("weights", "权重"), "gradients": Words("gradients", "梯度"),
    "optimizer": Words("optimizer", "优化器"), "activations": Words("activations", "激活值"),
    "logits": Words("logits", "logits"), "cache": Words("reference and rollouts", "参考模型与生成"),
    "evaluation": Words("evaluation", "评测"), "process": Words("process", "进程"),
}  # fmt: skip
_KINDS = {
    "conversations": "对话", "texts": "纯文本", "pairs": "偏好对", "labels": "带标签",
}  # fmt: skip


def _precision(plan: Plan) -> str:
    return f"{plan.choice.precision}, nf4" if plan.choice.family.base_bytes else plan.choice.precision


_COLUMNS: dict[str, tuple[Words, bool, Cell]] = {
    "method": (Words("method", "方法"), False, lambda p: p.method),
    "precision": (Words("precision", "精度"), False, _precision),
    "placement": (Words("placement", "部署"), False, lambda p: p.placement.name),
    "memory": (Words("memory", "内存"), True, lambda p: human_bytes(p.memory)),
    "speed": (Words("tokens/s", "词元/秒"), True, lambda p: human_count(p.tokens_per_second)),
    "time": (Words("time", "用时"), True, lambda p: human_seconds(p.hours * _HOUR)),
    "saved": (Words("artifact", "产物"), True, lambda p: human_bytes(p.artifact_bytes)),
    "trains": (Words("trains", "训练参数"), True, lambda p: human_count(p.trainable)),
    "score": (Words("score", "得分"), True, lambda p: str(p.score)),
}  # fmt: skip


def lines(situation: Situation, plans: Sequence[Plan], language: str) -> list[str]:
    """The whole answer: what was asked, a row for each method, the choice and why."""
    best, say = plans[0], _Said(language)
    return [
        *_asked(situation, say), "", *_table(plans, say), "",
        say(f"Choice: {_chosen(best)}", f"选择：{_chosen(best)}"), *_parts(best, say),
        *(f"- {words[say.index]}" for words in reasons.of(situation, best)),
    ]  # fmt: skip


class _Said:
    """One of two languages."""

    def __init__(self, language: str) -> None:
        self.index = 1 if language == "zh" else 0

    def __call__(self, en: str, zh: str) -> str:
        return (en, zh)[self.index]


def _chosen(plan: Plan) -> str:
    return f"{plan.method}, {plan.choice.objective}, {_precision(plan)}, {plan.placement.name}"


def _asked(situation: Situation, say: _Said) -> list[str]:
    data = situation.data
    tokens, rows = human_count(data.tokens), f"{data.rows:,}"
    if data.assumed:
        told = say(
            f"no data: {rows} rows of up to {data.longest} tokens are assumed",
            f"没有数据：假定 {rows} 行，每行最多 {data.longest} 个词元",
        )
    else:
        about = say("counted" if data.counted else "estimated", "实数" if data.counted else "估算")
        told = say(
            f"{rows} rows of {data.kind}, {tokens} tokens ({about}), {data.median} median, {data.p95} p95, "
            f"{data.longest} longest; {data.duplicates} duplicates, {data.problems} bad rows",
            f"{rows} 行{_KINDS[data.kind]}，{tokens} 个词元（{about}），中位数 {data.median}，95 分位 {data.p95}，"
            f"最长 {data.longest}；重复 {data.duplicates} 行，有问题 {data.problems} 行",
        )
    labels = (say("model", "模型"), say("data", "数据"), say("devices", "设备"))
    texts = (str(situation.shape), told, str(situation.fleet))
    return [f"{_padded(label, 8, False)} {text}" for label, text in zip(labels, texts, strict=True)]


def _table(plans: Sequence[Plan], say: _Said) -> list[str]:
    titles = [words[say.index] for words, _, _ in _COLUMNS.values()] + [say("fits", "放得下")]
    rows = [[cell(plan) for _, _, cell in _COLUMNS.values()] + [_fits(plan, say)] for plan in plans]
    right = [aligned for _, aligned, _ in _COLUMNS.values()] + [False]
    widths = [max(map(_width, column)) for column in zip(titles, *rows, strict=True)]
    return [
        "  ".join(_padded(*cell) for cell in zip(row, widths, right, strict=True)).rstrip()
        for row in (titles, *rows)
    ]


def _fits(plan: Plan, say: _Said) -> str:
    told = say("yes", "是") if plan.fits else say("no", "否")
    return told + (say(", measured", "，实测") if plan.measured else "")


def _width(text: str) -> int:
    """Columns of a terminal: Chinese characters take two."""
    return sum(2 if "\u1100" <= sign <= "\uffe6" else 1 for sign in text)


def _padded(text: str, width: int, right: bool) -> str:
    gap = " " * (width - _width(text))
    return gap + text if right else text + gap


def _parts(plan: Plan, say: _Said) -> list[str]:
    """Where the memory of a device goes, and the dials."""
    parts = {_NAMES[name][say.index]: size for name, size in plan.parts.to_json().items() if size}
    held = say(", ", "，").join(f"{name} {human_bytes(size)}" for name, size in parts.items())
    micro, length = plan.choice.micro_tokens, plan.choice.length
    step = say(
        f"{plan.batch:,} tokens a step, {micro:,} at a time on a device, rows of up to {length}, "
        f"{plan.epochs:g} epochs, rate {plan.lr:.0e}",
        f"每步 {plan.batch:,} 个词元，每个设备一次 {micro:,} 个，每行最多 {length} 个，{plan.epochs:g} 轮，学习率 {plan.lr:.0e}",
    )
    checkpointing = say(", gradient checkpointing", "，梯度检查点") if plan.choice.checkpointing else ""
    return [
        say(f"Memory of a device (predicted): {held}", f"单设备内存（预测）：{held}"),
        say("Dials: ", "设置：") + step + checkpointing,
    ]


def to_json(situation: Situation, plans: Sequence[Plan]) -> Tree:
    """The same for programs; bytes, seconds and tokens."""
    data, fleet = situation.data, situation.fleet
    return {
        "model": situation.model, "parameters": dict(situation.shape.groups) | {
            "total": situation.shape.parameters, "active": situation.shape.active},
        "data": {**vars(data), "tasks": list(data.tasks), "labels": list(data.labels), "sha256": list(data.sha256)},
        "devices": {"count": fleet.count, "name": fleet.device.name, "memory": fleet.device.memory},
        "choice": plans[0].method, "plans": [_plan(situation, plan) for plan in plans],
    }  # fmt: skip


def _plan(situation: Situation, plan: Plan) -> Tree:
    choice: Mapping[str, Any] = {"name": plan.method, **plan.choice.options}
    return {
        "method": dict(choice), "objective": plan.choice.objective, "precision": plan.choice.precision,
        "placement": plan.placement.name, "micro_tokens": plan.choice.micro_tokens, "tokens_per_batch": plan.batch,
        "gradient_checkpointing": plan.choice.checkpointing, "max_length": plan.choice.length,
        "epochs": plan.epochs, "lr": plan.lr, "parts": plan.parts.to_json(), "memory": round(plan.memory),
        "tokens_per_second": plan.tokens_per_second, "seconds": plan.hours * _HOUR, "trainable": plan.trainable,
        "artifact_bytes": plan.artifact_bytes, "fits": plan.fits, "score": plan.score,
        "measured": plan.measured.run if plan.measured else None,
        "reasons": [words._asdict() for words in reasons.of(situation, plan)],
    }  # fmt: skip
