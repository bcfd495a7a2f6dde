"""What was measured of advice, as tables of docs/advice.md in either language."""

import json
from pathlib import Path
from statistics import median
from typing import Any

Tree = dict[str, Any]
HERE = Path(__file__).parent
NEAR = 0.02
"""Regret that the choice may have."""
NEAR_FORETOLD = {"memory": 0.03, "tokens_per_second": 0.15}
"""By how much what a probe tells may be off."""
WORDS: dict[str, dict[str, Any]] = {
    "en": {
        "choice": "## How good the choice is",
        "choice_note": "`make bench-advice` tries methods on small tasks and compares what `advise --probe` puts first, with no runs "
        "to learn from, with the best of all trials by held-out loss. Every trial has the dials that advice writes for its method "
        "(batch, length, options, rate, warm-up) and the same number of optimizer steps; the best methods are tried at a third and at "
        "three times their rate as well, so the best found is the best of methods and rates together, and methods that advice does not "
        "choose, such as LISA, are tried too. Regret is by how much the advised loss is higher, as a share of the best: at most "
        "{near:.0%} on {tuned} of {tuned_all} tasks, and on {fresh} of {fresh_all} fresh ones. The first are in-sample: rules and rates "
        "were changed by what these trials showed, the warm-up by the task marked as seen; no rule for a fresh task. *Computed* is the "
        "regret of `advise` alone, without the range test of `--probe`. *Median* and *worst* are of methods at their computed rates: "
        "what a blind pick comes to. One seed and few steps; a longer run may rank methods otherwise. Of {all} methods {tried} were "
        "tried on each of the {tuned_all} tasks, {tried_else} on the others.",
        "range": "{} to {}",
        "choice_head": "| task | advised | its loss | best found | its loss | regret | computed | median | worst | trials |\n"
        "|---|---|---:|---|---:|---:|---:|---:|---:|---:|",
        "tuned": "", "seen": " (seen)", "fresh": " (fresh)",
        "foreseen": "## What a run foresees, against what was measured",
        "foreseen_note": "Where memory could be short, `run` takes the largest step of the recipe on tensors without values before "
        "training (`foresight.py`): the real model, method, objective and techniques, with no weights read and no formula for any of "
        "them. If more is needed than is free, it says so and names the cheapest change that fits. `make bench-advice` holds this "
        "against the peak of real processes: {count} cases, median error {median}, worst {worst}. Shapes with random weights, two "
        "steps each; 4,096 tokens a step of rows of up to 256 and `fast.compile` off where nothing else is said. Farthest off "
        "are a mixture with BitFit, of which 7 % less is foreseen than it takes, and a small model with DoRA in fp32, 7 % more.",
        "probed_note": "*Begun* is what `--probe` goes by: the first steps of the real run, here both, in a process of its own that is "
        "ended there. {probed} of the cases were begun so: median error {probed_median}, worst {probed_worst}.",
        "foreseen_head": "| model | method | objective | precision | else | foreseen | error | begun | error | measured |\n"
        "|---|---|---|---|---|---:|---:|---:|---:|---:|",
        "limits": "## Under a memory limit",
        "limits_note": "{count} recipes were drawn at random (`benchmarks/limits.yaml`): model, objective, goal, length and a limit that "
        "a control group sets. Each was written by `tunewright advise --probe --apply` under its limit, and then run under it for "
        "{steps} steps and a measurement: {ours} of {count} came to their end. For {refused} more that were drawn it wrote none and "
        "said that nothing fits. The same model, rows, length and steps with TRL 1.16 at "
        "its defaults (LoRA where an adapter was advised, else all weights): {trl} of the first {beside}. What the probe said of memory was off "
        "by {memory} in the median and {worst_memory} at most, of tokens a second by {speed} and {worst_speed}; {near_speed} of {ours} speeds were within 15 %. "
        "{near_memory} of {ours} peaks were within 3 %. Speeds are those of warm steps in both (of all steps where there are fewer than five), and no learning rates were tried. "
        "Measured on two cores: {processor}.",
        "limits_head": "| model | objective | goal | length | limit | advised | memory, foretold | measured | tokens/s, foretold | measured | TRL |\n"
        "|---|---|---|---:|---:|---|---:|---:|---:|---:|---|",
        "ended": "ended", "failed": "out of memory", "other": "failed", "again": "recomputed",
    },
    "zh": {
        "choice": "## 选择的质量",
        "choice_note": "`make bench-advice` 在小任务上试验各种方法，把 `advise --probe` 在没有任何历史运行时排在第一的方法，与所有试验中留出损失最低的对照。"
        "每次试验都使用建议为该方法写出的设置（批量、长度、选项、学习率、预热）和相同的优化步数；最好的几种方法还以三分之一和三倍的学习率试验，因此“最好”"
        "是在方法和学习率上共同搜索得到的；建议不会选的方法（例如 LISA）也在其中。遗憾值是所选方法的损失比最好的高多少（占最好值的比例）："
        "{tuned_all} 个任务中有 {tuned} 个不超过 {near:.0%}，另外 {fresh_all} 个新任务中有 {fresh} 个。前者是样本内结果：规则和学习率根据这些试验修改过，"
        "标为“看过”的任务使预热变长；没有为新任务改过规则。“仅计算”是不做 `--probe` 范围测试时的遗憾值。“中位数”和“最差”是各方法用计算出的学习率时的损失，"
        "即随意选一种方法的结果。只有一个种子、步数很少，训练更久时名次可能不同。{all} 种方法中，这 {tuned_all} 个任务各试过 {tried} 种，其余任务各试过 {tried_else} 种。",
        "range": "{} 至 {}",
        "choice_head": "| 任务 | 建议 | 损失 | 最好 | 损失 | 遗憾值 | 仅计算 | 方法中位数 | 最差 | 试验数 |\n"
        "|---|---|---:|---|---:|---:|---:|---:|---:|---:|",
        "tuned": "", "seen": "（看过）", "fresh": "（新）",
        "foreseen": "## 运行前的预计与实测对照",
        "foreseen_note": "内存可能不足时，`run` 在训练之前用没有数值的张量走一遍配方中最大的一步（`foresight.py`）：模型、方法、目标和加速技术都是"
        "真实的，不读取权重，也不为任何一种另写公式。如果需要的多于空闲的，它会说明，并给出放得下的最省改动。`make bench-advice` 把预计与真实进程的峰值对照："
        "{count} 种情形，误差中位数 {median}，最大 {worst}。模型为随机权重，各两步；未注明时每步 4,096 个词元，每行最多 256 个，`fast.compile` 关闭。"
        "相差最大的是用 BitFit 的混合专家模型（预计比实际少 7%）和 fp32 下用 DoRA 的小模型（多 7%）。",
        "probed_note": "“试运行”是 `--probe` 的依据：真实运行的前几步（这里是全部两步），在单独的进程中，到此为止。其中 {probed} 种情形这样试过：误差中位数 {probed_median}，"
        "最大 {probed_worst}。",
        "foreseen_head": "| 模型 | 方法 | 目标 | 精度 | 其他 | 预计 | 误差 | 试运行 | 误差 | 实测 |\n"
        "|---|---|---|---|---|---:|---:|---:|---:|---:|",
        "limits": "## 内存受限时",
        "limits_note": "随机抽取 {count} 份配方（`benchmarks/limits.yaml`）：模型、目标、目的、长度，以及由控制组设定的内存上限。每份都在上限之内由 "
        "`tunewright advise --probe --apply` 写出，再在同一上限之内运行 {steps} 步并评测：{count} 份中有 {ours} 份运行到底。另有 {refused} 份抽中的，"
        "它没有写出配方，并说明什么都放不下。同样的模型、数据、长度和步数，"
        "用 TRL 1.16 的默认设置（建议为适配器时用 LoRA，否则全参数）：前 {beside} 份中有 {trl} 份。试运行对内存的预测，误差中位数 {memory}，最大 {worst_memory}；"
        "对每秒词元数的预测，误差中位数 {speed}，最大 {worst_speed}；{ours} 个速度中有 {near_speed} 个误差在 15% 以内。"
        "{ours} 个峰值中有 {near_memory} 个误差在 3% 以内。两边的速度都取预热之后的步（不足五步时取全部），没有试学习率。在两个核上测量：{processor}。",
        "limits_head": "| 模型 | 目标 | 目的 | 长度 | 上限 | 建议 | 内存预测 | 实测 | 词元/秒预测 | 实测 | TRL |\n"
        "|---|---|---|---:|---:|---|---:|---:|---:|---:|---|",
        "ended": "完成", "failed": "内存不足", "other": "失败", "again": "重算激活值",
    },
}  # fmt: skip


def choice(language: str) -> list[str]:
    """What is advised beside the best of an exhaustive comparison, by choice.json."""
    words, rows = WORDS[language], _read("choice")
    told: Tree = {"near": NEAR, "all": rows[0]["of"]}
    for name, counted in (("tried", True), ("tried_else", False)):
        tried = sorted({row["methods"] for row in rows if (row["group"] == "tuned") is counted})
        told[name] = words["range"].format(tried[0], tried[-1]) if tried[1:] else str(tried[0])
    for group in ("tuned", "fresh"):
        regrets = [row["regret"] for row in rows if row["group"] == group]
        told |= {group: sum(regret <= NEAR for regret in regrets), f"{group}_all": len(regrets)}
    table = [_cells(_chosen(row, words, language)) for row in rows]
    return [words["choice"], words["choice_note"].format(**told), "\n".join([words["choice_head"], *table])]


def _chosen(row: Tree, words: Tree, language: str) -> list[str]:
    own, best = row["advised"], row["ranked"][0]
    return [
        row["title"][language] + words[row["group"]], own["name"], f"{own['loss']:.3f}", best["name"], f"{best['loss']:.3f}",
        f"{row['regret']:.1%}", f"{row['regret_computed']:.1%}", f"{row['median']:.3f}", f"{row['worst']:.3f}",
        str(len(row["ranked"])),
    ]  # fmt: skip


def foreseen(language: str) -> list[str]:
    """What `run` foresees of memory beside what was measured, by advice.json."""
    words, rows = WORDS[language], _read("advice")
    told = errors(rows, "foreseen")
    notes = [words["foreseen_note"].format(**told, count=len(rows))]
    if any("probed" in row for row in rows):
        probed = {f"probed_{name}": value for name, value in errors(rows, "probed").items()}
        notes.append(words["probed_note"].format(**probed, probed=sum("probed" in row for row in rows)))
    table = [_foreseen(row) for row in rows]
    return [words["foreseen"], *notes, "\n".join([words["foreseen_head"], *table])]


def errors(rows: list[Tree], of: str) -> Tree:
    """The median and the worst, of those that have it."""
    found = sorted(abs(row[of] / row["measured"] - 1) for row in rows if of in row)
    return {"median": f"{median(found):.1%}", "worst": f"{found[-1]:.1%}"}


def _foreseen(row: Tree) -> str:
    case, cells = dict(row["case"]), list[str]()
    own = [case.pop("model"), case.pop("method"), case.pop("objective", "sft"), case.pop("precision", "bf16")]
    dials = ", ".join(f"{name} {value}".replace(" True", "") for name, value in case.items())
    for of in ("foreseen", "probed"):
        cells += [_megabytes(row[of]), f"{row[of] / row['measured'] - 1:+.1%}"] if of in row else ["", ""]
    return _cells([*own, dials, *cells, _megabytes(row["measured"])])


def limits(language: str) -> list[str]:
    """Runs under a limit, by limits.json."""
    words, found = WORDS[language], _read("limits")
    rows, ended = found["rows"], [row["ours"] for row in found["rows"] if row["ours"]["finished"]]
    told: Tree = {"count": len(rows), "steps": found["steps"], "ours": len(ended)}
    told["refused"] = len(found["refused"])
    beside = [row["trl"]["finished"] for row in rows if "trl" in row]
    told |= {"trl": sum(beside), "beside": len(beside)}
    for name, key in (("memory", "memory"), ("speed", "tokens_per_second")):
        errors = sorted(abs(one["foretold"][key] / one["measured"][key] - 1) for one in ended)
        told |= {name: f"{median(errors):.1%}", f"worst_{name}": f"{errors[-1]:.1%}"}
        told[f"near_{name}"] = sum(error <= NEAR_FORETOLD[key] for error in errors)
    told["processor"] = ", ".join(sorted({row["processor"] for row in rows}))
    table = [_cells(_limited(row, words)) for row in rows]
    return [words["limits"], words["limits_note"].format(**told), "\n".join([words["limits_head"], *table])]


def _limited(row: Tree, words: Tree) -> list[str]:
    case, own = row["case"], row["ours"]
    figures = ["", words["failed"], "", ""]
    if own["finished"]:
        figures = [
            say(own[of][key])
            for key, say in (("memory", _megabytes), ("tokens_per_second", "{:,.0f}".format))
            for of in ("foretold", "measured")
        ]
    dials = own.get("dials", {})
    chosen = [own.get("choice", words["other"]), dials.get("precision", "")]
    chosen += [f"{dials['micro_tokens']:,}"] if dials else []
    chosen += [words["again"]] if dials.get("gradient_checkpointing") else []
    return [
        case["model"], case["objective"], case["goal"], str(case["length"]), f"{case['limit']:,} MB",
        ", ".join(filter(None, chosen)), *figures, words[row["trl"]["ended"]] if "trl" in row else "",
    ]  # fmt: skip


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.0f} MB"


def _cells(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _read(name: str) -> Any:
    return json.loads((HERE / f"{name}.json").read_text())
