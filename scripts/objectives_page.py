"""Write docs/objectives.md and its Chinese twin from the objectives' own facts.

python scripts/objectives_page.py
"""

import json
from pathlib import Path
from typing import Any

from tunewright import objectives, regularizers
from tunewright.core import plugins

DOCS = Path(__file__).parents[1] / "docs"
ROWS: dict[str, dict[str, Any]] = {
    "texts": {"text": "Blood carries oxygen from the lungs to every cell."},
    "conversations": {"prompt": "What carries oxygen?", "completion": "Blood."},
    "pairs": {"prompt": "What carries oxygen?", "chosen": "Blood.", "rejected": "The lungs do."},
    "labels": {"text": "The flat is damp and the landlord does not answer.", "label": "complaint"},
    "verdicts": {"prompt": "What carries oxygen?", "completion": "The lungs do.", "label": False},
}
WORDS: dict[str, dict[str, Any]] = {
    "en": {
        "title": "# Objectives",
        "intro": "English | [中文](objectives.zh-CN.md)\n\nWritten by `scripts/objectives_page.py` from each objective's own "
        "file. An objective is one word in a recipe, `objective: dpo`, or a mapping with its options, "
        "`objective: {name: dpo, beta: 0.05}`. Every objective works with every method. In formulas π is the model, π₀ the "
        "model before training, x the question, y the answer, |y| its tokens, y₁ the chosen and y₂ the rejected one, σ the "
        "logistic function.",
        "data": "## Data", "data_note": "One row of each kind, as JSON; Alpaca, ShareGPT and messages files with such answers "
        "are read as well, and hh-rlhf's transcripts. `tunewright lint FILE` names every row that cannot be used: equal "
        "answers, empty ones, answers to different questions.",
        "head": "| objective | learns from | paper |\n|---|---|---|",
        "texts": "running text", "conversations": "answers", "pairs": "a better and a worse answer",
        "verdicts": "answers judged good or bad", "labels": "texts with their class",
        "formula": "Minimises", "wants": "Learns from", "options": "Options", "none": "none", "dials": "Dials", "watch": "Watch",
        "when": "When", "paper": "Source",
        "held": "## Regularizers", "held_note": "They hold a model to what it knew, beside any objective and any number of "
        "them: `regularizers: [l2sp, {name: ewc, data: old.jsonl}]`. `evaluate.old: {name: files}` measures old data before "
        "and after, and the report says what was forgotten.", "added": "Adds",
    },
    "zh": {
        "title": "# 训练目标",
        "intro": "[English](objectives.md) | 中文\n\n本页由 `scripts/objectives_page.py` 根据每个目标自己的源文件生成。在配方中，目标只是一个词 "
        "`objective: dpo`，或带选项的映射 `objective: {name: dpo, beta: 0.05}`。每个目标都可与每种方法组合。公式中 π 是模型，π₀ 是训练前的模型，"
        "x 是问题，y 是回答，|y| 是其词元数，y₁ 为被选回答，y₂ 为被拒回答，σ 为 logistic 函数。",
        "data": "## 数据", "data_note": "每种数据各一行（JSON）；带有这些回答的 Alpaca、ShareGPT、messages 文件以及 hh-rlhf 的对话文本也能读取。"
        "`tunewright lint FILE` 会指出每一行不可用的数据：两个回答相同、为空，或回答的不是同一个问题。",
        "head": "| 目标 | 数据 | 出处 |\n|---|---|---|",
        "texts": "连续文本", "conversations": "回答", "pairs": "较好与较差的回答", "verdicts": "带好坏判断的回答", "labels": "带类别的文本",
        "formula": "最小化", "wants": "数据", "options": "选项", "none": "无", "dials": "关键选项", "watch": "观察",
        "when": "何时使用", "paper": "出处",
        "held": "## 正则项", "held_note": "正则项使模型保留原有知识，可与任何目标组合，数量不限：`regularizers: [l2sp, {name: ewc, data: old.jsonl}]`。"
        "`evaluate.old: {name: files}` 在训练前后测量旧数据，报告会说明遗忘了多少。", "added": "附加项",
    },
}  # fmt: skip


def page(language: str) -> str:
    """The whole page in one language."""
    words = WORDS[language]
    kinds = {name: objectives.kind(name) for name in plugins.names("objectives")}
    table = [
        f"| [{name}](#{name}) | {words[kind.wants]} | {kind.facts.paper} |" for name, kind in kinds.items()
    ]
    rows = [f"- {words[wants]}: `{json.dumps(row)}`" for wants, row in ROWS.items()]
    parts = [words["title"], words["intro"], "\n".join([words["head"], *table]), words["data"], words["data_note"],
             "\n".join(rows), *(_objective(name, kind, language) for name, kind in kinds.items()),
             words["held"], words["held_note"], *(_regularizer(name, language) for name in plugins.names("regularizers"))]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _objective(name: str, kind: type[objectives.Objective], language: str) -> str:
    words, facts = WORDS[language], kind.facts
    lines = [
        f"## {name}", "", getattr(facts.idea, language), "",
        f"- {words['formula']}: `{facts.formula}`", f"- {words['wants']}: {words[kind.wants]}",
        f"- {words['options']}: {_options('objectives', name, words)}", f"- {words['dials']}: {getattr(facts.dials, language)}",
        f"- {words['watch']}: {getattr(facts.watch, language)}", f"- {words['when']}: {getattr(facts.when, language)}",
        f"- {words['paper']}: {facts.paper}",
    ]  # fmt: skip
    return "\n".join(lines)


def _regularizer(name: str, language: str) -> str:
    words, facts = WORDS[language], regularizers.kind(name).facts
    lines = [
        f"### {name}", "", getattr(facts.idea, language), "", f"- {words['added']}: `{facts.formula}`",
        f"- {words['options']}: {_options('regularizers', name, words)}", f"- {words['when']}: {getattr(facts.when, language)}",
        f"- {words['paper']}: {facts.paper}",
    ]  # fmt: skip
    return "\n".join(lines)


def _options(room: str, name: str, words: dict[str, Any]) -> str:
    options = plugins.load(room, name).Config.model_construct().model_dump(mode="json")
    return ", ".join(f"`{key}: {json.dumps(value)}`" for key, value in options.items()) or str(words["none"])


def main() -> None:
    """Both pages."""
    for language, name in (("en", "objectives.md"), ("zh", "objectives.zh-CN.md")):
        (DOCS / name).write_text(page(language), encoding="utf-8")


if __name__ == "__main__":
    main()
