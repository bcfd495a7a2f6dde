"""``document.py COUNTS FOLDER`` writes faults.md and faults.zh-CN.md from what the fault tests counted."""

import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunewright.core import machine
from tunewright.core.units import human_bytes, human_seconds

Counts = dict[int, list[dict[str, Any]]]


@dataclass(frozen=True)
class Row:
    """A line of the table; texts are (English, Chinese). ``least`` is how many faults the long run must try."""

    number: int
    fault: tuple[str, str]
    how: tuple[str, str]
    holds: tuple[str, str]
    least: int
    others: tuple[str, str] = ("not measured", "未测")


ROWS = (
    Row(1, ("kill anywhere", "任意时刻杀死"),
        ("SIGKILL at a random moment, half of them twice, then the same command",
         "在随机时刻发送 SIGKILL（一半再杀一次），然后运行同一命令"),
        ("same bytes of weights and optimizer, same ordered samples as without",
         "权重与优化器逐字节相同，样本顺序相同"), 200,
        ("HF Trainer 6 of 9 exact", "HF Trainer 9 次中 6 次精确")),
    Row(2, ("kill inside a save", "保存途中杀死"),
        ("every prefix and half-write of the store's operations, replayed", "重放存储操作的每个前缀与半写"),
        ("the newest complete checkpoint is found, exact finish", "找到最新的完整检查点并精确完成"), 100,
        ("HF Trainer 0 of 16", "HF Trainer 16 次中 0 次")),
    Row(3, ("damage", "文件损坏"),
        ("each file missing, empty, cut, bits flipped", "逐个文件：缺失、清空、截断、翻转位"),
        ("noticed, told, and the exact result or a named refusal", "被发现、被告知，结果精确或明确拒绝"), 100,
        ("HF Trainer 6 of 16 silent", "HF Trainer 16 次中 6 次悄无声息")),
    Row(4, ("disk full", "磁盘写满"),
        ("a small tmpfs, and a failure at each operation", "小的 tmpfs，以及在每个操作处失败"),
        ("exit 74 with the path, nothing half written, older checkpoint resumes",
         "退出码 74 并指明路径，不留半成品，可从旧检查点继续"), 50,
        ("HF Trainer could not go on", "HF Trainer 无法继续")),
    Row(5, ("preemption", "抢占"),
        ("SIGTERM or SIGINT, a second one inside the save", "SIGTERM 或 SIGINT，保存时再发一次"),
        ("a checkpoint of the very step, exit within step + save + 1 s", "恰好该步的检查点，在一步+保存+1 秒内退出"), 50),
    Row(6, ("hidden state", "隐藏状态"),
        ("dropout, packing, accumulation, epoch edge, mixtures ... x every objective",
         "dropout、打包、累积、轮次边界、混合数据……× 每个目标"),
        ("bit-exact resume", "逐位精确恢复"), 30, ("TRL 5 of 7", "TRL 7 项中 5 项")),
    Row(7, ("drift", "输入漂移"),
        ("one input changed: row, seed, batch, template, tokenizer, method, version ...",
         "改动一项输入：数据行、种子、批量、模板、分词器、方法、版本……"),
        ("refused, naming the field, old and new", "拒绝，并指明字段、旧值与新值"), 12, ("HF Trainer 0 of 3", "HF Trainer 3 次中 0 次")),
    Row(8, ("NaN or infinity", "NaN 或无穷"),
        ("in forward, gradient, optimizer state, weights", "出现在前向、梯度、优化器状态、权重中"),
        ("stops before the update, names tensor or sample, no bad checkpoint",
         "在更新前停止，指明张量或样本，不留坏检查点"), 100,
        ("HF Trainer ran 14 steps on", "HF Trainer 继续跑了 14 步")),
    Row(9, ("loss spike", "损失尖峰"),
        ("one batch of noise; clean training beside it", "一批噪声；另有干净的训练作对照"),
        ("caught at that step and passed over; at most 1 false alarm in 10,000 steps",
         "当步发现并跳过；一万步至多一次误报"), 20),
    Row(10, ("out of memory", "内存不足"),
        ("an allocator that fails above k tokens, forward or backward", "超过 k 个词元即失败的分配器，前向或反向"),
        ("micro-batch halves, same samples, loss within 1e-6 in fp32", "微批减半，样本不变，fp32 下损失相差不超过 1e-6"), 30),
    Row(11, ("double start", "重复启动"), ("four processes race for one run folder", "四个进程争抢同一运行目录"),
        ("exactly one wins", "恰好一个获胜"), 50),
    Row(14, ("bad data", "坏数据"), ("mutated rows in every format", "各种格式的变异数据行"),
        ("`file:line: reason`, nothing lost, no fully masked sample", "`文件:行: 原因`，不丢行，无全屏蔽样本"), 10_000),
    Row(15, ("torn download", "下载不完整"), ("every file of a model cut at 10 to 90 %", "模型每个文件截断在 10% 到 90%"),
        ("never trusted, named", "绝不信任，并指明文件"), 9),
    Row(16, ("hostile artifact", "恶意文件"),
        ("pickles, code in configs and templates, YAML tags, archives, header bombs, giant configs",
         "pickle、配置与模板中的代码、YAML 标签、压缩包、头部炸弹、巨型配置"),
        ("nothing runs, refused by name within 1 s and 200 MB", "什么都不执行，1 秒与 200 MB 内明确拒绝"), 50),
    Row(17, ("paths", "路径"), ("traversal and symlinks in every path field", "每个路径字段中的穿越与符号链接"),
        ("stays inside its root", "不越出根目录"), 200),
)  # fmt: skip

_WORDS = {
    "title": ("Faults survived", "经受住的故障"),
    "head": ("| # | fault | how it is injected | what must hold | survived | target | others |",
             "| # | 故障 | 如何注入 | 必须成立 | 通过 | 目标 | 其他工具 |"),
    "met": ("Every target is met.", "全部达标。"),
    "missed": ("Rows that fall short: {}.", "未达标的行：{}。"),
    "figures": ("Figures", "数字"),
    "broken": ("What did not hold", "未能成立的"),
    "none": ("Nothing.", "无。"),
}  # fmt: skip
_INTRO = (
    "`make faults` injects each fault for real, on a model of two layers, for every objective and precision that this "
    "machine has (what is planted inside passes, for objectives that pass over a batch once), and writes this page. A run first repeats itself without a fault: it gives the same bytes. "
    "`make test` does the same with smaller counts. The others' figures (HF Trainer, TRL) were measured once, by "
    "the project, and are not measured again here.\n\nHere: {}, {} cores, {}; torch {}, transformers {}; {} in all.",
    "`make faults` 在一个两层模型上，对本机支持的每个目标与精度真实地注入每种故障（植入前向或反向传播内部的故障只用于对每批只传播一次的目标），并写出本页。先做对照：无故障的运行重复一遍，"
    "字节相同。`make test` 以较小的次数做同样的事。其他工具（HF Trainer、TRL）的数字由本项目测过一次，此处不再重测。"
    "\n\n本次：{}，{} 核，{}；torch {}，transformers {}；共 {}。",
)


def read(path: Path) -> Counts:
    """What was counted, by row."""
    counts: Counts = defaultdict(list)
    for line in path.read_text().splitlines():
        tally = json.loads(line)
        counts[tally["row"]].append(tally)
    return counts


def sums(tallies: Iterable[dict[str, Any]]) -> tuple[int, int]:
    """Survived, and tried."""
    held = [(tally["held"], tally["of"]) for tally in tallies]
    return sum(h for h, _ in held), sum(of for _, of in held)


def missed(counts: Counts) -> list[int]:
    """Rows where something broke, or too little was tried."""
    short = []
    for row in ROWS:
        held, of = sums(counts[row.number])
        if held < of or of < row.least:
            short.append(row.number)
    return short


def page(counts: Counts, language: int) -> str:
    """The page; ``language`` 0 is English, 1 Chinese."""
    word = {key: texts[language] for key, texts in _WORDS.items()}
    short = missed(counts)
    verdict = word["missed"].format(", ".join(map(str, short))) if short else word["met"]
    table = [word["head"], "|---" * 7 + "|", *(_line(row, counts[row.number], language) for row in ROWS)]
    broken = [f"- {row}: {text}" for row in sorted(counts) for t in counts[row] for text in t["broken"]]
    parts = [f"# {word['title']}", _intro(counts, language), verdict, "\n".join(table), f"## {word['figures']}",
             "\n".join(_figures(counts)), f"## {word['broken']}", "\n".join(broken) or word["none"]]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _intro(counts: Counts, language: int) -> str:
    hardware, versions = machine.hardware(), machine.versions()
    seconds = sum(tally["seconds"] for tallies in counts.values() for tally in tallies)
    return _INTRO[language].format(
        hardware["processor"], hardware["cores"], human_bytes(hardware["memory"]), versions["torch"],
        versions["transformers"], human_seconds(seconds),
    )  # fmt: skip


def _line(row: Row, tallies: list[dict[str, Any]], language: int) -> str:
    held, of = sums(tallies)
    cells = (row.number, row.fault[language], row.how[language], row.holds[language], f"{held:,} / {of:,}",
             f"{row.least:,} / {row.least:,}", row.others[language])  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def _figures(counts: Counts) -> list[str]:
    """One line for each figure of a test; of equal names the largest."""
    lines = []
    for row in sorted(counts):
        notes: dict[str, float] = {}
        for tally in counts[row]:
            for name, value in tally["notes"].items():
                notes[name] = max(notes.get(name, value), value)
        lines += [f"- {row}: {name}: {value:.4g}" for name, value in notes.items()]
    return lines


def main() -> None:
    """Write both pages; exit code 1 if a row falls short."""
    counts, folder = read(Path(sys.argv[1])), Path(sys.argv[2])
    for language, name in enumerate(("faults.md", "faults.zh-CN.md")):
        (folder / name).write_text(page(counts, language), encoding="utf-8")
    sys.exit(1 if missed(counts) else 0)


if __name__ == "__main__":
    main()
