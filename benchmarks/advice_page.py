"""Write docs/advice.md and docs/advice.zh-CN.md: rules.yaml as a table, how good the choice is, and formulas against
published figures.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import advice_tables
from tunewright.advise import configs, hardware, memory, speed
from tunewright.advise.memory import Choice, Parts, estimate
from tunewright.advise.placement import Placement
from tunewright.advise.rules import Rule, rules
from tunewright.advise.shape import Linear, Shape
from tunewright.core.words import Words

DOCS = Path(__file__).parents[1] / "docs"
Tree = dict[str, Any]
GB, GIB = 1e9, float(1 << 30)
CUDA = 0.8 * GIB
SINGLE = Placement()
ZERO = "Rajbhandari et al. 2020, arXiv:1910.02054, figure 1"
QLORA = "Dettmers et al. 2023, arXiv:2305.14314, section 1"
FACTORY = "LLaMA-Factory, README, Hardware Requirement (estimates of its authors)"
LIT = "LitGPT, tutorials/resource-tables.md (measured, A100 40 GB, rows of 1,304 tokens)"
TUNE = "torchtune, README of October 2024 (measured, 2 rows of 2,048 tokens)"
ACTIVATIONS = "Korthikanti et al. 2022, arXiv:2205.05198, section 5"
LORA = "Hu et al. 2021, arXiv:2106.09685, section 4.2"
MEGATRON = "Narayanan et al. 2021, arXiv:2104.04473, section 5.1"
OWN = "recipes of this repository, 60 steps, 2 cores of an AMD EPYC with AVX-512 bf16, another process beside it"


@dataclass(frozen=True)
class Figure:
    """Something published, and what the formulas say of it."""

    what: Words
    published: float
    predicted: float
    unit: str
    source: str

    @property
    def ratio(self) -> float:
        """Predicted over published."""
        return self.predicted / self.published


def gpt(hidden: int, layers: int, heads: int) -> Shape:
    """GPT by its three numbers, with a vocabulary of 51,200."""
    wide, size = 4 * hidden, hidden // heads
    linears = (
        Linear("attention.qkv", hidden, 3 * hidden, layers, True), Linear("attention.out", hidden, hidden, layers, True),
        Linear("mlp.up", hidden, wide, layers, True), Linear("mlp.down", wide, hidden, layers, True),
    )  # fmt: skip
    return Shape("gpt", "gpt2", hidden, layers, heads, heads, size, wide, 51200, 2048, True, linears, positions=2048,
                 gated=False, layer_norm=True, packed=True)  # fmt: skip


def total(name: str, choice: Choice, placement: Placement = SINGLE) -> float:
    """Bytes of one device, CUDA's own included."""
    shape = configs.named(name)
    return placement.divide(estimate(shape, choice, CUDA), shape, choice).total


def _states(zero: int) -> float:
    """Weights, gradients and optimizer of 7.5 billion parameters on 64 devices, without gathered layers."""
    parts = Parts(weights=15 * GB, gradients=15 * GB, optimizer=90 * GB)
    nothing = Shape("none", "llama", 1, 1, 1, 1, 1, 1, 1, 1, True, ())
    return Placement(64, zero).divide(parts, nothing, Choice("full")).total


def _factory(name: str, method: str) -> float:
    """One row of 1,024 tokens, recomputed; LLaMA-Factory does not say of what its figures are."""
    return total(name, Choice(method, micro_tokens=1024, checkpointing=True))


def _lit(name: str, method: str, rows: int = 1) -> float:
    return total(
        name, Choice(method, micro_tokens=1304 * rows, length=1304, chunked=False, options={"rank": 8})
    )


def _scores(hidden: int, heads: int, layers: int) -> tuple[float, float]:
    """Korthikanti's 5·a·s/h, and the share of activations that is saved without scores."""
    shape = gpt(hidden, layers, heads)
    whole, flash = (
        memory.activations(shape, Choice("full", micro_tokens=2048, length=2048, dropout=True, flash=flash))
        for flash in (False, True)
    )
    return (whole - flash) / (2048 * hidden * layers), 1 - flash / whole


def _days() -> float:
    """GPT-3 on 300 billion tokens and 1,024 A100, tensor 8 and pipeline 8 parallel, recomputed."""
    shape, choice = gpt(12288, 96, 96), Choice("full", micro_tokens=2048, length=2048, checkpointing=True)
    place = Placement(1024, 0, tensor=8, pipeline=8)
    pace = speed.pace(shape, choice, place, hardware.parse("1024xA100-80GB"), 1536 * 2048)
    return 300e9 / pace.tokens_per_second / 86400


def _tune(name: str, method: str, devices: str, placement: Placement = SINGLE) -> float:
    choice = Choice(method, micro_tokens=4096, length=2048, checkpointing=True, options={"rank": 8})
    fleet = hardware.parse(devices)
    return speed.pace(configs.named(name), choice, placement, fleet, 4096 * fleet.count).tokens_per_second


def figures() -> list[Figure]:
    """All of them, bad ones too."""
    llama8, llama70, tuned = (
        "llama-3-8b",
        "llama-3-70b",
        {"micro_tokens": 4096, "length": 2048, "checkpointing": True},
    )
    gpt3, mt = _scores(12288, 96, 96), _scores(20480, 128, 105)
    big = gpt(12288, 96, 96)
    low = Choice("lora", micro_tokens=2048, options={"rank": 4})
    found = [
        Figure(Words("ZeRO, 7.5 B on 64 GPUs: data parallel", "ZeRO，64 个 GPU 上的 7.5 B：数据并行"), 120, _states(0) / GB, "GB", ZERO),
        Figure(Words("ZeRO, the same: optimizer and gradients divided (ZeRO-2)", "ZeRO，同上：划分优化器与梯度（ZeRO-2）"), 16.6, _states(2) / GB, "GB", ZERO),
        Figure(Words("ZeRO, the same: weights too (ZeRO-3)", "ZeRO，同上：权重也划分（ZeRO-3）"), 1.9, _states(3) / GB, "GB", ZERO),
        Figure(Words("LLaMA 65B, full fine-tuning in 16 bits (more than)", "LLaMA 65B，16 比特全参数微调（大于）"), 780,
               total("llama-65b", Choice("full", micro_tokens=512, checkpointing=True)) / GB, "GB", QLORA),
        Figure(Words("LLaMA 65B, QLoRA (less than)", "LLaMA 65B，QLoRA（小于）"), 48,
               total("llama-65b", Choice("qlora", micro_tokens=512, checkpointing=True, options={"rank": 64})) / GB, "GB", QLORA),
    ]  # fmt: skip
    published = {"llama-2-7b": (120, 16, 6), "llama-2-70b": (1200, 160, 48)}
    for name, row in published.items():
        for method, value in zip(("full", "lora", "qlora"), row, strict=True):
            found.append(
                Figure(
                    Words(f"{name}, {method}", f"{name}，{method}"),
                    value,
                    _factory(name, method) / GB,
                    "GB",
                    FACTORY,
                )
            )
    found += [
        Figure(Words("llama-2-7b, LoRA of rank 8", "llama-2-7b，秩 8 的 LoRA"), 21.30, _lit("llama-2-7b", "lora") / GB, "GB", LIT),
        Figure(Words("llama-2-7b, the same, two rows at a time", "llama-2-7b，同上，一次两行"), 29.07, _lit("llama-2-7b", "lora", 2) / GB, "GB", LIT),
        Figure(Words("llama-2-7b, the same in nf4 with double quantization", "llama-2-7b，同上，nf4 加双重量化"), 13.84, _lit("llama-2-7b", "qlora") / GB, "GB", LIT),
        Figure(Words("llama-2-13b, LoRA of rank 8", "llama-2-13b，秩 8 的 LoRA"), 38.12, _lit("llama-2-13b", "lora") / GB, "GB", LIT),
        Figure(Words("llama-2-13b, the same in nf4 with double quantization", "llama-2-13b，同上，nf4 加双重量化"), 22.55, _lit("llama-2-13b", "qlora") / GB, "GB", LIT),
        Figure(Words("llama-3-8b, LoRA, RTX 4090", "llama-3-8b，LoRA，RTX 4090"), 16.2, total(llama8, Choice("lora", **tuned)) / GIB, "GiB", TUNE),
        Figure(Words("llama-3-8b, QLoRA, RTX 4090", "llama-3-8b，QLoRA，RTX 4090"), 7.4, total(llama8, Choice("qlora", **tuned)) / GIB, "GiB", TUNE),
        Figure(Words("llama-3-70b, LoRA, ZeRO-3 over 8 A100, each", "llama-3-70b，LoRA，8 个 A100 上 ZeRO-3，每个"), 27.6,
               total(llama70, Choice("lora", **tuned), Placement(8, 3)) / GIB, "GiB", TUNE),
        Figure(Words("llama-3-8b, LoRA, RTX 4090", "llama-3-8b，LoRA，RTX 4090"), 3083, _tune(llama8, "lora", "1xRTX-4090"), "tokens/s", TUNE),
        Figure(Words("llama-3-8b, QLoRA, RTX 4090", "llama-3-8b，QLoRA，RTX 4090"), 2413, _tune(llama8, "qlora", "1xRTX-4090"), "tokens/s", TUNE),
        Figure(Words("llama-3-70b, LoRA, ZeRO-3 over 8 A100", "llama-3-70b，LoRA，8 个 A100 上 ZeRO-3"), 3497,
               _tune(llama70, "lora", "8xA100-80GB", Placement(8, 3)), "tokens/s", TUNE),
        Figure(Words("GPT-3: scores of attention over s·b·h", "GPT-3：注意力分数除以 s·b·h"), 80, gpt3[0], "bytes", ACTIVATIONS),
        Figure(Words("MT-NLG: scores of attention over s·b·h", "MT-NLG：注意力分数除以 s·b·h"), 64, mt[0], "bytes", ACTIVATIONS),
        Figure(Words("GPT-3: activations saved without scores", "GPT-3：不存分数所省的激活值"), 70, 100 * gpt3[1], "%", ACTIVATIONS),
        Figure(Words("MT-NLG: activations saved without scores", "MT-NLG：不存分数所省的激活值"), 65, 100 * mt[1], "%", ACTIVATIONS),
        Figure(Words("GPT-3 175B, full fine-tuning", "GPT-3 175B，全参数微调"), 1200, estimate(big, Choice("full", micro_tokens=2048, checkpointing=True)).total / GB,
               "GB", LORA),
        Figure(Words("GPT-3 175B, LoRA", "GPT-3 175B，LoRA"), 350, estimate(big, low).weights / GB, "GB", LORA),
        Figure(Words("GPT-3 175B, 300 B tokens on 1,024 A100", "GPT-3 175B，1,024 个 A100 上 300 B 词元"), 34, _days(), "days", MEGATRON),
        Figure(Words("builtin:pico, LoRA: peak memory", "builtin:pico，LoRA：峰值内存"), 0.779, _pico("lora")[0], "GiB", OWN),
        Figure(Words("builtin:pico, full: peak memory", "builtin:pico，全参数：峰值内存"), 0.846, _pico("full")[0], "GiB", OWN),
        Figure(Words("builtin:pico, LoRA: speed", "builtin:pico，LoRA：速度"), 4060, _pico("lora")[1], "tokens/s", OWN),
        Figure(Words("builtin:pico, full: speed", "builtin:pico，全参数：速度"), 4200, _pico("full")[1], "tokens/s", OWN),
    ]  # fmt: skip
    return found


def _pico(method: str) -> tuple[float, float]:
    """GiB, and tokens a second at the rate that was measured on that machine."""
    shape, choice = configs.find("builtin:pico"), Choice(method, micro_tokens=2048, length=64)
    rate = PICO_RATE * hardware.table("devices.yaml")["utilisation"]["here"]
    return estimate(shape, choice, 0.5 * GIB).total / GIB, rate / speed.operations(shape, choice)


PICO_RATE = 217.8e9
"""Operations a second in bf16."""

FORMULAS = (
    ("trained parameter, bf16", "训练的参数（bf16）", "`2 + 4 + 8 + 2` bytes: weight, fp32 master, two moments, gradient",
     "Rajbhandari et al. 2020, arXiv:1910.02054, 3.1"),
    ("frozen parameter", "冻结的参数", "`2` bytes; linear layers in nf4 `0.52`",
     "Dettmers et al. 2023, arXiv:2305.14314, 3"),
    ("LoRA", "LoRA", "`Σ r·(in + out)` over linear layers", "Hu et al. 2021, arXiv:2106.09685"),
    ("activations of a block", "一层的激活值", "`s·b·h·(34 + 5·a·s/h)` for GPT with dropout; its own widths for others; no "
     "`5·a·s/h` with attention in one kernel", "Korthikanti et al. 2022, arXiv:2205.05198, 4.1"),
    ("activations, recomputed", "激活值（重算）", "`2·s·b·h` a block, and one block whole", "the same, 5"),
    ("logits", "logits", "64 MB of them at a time", "Wijmans et al. 2024, arXiv:2411.09009"),
    ("model before training", "训练前的模型", "PPO of all weights: a second copy; DPO keeps numbers, GRPO none", "this project"),
    ("rollouts", "生成的回答", "`2·2·L·h_kv·s` bytes an answer", "Pope et al. 2022, arXiv:2211.05102, 2.1"),
    ("ZeRO-2, ZeRO-3", "ZeRO-2、ZeRO-3", "gradients and optimizer, then weights, over `N`; two gathered blocks beside them",
     "Rajbhandari et al. 2020, arXiv:1910.02054, 5"),
    ("operations of a token", "每个词元的运算", "`6·N`, frozen `4·N`, recomputed `+2·N`, and `12·L·h·s`; active weights of a mixture",
     "Kaplan et al. 2020, arXiv:2001.08361; Chowdhery et al. 2022, arXiv:2204.02311, B"),
    ("traffic of a step", "每步通信", "DDP `2·g`; ZeRO-3 also `2·w` a micro-batch; tensor parallel 4 all-reduces a block",
     "Rajbhandari et al. 2020, 7; Shoeybi et al. 2019, arXiv:1909.08053"),
)  # fmt: skip

WORDS: dict[str, dict[str, Any]] = {
    "en": {
        "title": "# Advice", "other": "English | [中文](advice.zh-CN.md)",
        "intro": "`tunewright advise` says which method fits the model, the data and the hardware, before anything runs. It "
        "needs a `config.json` and no weights, and does not load torch but to measure this machine, once. This page is "
        "written by `benchmarks/advice_page.py`.",
        "use": "## Use", "made": "## How it is made",
        "steps": "1. The model's shape is read from its config: every parameter by group, exact for {kinds}; or from a name: {names}.\n"
        "2. The data is read once: rows, kind, duplicates, lengths. The model's own tokenizer counts tokens if its "
        "`tokenizer.json` is here; else 4 Latin or 1.5 Chinese characters are taken for one, and the answer says *estimated*.\n"
        "3. For each method the simplest placement that fits is found: one device, DDP, ZeRO-2, ZeRO-3, tensor parallel in "
        "a node with pipelines over nodes, and offload for methods that train the model's own weights. A tenth of a device "
        "stays free. A simpler placement is passed over if another is twice as fast.\n"
        "4. The rules below add scores. What does not fit comes last, whatever its score. A deadline is met by fewer passes over the "
        "data, one at least; what is late even so loses five.\n"
        "5. Finished runs in `runs/` (or `runs=FOLDER`) of the same model and the same files overrule this: two methods or more "
        "are ordered by their measured held-out loss, and what ran on this machine shows its measured speed and memory.\n"
        "6. `--probe` takes the first ten steps of the best three plans on this machine, each the real run in a process of its own, "
        "and puts what was measured in place of what was predicted; what takes too much is cut smaller, then recomputed, and what "
        "is late is told by the speed that was measured. For the first it finds how many tokens at a time are fastest, whether bf16 "
        "or fp32 is, and by short runs at rates a factor of three apart the learning rate (not with `--no-rates`). "
        "Its speed is the mean of two looks that are apart: few machines are equally fast at all times.\n"
        "7. `--apply FILE` writes the recipe of the choice, each dial with its reason; what advice does not decide (held-out data, "
        "measurements, regularizers) stays as the recipe has it. If nothing fits it is not written. Of several stages it is the first, or `stage=NAME`.",
        "limits": "A fleet is a plan: recipes have no dial for placement. Memory of a host that state is offloaded to is told and "
        "not checked. Speed is operations over a share of the data sheet's rate (0.4; on this machine 0.35 of the rate "
        "measured), so read it as within a factor of two. Small models are faster on a CPU than that share says, and a "
        "process there takes more memory than the parts tell, by what its allocator keeps.",
        "rules": "## Rules", "rules_note": "From `advise/rules.yaml`. Chinese titles are those of the documents that a rule is from.",
        "rules_head": "| rule | where | scores | says | source |\n|---|---|---|---|---|",
        "always": "always", "formulas": "## Formulas", "formulas_head": "| part | formula | source |\n|---|---|---|",
        "figures": "## Formulas against published figures",
        "figures_note": "GB are 10^9 bytes, GiB 2^30. Where a source does not say what was run, one row of 1,024 tokens is taken, "
        "recomputed. Adapters are on all linear layers here and on some of them in most sources. QLoRA's paper and LoRA's "
        "count fewer bytes for a trained parameter than the 16 of mixed precision. Of {count} figures {near} are within a fifth.",
        "figures_head": "| what | published | predicted | ratio | source |\n|---|---:|---:|---:|---|",
    },
    "zh": {
        "title": "# 选型建议", "other": "[English](advice.md) | 中文",
        "intro": "`tunewright advise` 在运行之前说明哪种方法适合给定的模型、数据和硬件。只需要 `config.json`，不需要权重；除了"
        "首次测量本机之外不加载 torch。本页由 `benchmarks/advice_page.py` 生成。",
        "use": "## 用法", "made": "## 建议如何得出",
        "steps": "1. 从配置读出模型的形状：按组精确计算参数，支持 {kinds}；也可以用名称：{names}。\n"
        "2. 数据只读一遍：行数、类型、重复、长度。若本地有模型的 `tokenizer.json`，用它计数；否则按 4 个拉丁字符或 1.5 个汉字折合一个词元，并注明“估算”。\n"
        "3. 为每种方法找到放得下的最简单部署：单设备、DDP、ZeRO-2、ZeRO-3、节点内张量并行加跨节点流水线；训练模型自身权重的方法还可以卸载优化器。"
        "每个设备留出十分之一。若另一方案快一倍以上，则不取较简单的那个。\n"
        "4. 下面的规则给方法加分；放不下的方法无论得分多少都排在最后。给出期限时减少数据遍数（至少一遍）；仍然超时的减五分。\n"
        "5. `runs/`（或 `runs=目录`）中同一模型、同一数据的已完成运行优先于规则：有两种以上方法时按实测留出损失排序；在本机运行过的显示实测速度和内存。\n"
        "6. `--probe` 在本机对排在最前的三个方案各真实运行前十步（各用一个进程），用实测代替预测；放不下的先减小每次词元数，再重算激活值；是否超时按实测速度判断。对第一个方案，"
        "还会找出最快的每次词元数、bf16 与 fp32 哪个快，并用相差三倍的学习率各做一次短训练来选定学习率（`--no-rates` 则不试）。速度取前后两次测量的平均值：很少有机器始终一样快。\n"
        "7. `--apply 文件` 写出所选方法的配方，每个设置都注明理由；不由建议决定的部分（留出数据、评测、正则项）保持原样。什么都放不下时不写。有多个阶段时取第一个，或 `stage=名称`。",
        "limits": "多设备只是规划：配方里没有部署的设置。卸载所需的主机内存只作说明，不检查。速度等于运算量除以标称速率的一部分"
        "（0.4；本机为实测速率的 0.35），误差按两倍以内理解。小模型在 CPU 上比这个比例更快；进程实际占用的内存还包括分配器保留的部分。",
        "rules": "## 规则", "rules_note": "来自 `advise/rules.yaml`。书名号中是规则出处的文档标题。",
        "rules_head": "| 规则 | 条件 | 得分 | 说明 | 出处 |\n|---|---|---|---|---|",
        "always": "总是", "formulas": "## 公式", "formulas_head": "| 部分 | 公式 | 出处 |\n|---|---|---|",
        "figures": "## 公式与已发表数字的对照",
        "figures_note": "GB 为 10^9 字节，GiB 为 2^30 字节。来源没有说明条件时，按一行 1,024 个词元、重算激活值计。这里的适配器加在所有线性层上，"
        "多数来源只加在一部分上。QLoRA 与 LoRA 论文对每个训练参数所计的字节少于混合精度的 16。{count} 个数字中有 {near} 个误差在五分之一以内。",
        "figures_head": "| 内容 | 已发表 | 预测 | 比值 | 出处 |\n|---|---:|---:|---:|---|",
    },
}  # fmt: skip

EXAMPLES = """```bash
tunewright advise model=shape:llama-2-70b devices=8xH200 goal=quality
tunewright advise recipes/lora.yaml data=my.jsonl memory=24GB deadline=2h
tunewright advise model=builtin:pico data=my.jsonl --apply advised.yaml
```"""


def page(language: str, found: Sequence[Figure]) -> str:
    """The whole page in one language."""
    words = WORDS[language]
    kinds, names = ", ".join(configs.KINDS), ", ".join(configs.table("shapes.yaml"))
    near = sum(1 for figure in found if 1 / 1.2 <= figure.ratio <= 1.2)
    parts = [
        words["title"], words["other"], words["intro"], words["use"], EXAMPLES, words["made"],
        words["steps"].format(kinds=kinds, names=names), words["limits"], words["rules"], words["rules_note"],
        "\n".join([words["rules_head"], *(_rule(rule, language) for rule in rules())]), *advice_tables.choice(language), words["formulas"],
        "\n".join([words["formulas_head"], *(_formula(row, language) for row in FORMULAS)]), words["figures"],
        words["figures_note"].format(count=len(found), near=near),
        "\n".join([words["figures_head"], *(_figure(figure, language) for figure in found)]), *advice_tables.foreseen(language), *advice_tables.limits(language),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _rule(rule: Rule, language: str) -> str:
    where = (
        ", ".join(f"{name} {_plain(value)}" for name, value in rule.when.items()) or WORDS[language]["always"]
    )
    effects = [f"{name} {score:+d}" for name, score in rule.scores.items()]
    effects += [f"`objective: {rule.objective}`"] if rule.objective else []
    effects += [
        f"`{name}.{key}: {value}`" for name, own in rule.options.items() for key, value in own.items()
    ]
    effects += [f"`{name}.lr × {factor:g}`" for name, factor in rule.rates.items()]
    effects += [f"`train.{key}: {value}`" for key, value in rule.train.items()]
    said = rule.words[1 if language == "zh" else 0]
    return f"| {rule.id} | {where} | {', '.join(effects)} | {said} | {rule.source} |"


def _plain(value: Any) -> str:
    return (
        f"{value:,.0f}"
        if isinstance(value, (int, float)) and not isinstance(value, bool)
        else str(value).lower()
    )


def _formula(row: tuple[str, str, str, str], language: str) -> str:
    en, zh, formula, source = row
    return f"| {zh if language == 'zh' else en} | {formula} | {source} |"


def _figure(figure: Figure, language: str) -> str:
    shown = [f"{value:,.4g}" for value in (figure.published, figure.predicted)]
    what, unit = figure.what[1 if language == "zh" else 0], figure.unit
    return f"| {what} | {shown[0]} {unit} | {shown[1]} {unit} | {figure.ratio:.2f} | {figure.source} |"


def main() -> None:
    """Both pages."""
    found = figures()
    for language, name in (("en", "advice.md"), ("zh", "advice.zh-CN.md")):
        (DOCS / name).write_text(page(language, found), encoding="utf-8")


if __name__ == "__main__":
    main()
