"""Write docs/methods.md, its Chinese twin and their pictures from the methods' own facts and benchmarks/methods.json.

python scripts/methods_page.py
"""

import json
import warnings
from collections.abc import Sequence
from html import escape
from math import ceil, cos, floor, log2, log10, pi, sin
from pathlib import Path
from typing import Any

from tunewright import catalogue
from tunewright.core.units import human_bytes, human_count
from tunewright.evaluate.charts import Scale, linear

ROOT = Path(__file__).parents[1]
MEASURED = ROOT / "benchmarks" / "methods.json"
DOCS = ROOT / "docs"
Tree = dict[str, Any]

WORDS: dict[str, Tree] = {
    "en": {
        "title": "# Tuning methods",
        "intro": "English | [中文](methods.zh-CN.md)\n\nWritten by `scripts/methods_page.py` from each method's own file "
        "and from measurements; `tunewright list methods` prints the same facts. A method is one word in a recipe, "
        "`method: lora`, or a mapping with its options, `method: {name: lora, rank: 8}`; "
        "`recipes/` has one recipe for each.",
        "facts": "## What each costs",
        "facts_note": "For a Llama of 7B at default options. Memory is that of weights, gradients and optimizer, as a "
        "multiple of full fine-tuning with AdamW over bf16 weights (16 bytes a parameter).",
        "facts_head": "| method | trains | share | memory | merges | not on |\n|---|---:|---:|---:|---|---|",
        "yes": "yes", "no": "no",
        "measured": "## Measured",
        "measured_note": "Same data, same {steps} steps of {tokens} tokens, same schedule for all; each method at the "
        "best of three learning rates (3, 10 and 30 times its default, chosen on pico with one seed: small models "
        "take larger rates). Mean and standard deviation over {seeds} seeds. Tokens/s and peak memory of the whole "
        "process are from separate short runs, one after another on two cores, bf16; read them as ratios. "
        "The passes of `benchmarks/methods.py` repeat it. A few steps favour methods that learn fast; they do not say which "
        "is best in the end.",
        "pico": "### builtin:pico (5.5 M) on its demo data",
        "tinytalk": "### tinytalk-3m-chat on alpaca_en_demo",
        "base": "Held-out loss before training: {before:.3f}.",
        "tinytalk_note": "Rates are those chosen on pico and were not chosen anew: a row above the loss before training "
        "says that such a rate is too high here, not that the method fails.",
        "pico_head": "| method | held-out loss | exact match | trainable | peak memory | tokens/s | adapter |\n"
        "|---|---:|---:|---:|---:|---:|---:|",
        "tinytalk_head": "| method | held-out loss | trainable | peak memory | tokens/s | adapter |\n"
        "|---|---:|---:|---:|---:|---:|",
        "pictures": "### LoRA: which rank, which layers",
        "pictures_note": "{steps} steps at ten times the default rate, alpha twice the rank, {seeds} seeds. Adapters on "
        "the first half of the blocks do better than on the last half, at the same size, on this small model.",
        "frontier": "Loss against trainable parameters, builtin:pico",
        "rank": "Held-out loss by LoRA's rank, builtin:pico",
        "layers": "Held-out loss by adapted layers, builtin:pico",
        "loss": "held-out loss", "parameters": "trainable parameters", "of_rank": "rank",
        "each": "## Method by method",
        "trains": "Trains", "formula": "Computes", "inference": "At inference", "when": "When", "paper": "Source",
        "merging": "Cannot be merged", "refuses": "Refused on",
    },
    "zh": {
        "title": "# 微调方法",
        "intro": "[English](methods.md) | 中文\n\n本页由 `scripts/methods_page.py` 根据每个方法自己的源文件和实测结果生成；"
        "`tunewright list methods` 打印同样的信息。在配方中，方法只是一个词 `method: lora`，或带选项的映射 "
        "`method: {name: lora, rank: 8}`；`recipes/` 中每个方法都有一份配方。",
        "facts": "## 各方法的代价",
        "facts_note": "以 7B 的 Llama、默认选项计。内存指权重、梯度与优化器之和，以 bf16 权重加 AdamW 的全量微调（每参数 16 字节）为 1。",
        "facts_head": "| 方法 | 训练参数 | 占比 | 内存 | 可合并 | 不适用于 |\n|---|---:|---:|---:|---|---|",
        "yes": "是", "no": "否",
        "measured": "## 实测",
        "measured_note": "所有方法使用相同的数据、相同的 {steps} 步（每步 {tokens} 个词元）和相同的学习率曲线；每个方法取三个学习率"
        "（默认值的 3、10、30 倍，在 pico 上用一个种子选出：小模型适合更大的学习率）中最好的一个。数值为 {seeds} 个种子的均值与标准差。"
        "词元/秒和整个进程的峰值内存来自另外的短跑，在两个核上逐个进行，bf16；请只看比例。用 `benchmarks/methods.py` 的各个步骤可以重做。"
        "步数少时学得快的方法占便宜，并不说明最终谁最好。",
        "pico": "### builtin:pico（5.5 M）与自带的演示数据",
        "tinytalk": "### tinytalk-3m-chat 与 alpaca_en_demo",
        "base": "训练前的留出损失：{before:.3f}。",
        "tinytalk_note": "学习率沿用在 pico 上选出的值，没有重新选择：某一行高于训练前的损失，说明这个学习率在这里太高，并不说明方法无效。",
        "pico_head": "| 方法 | 留出损失 | 完全匹配 | 训练参数 | 峰值内存 | 词元/秒 | 适配器大小 |\n"
        "|---|---:|---:|---:|---:|---:|---:|",
        "tinytalk_head": "| 方法 | 留出损失 | 训练参数 | 峰值内存 | 词元/秒 | 适配器大小 |\n|---|---:|---:|---:|---:|---:|",
        "pictures": "### LoRA：用多大的秩，改哪些层",
        "pictures_note": "{steps} 步，学习率为默认值的十倍，alpha 为秩的两倍，{seeds} 个种子。在这个小模型上，同样大小的适配器放在前一半的层比放在后一半好。",
        "frontier": "损失与训练参数量，builtin:pico",
        "rank": "LoRA 的秩与留出损失，builtin:pico",
        "layers": "改动的层与留出损失，builtin:pico",
        "loss": "留出损失", "parameters": "训练参数", "of_rank": "秩",
        "each": "## 逐个说明",
        "trains": "训练", "formula": "计算", "inference": "推理代价", "when": "何时使用", "paper": "出处",
        "merging": "不能合并", "refuses": "不适用于",
    },
}  # fmt: skip


def page(language: str, rows: Sequence[Tree], measured: Tree) -> str:
    """The whole page in one language."""
    words = WORDS[language]
    parts = [words["title"], words["intro"], words["facts"], words["facts_note"], _facts(rows, words)]
    if measured:
        parts += _measured(measured, words, language)
    parts += [words["each"], *(_method(row, words, language) for row in rows)]
    return "\n\n".join(parts) + "\n"


def _facts(rows: Sequence[Tree], words: Tree) -> str:
    lines = [
        f"| [{row['name']}](#{row['name']}) | {human_count(row['count'])} | {row['share']:.3%} "
        f"| {row['memory_factor']:.2f} | {words['yes' if row['mergeable'] else 'no']} | {', '.join(row['refuses'])} |"
        for row in rows
    ]
    return "\n".join([words["facts_head"], *lines])


def _measured(measured: Tree, words: Tree, language: str) -> list[str]:
    steps = ", ".join(f"{count} ({task})" for task, count in measured["steps"].items())
    note = words["measured_note"].format(
        steps=steps, tokens=measured["tokens_per_batch"], seeds=measured["seeds"]
    )
    parts = [words["measured"], note]
    for task, rows in measured["tasks"].items():
        if not rows:
            continue
        before = next(iter(rows.values()))["before"]
        table = "\n".join([words[f"{task}_head"], *(_result(n, r) for n, r in _best_first(rows))])
        note = " ".join([words["base"].format(before=before), *filter(None, [words.get(f"{task}_note")])])
        parts += [words[task], note, table]
    drawn = [f"![{words[name]}](images/methods-{name}.{language}.svg)" for name in pictures(measured, words)]
    return [
        *parts,
        drawn[0],
        *([words["pictures"], _sweeps(measured, words), *drawn[1:]] if drawn[1:] else []),
    ]


def _sweeps(measured: Tree, words: Tree) -> str:
    note: str = words["pictures_note"].format(steps=measured["steps"]["pico"], seeds=measured["seeds"])
    return note


def _best_first(rows: Tree) -> list[tuple[str, Tree]]:
    return sorted(rows.items(), key=lambda item: item[1]["loss"])


def _result(name: str, row: Tree) -> str:
    cells = [f"[{name}](#{name})", f"{row['loss']:.3f} ± {row['loss_sd']:.3f}"]
    if "exact_match" in row:
        cells.append(f"{row['exact_match']:.1%} ± {row['exact_match_sd']:.1%}")
    cells += [human_count(row["trainable"]), human_bytes(row["peak_memory"]), f"{row['tokens_per_second']:,.0f}",
              human_bytes(row["artifact_bytes"])]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def _method(row: Tree, words: Tree, language: str) -> str:
    lines = [
        f"### {row['name']}", "", row["idea"][language], "",
        f"- {words['formula']}: `{row['formula']}`", f"- {words['trains']}: {row['trains']}",
        f"- {words['inference']}: {row['inference'][language]}", f"- {words['when']}: {row['when'][language]}",
        f"- {words['paper']}: {row['paper']}",
    ]  # fmt: skip
    if row["keeps_apart"]:
        lines.append(f"- {words['merging']}: {row['keeps_apart'][language]}")
    if row["refuses"]:
        lines.append(f"- {words['refuses']}: " + "; ".join(f"{k} ({v})" for k, v in row["refuses"].items()))
    return "\n".join(lines)


# Pictures: one panel each, drawn for a white page, with nothing but text and lines.

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 460, 70, 20, 40, 50
INK, FAINT, ACCENT = "#222", "#ccc", "#1f6feb"


def pictures(measured: Tree, words: Tree) -> dict[str, str]:
    """Name -> SVG."""
    frontier = [
        (r["trainable"], r["loss"], r["loss_sd"], name) for name, r in measured["tasks"]["pico"].items()
    ]
    ranks = [(float(rank), r["loss"], r["loss_sd"], rank) for rank, r in measured["rank"].items()]
    drawn = {
        "frontier": _scatter(words["frontier"], frontier, words["parameters"], words["loss"], joined=False)
    }
    if ranks:
        drawn["rank"] = _scatter(words["rank"], ranks, words["of_rank"], words["loss"], joined=True)
    if measured["layers"]:
        drawn["layers"] = _bars(words["layers"], measured["layers"], words["loss"])
    return drawn


def _text(x: float, y: float, words: str, anchor: str = "middle", size: int = 13, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" {more}>{escape(words)}</text>'


def _frame(title: str, inner: list[str]) -> str:
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'font-family="system-ui, sans-serif" fill="{INK}">', f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>', _text(WIDTH / 2, 24, title, size=16), *inner, "</svg>",
    ])  # fmt: skip


def _losses(points: Sequence[tuple[float, float]], doubling: bool = False) -> Scale:
    low, high = min(loss - sd for loss, sd in points), max(loss + sd for loss, sd in points)
    if not doubling:
        return linear(low, high)
    return Scale(tuple(2.0**k for k in range(floor(log2(low)), ceil(log2(high)) + 1)), log=True)


def _y(scale: Scale, loss: float) -> float:
    return HEIGHT - BOTTOM - scale.share(loss) * (HEIGHT - TOP - BOTTOM)


def _rows(scale: Scale, name: str) -> list[str]:
    lines = [
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{_y(scale, t):.1f}" y2="{_y(scale, t):.1f}" stroke="{FAINT}"/>'
        + _text(LEFT - 8, _y(scale, t) + 4, label, "end", 12)
        for t, label in zip(scale.ticks, scale.labels(), strict=True)
    ]
    middle = (HEIGHT - BOTTOM + TOP) / 2
    return [*lines, _text(18, middle, name, more=f'transform="rotate(-90 18 {middle})"')]


def _scatter(
    title: str, points: list[tuple[float, float, float, str]], x_name: str, y_name: str, joined: bool
) -> str:
    scale = _losses([(loss, sd) for _, loss, sd, _ in points], doubling=not joined)
    low, high = log10(min(x for x, *_ in points)) - 0.15, log10(max(x for x, *_ in points)) + 0.15

    def across(x: float) -> float:
        return LEFT + (log10(x) - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    inner = _rows(scale, y_name)
    ticks = [x for x, *_ in points] if joined else [10.0**k for k in range(int(low) + 1, int(high) + 1)]
    inner += [_text(across(x), HEIGHT - BOTTOM + 20, human_count(x), size=12) for x in ticks]
    inner.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, x_name))
    if joined:
        path = " ".join(f"{across(x):.1f},{_y(scale, loss):.1f}" for x, loss, _, _ in points)
        inner.append(f'<polyline points="{path}" fill="none" stroke="{ACCENT}" stroke-width="2"/>')
    taken = [_box(across(x) - 5, _y(scale, loss) + 5, 10) for x, loss, _, _ in points]
    for x, loss, sd, name in sorted(points, key=lambda p: p[1]):
        inner.append(_dot(across(x), _y(scale, loss), _y(scale, loss + sd), _y(scale, loss - sd)))
        if not joined:
            inner += _label(taken, across(x), _y(scale, loss), name)
    return _frame(title, inner)


def _dot(x: float, y: float, above: float, below: float) -> str:
    return (
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{above:.1f}" y2="{below:.1f}" stroke="{ACCENT}"/>'
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{ACCENT}"/>'
    )


Box = tuple[float, float, float, float]


def _box(x: float, y: float, width: float) -> Box:
    """Of a line of small text that begins at x and stands on y."""
    return x, y - 10, x + width, y + 2


def _label(taken: list[Box], x: float, y: float, name: str) -> list[str]:
    """A dot's name where nothing else is, as near as can be; a thin line leads to it from further away."""
    width = 6.2 * len(name)
    beside = ((7.0, 4.0), (-7.0 - width, 4.0), (-width / 2, -9.0), (-width / 2, 18.0))
    around = [
        (r * cos(angle * pi / 8) - (width if cos(angle * pi / 8) < 0 else 0), r * sin(angle * pi / 8) + 4)
        for r in range(24, 240, 12)
        for angle in range(16)
    ]
    for dx, dy in (*beside, *around):
        box = _box(x + dx, y + dy, width)
        inside = box[0] > LEFT and box[2] < WIDTH - RIGHT and box[1] > TOP and box[3] < HEIGHT - BOTTOM
        if inside and not any(_meet(box, other) for other in taken):
            break
    taken.append(box)
    near = box[0] if dx > 0 else box[2]
    line = f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{near:.1f}" y2="{y + dy - 4:.1f}" stroke="{FAINT}"/>'
    return [*([line] if (dx, dy) not in beside else []), _text(x + dx, y + dy, name, "start", 11)]


def _meet(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _bars(title: str, rows: Tree, y_name: str) -> str:
    scale = linear(0.0, max(r["loss"] + r["loss_sd"] for r in rows.values()))
    room = (WIDTH - LEFT - RIGHT) / len(rows)
    inner = _rows(scale, y_name)
    for i, (name, row) in enumerate(rows.items()):
        middle, top, floor = LEFT + (i + 0.5) * room, _y(scale, row["loss"]), _y(scale, 0.0)
        inner += [
            f'<rect x="{middle - room * 0.3:.1f}" y="{top:.1f}" width="{room * 0.6:.1f}" height="{floor - top:.1f}" '
            f'fill="{ACCENT}" opacity="0.75"/>',
            f'<line x1="{middle:.1f}" x2="{middle:.1f}" y1="{_y(scale, row["loss"] + row["loss_sd"]):.1f}" '
            f'y2="{_y(scale, row["loss"] - row["loss_sd"]):.1f}" stroke="{INK}"/>',
            _text(middle, top - 14, f"{row['loss']:.3f}", size=12),
            _text(middle, HEIGHT - BOTTOM + 20, name, size=12),
            _text(middle, HEIGHT - BOTTOM + 36, human_count(row["trainable"]), size=11),
        ]
    return _frame(title, inner)


def main() -> None:
    """Both pages, and the pictures in both languages."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    rows = catalogue.method_rows()
    measured = json.loads(MEASURED.read_text()) if MEASURED.exists() else {}
    for language, name in (("en", "methods.md"), ("zh", "methods.zh-CN.md")):
        (DOCS / name).write_text(page(language, rows, measured), encoding="utf-8")
        for picture, svg in pictures(measured, WORDS[language]).items() if measured else ():
            (DOCS / "images" / f"methods-{picture}.{language}.svg").write_text(svg + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
