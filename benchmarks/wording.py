"""What the results' page says, in both languages."""

from typing import Any

SYSTEMS = {
    "en": {
        "tunewright": "Tunewright, default recipe",
        "tunewright-plain": "Tunewright, techniques off",
        "trl": "TRL SFTTrainer, defaults",
        "trl-best": "TRL SFTTrainer, best settings",
        "hf": "HF Trainer + PEFT, defaults",
        "hf-best": "HF Trainer + PEFT, best settings",
        "llamafactory": "LLaMA-Factory, defaults",
        "llamafactory-best": "LLaMA-Factory, best settings",
    },
    "zh": {
        "tunewright": "Tunewright，默认配方",
        "tunewright-plain": "Tunewright，关闭加速技术",
        "trl": "TRL SFTTrainer，默认设置",
        "trl-best": "TRL SFTTrainer，最佳设置",
        "hf": "HF Trainer + PEFT，默认设置",
        "hf-best": "HF Trainer + PEFT，最佳设置",
        "llamafactory": "LLaMA-Factory，默认设置",
        "llamafactory-best": "LLaMA-Factory，最佳设置",
    },
}

WORDS: dict[str, dict[str, Any]] = {
    "en": {
        "title": "# Benchmarks",
        "intro": "English | [中文](benchmarks.zh-CN.md)\n\nWritten by `make bench` from `benchmarks/workloads.yaml` and "
        "`benchmarks/results.json`. Systems run in turn, A B A B, each run in a process of its own. Figures are medians "
        "with the lowest and highest run in brackets.",
        "none": "No figures yet: `make bench-peers`, then `make bench` on an otherwise idle machine.",
        "how": "## What is measured\n\n"
        "- Every system gets the same model folder, the same rows and the same chat template, learns the same answers "
        "(prompts are not learned), and has the same learning rate and epochs. Nothing is evaluated during a run. Batches are each system's own, 8 rows "
        "for the peers and 4,096 tokens for Tunewright (768 on workload e, where eight rows have 1,270), so the number of updates "
        "differs, and with it the loss.\n"
        "- **Tokens/s** counts tokens without padding over the whole job, from the start of the process to the saved "
        "adapter or model, all imports, tokenization and compilation included. Caches are {caches}. **Steady** is the "
        "same over all optimizer steps but the first.\n"
        "- **First step** is the time until the first optimizer step begins. **Peak memory** is the highest resident memory of the "
        "process tree; on a GPU, the memory reserved on it.\n"
        "- **Held-out loss** is measured afterwards by plain transformers and PEFT in fp32 on the same rows for all.\n"
        "- **Runs by commit**: only what is run by one call of the benchmark goes in turn; rows of other commits, and rows "
        "that were added later, did not. The same job took up to a fifth longer from one day to the next on these virtual machines.\n"
        "- *Defaults* are batches of 8 rows on the device and nothing else set; *best settings* are the fastest found by "
        "`python -m benchmarks.tune_peers` among the `candidates` of `workloads.yaml`, named below; they were searched on workload "
        "a, on a processor of the same kind, and are used for the others, too, on g and h without packing, which DPOTrainer and GRPOTrainer lack. Workload g is "
        "learned by DPOTrainer and h by GRPOTrainer; tokens are those of both conversations of a pair, and of h's rows "
        "without what is drawn for them. LLaMA-Factory is given an empty module for "
        "torchaudio, which it imports but never uses for text.",
        "caches": {"cold": "empty at the start of every run", "warm": "kept between a system's runs"},
        "targets": "### Targets",
        "targets_head": "| workload | target | asked | reached | met |\n|---|---|---:|---:|---|",
        "yes": "yes", "no": "no", "unmeasured": "not measured",
        "what": {
            "tokens_per_second": "tokens/s", "peak_memory": "peak memory", "held_out_loss": "held-out loss",
            "utilisation": "matrix-product utilisation", "first_step": "first step, seconds",
            "later_epochs": "tokens/s after the first epoch", "time_to_loss": "time to the loss",
        },
        "against": "{what} against {other}", "off_by": "{what}, difference to {other}",
        "cpu": "## On {threads} CPU threads, {kind}", "no_bf16": "no instructions for bf16",
        "elsewhere": "Targets are set for matrix units (amx_bf16). A processor without them has a lower rate, and no system can be faster "
        "than its steady speed divided by its utilisation.", "gpu": "## On a GPU: {name}",
        "machine": "{processor}, {memory}{extensions}; Python {python}; commit {commit}, {when}.",
        "commits": "Runs by commit: {told}.",
        "rates": "bf16 matrix products in the same run: {square} on a large square, {own_shapes} on this model's own shapes.",
        "case": "case", "system": "system", "runs": "runs", "failed": "failed: {why}",
        "columns": {
            "tokens_per_second": "tokens/s", "steady": "steady", "later_epochs": "after epoch 1", "seconds": "seconds",
            "first_step": "first step", "time_to_loss": "time to the loss", "peak_memory": "peak memory",
            "utilisation": "utilisation", "held_out_loss": "held-out loss",
        },
        "rows": "{rows} rows, {tokens} tokens, {supervised} of them learned; {epochs} epoch(s), learning rate {lr}.",
        "goal": "The loss to reach is {goal:.3f}, the lowest that every run of every system came down to.",
        "utilisation": "## Utilisation\n\nThe share of the machine's matrix rate that a run's necessary products make up, over all steps "
        "but the first. With P the parameters of the blocks' linear layers, A those of the LoRA factors, V·d the output head, "
        "L blocks with queries of width q, and T the lengths of the rows, an epoch needs\n\n"
        "    Σ_rows (4·P + 6·A)·T + 4·V·d·(supervised tokens) + 6·L·q·T²\n\n"
        "operations under LoRA: a frozen weight is multiplied forward and for its input's gradient, 2 operations a "
        "parameter each; its own gradient is never needed. Full fine-tuning needs it: 6·P and 6·V·d, no A. Causal attention needs half "
        "of the T² square, in 2 products forward and 4 backward. Padding, recomputation and logits that no label asks for are no "
        "work that was asked for and do not count. The rate is that of the large square product.",
        "settings": "## Settings", "settings_head": "| system | workload | settings | libraries |\n|---|---|---|---|",
    },
    "zh": {
        "title": "# 基准测试",
        "intro": "[English](benchmarks.md) | 中文\n\n本页由 `make bench` 根据 `benchmarks/workloads.yaml` 与 `benchmarks/results.json` 生成。"
        "各系统轮流运行（A B A B），每次运行都是单独的进程。数值为中位数，括号内为最低与最高的一次。",
        "none": "还没有数据：先 `make bench-peers`，再在空闲的机器上 `make bench`。",
        "how": "## 测量方法\n\n"
        "- 所有系统使用同一个模型目录、同样的数据行和同一个对话模板，学习同样的回答（不学习提问），学习率与轮数相同；运行中不做评测。"
        "批大小是各系统自己的：对比系统为 8 行，Tunewright 为 4096 个词元（workload e 为 768 个，8 行约为 1270 个），因此更新次数不同，损失也随之不同。\n"
        "- **词元/秒**：不计填充的词元数除以整个任务的时间，从进程启动到适配器或模型保存完毕，包括导入、分词和编译。缓存：{caches}。"
        "**稳态**：除第一步之外所有优化器步的速度。\n"
        "- **首步**：第一个优化器步开始前的时间。**峰值内存**：进程树的最高常驻内存；在 GPU 上为其保留的显存。\n"
        "- **留出损失**：运行之后用普通的 transformers 与 PEFT 以 fp32 在同样的数据行上测量。\n"
        "- **各提交的运行次数**：只有同一次调用所运行的系统才交替进行；其他提交的行和后来补充的行不是。在这些虚拟机上，同一任务在不同日子的用时相差可达五分之一。\n"
        "- “默认设置”为每设备批大小 8，其他一概不改；“最佳设置”是 `python -m benchmarks.tune_peers` 在 `workloads.yaml` 的 "
        "`candidates` 中找到的最快组合，列在下文；搜索在同类处理器上用任务 a 进行，其余任务也用这些设置；g 与 h 不用打包，DPOTrainer 与 GRPOTrainer 没有这一功能。g 由 DPOTrainer 学习，h 由 GRPOTrainer 学习；"
        "g 的词元数为每对的两段对话之和，h 为数据行自身的词元数，不含所生成的回答。LLaMA-Factory 会导入 torchaudio，但处理文本时从不使用，这里给它一个空模块。",
        "caches": {"cold": "每次运行开始时为空", "warm": "在同一系统的多次运行之间保留"},
        "targets": "### 目标",
        "targets_head": "| 任务 | 目标 | 要求 | 达到 | 满足 |\n|---|---|---:|---:|---|",
        "yes": "是", "no": "否", "unmeasured": "未测",
        "what": {
            "tokens_per_second": "词元/秒", "peak_memory": "峰值内存", "held_out_loss": "留出损失",
            "utilisation": "矩阵乘利用率", "first_step": "首步（秒）",
            "later_epochs": "第一轮之后的词元/秒", "time_to_loss": "达到该损失的时间",
        },
        "against": "{what}，相对于 {other}", "off_by": "{what}，与 {other} 之差",
        "cpu": "## {threads} 个 CPU 线程，{kind}", "no_bf16": "无 bf16 指令",
        "elsewhere": "目标是按矩阵单元（amx_bf16）设定的。没有矩阵单元的处理器速率较低；任何系统的速度都不会超过其稳态速度除以利用率。", "gpu": "## GPU：{name}",
        "machine": "{processor}，{memory}{extensions}；Python {python}；提交 {commit}，{when}。",
        "commits": "各提交的运行次数：{told}。",
        "rates": "同一次运行中的 bf16 矩阵乘：大方阵 {square}，模型自身的形状 {own_shapes}。",
        "case": "情形", "system": "系统", "runs": "次数", "failed": "失败：{why}",
        "columns": {
            "tokens_per_second": "词元/秒", "steady": "稳态", "later_epochs": "第一轮之后", "seconds": "秒",
            "first_step": "首步", "time_to_loss": "达到该损失", "peak_memory": "峰值内存",
            "utilisation": "利用率", "held_out_loss": "留出损失",
        },
        "rows": "{rows} 行，{tokens} 个词元，其中学习 {supervised} 个；{epochs} 轮，学习率 {lr}。",
        "goal": "要达到的损失为 {goal:.3f}，即所有系统的每次运行都达到过的最低值。",
        "utilisation": "## 利用率\n\n一次运行必需的矩阵乘占机器矩阵乘速率的比例，按除第一步之外的所有步计算。设 P 为各层线性变换的参数量，"
        "A 为 LoRA 因子的参数量，V·d 为输出头，L 层，查询宽度 q，T 为各行长度，则 LoRA 的一轮需要\n\n"
        "    Σ_rows (4·P + 6·A)·T + 4·V·d·(supervised tokens) + 6·L·q·T²\n\n"
        "次运算：冻结的权重只在前向和求输入梯度时各乘一次，每参数 2 次运算，从不需要自身的梯度。全量微调需要：6·P 与 6·V·d，没有 A。"
        "因果注意力只需要 T² 方阵的一半，前向 2 个、反向 4 个乘积。填充、重算以及没有标签的 logits 不是所要求的工作，不计在内。"
        "速率取大方阵乘的速率。",
        "settings": "## 设置", "settings_head": "| 系统 | 任务 | 设置 | 库 |\n|---|---|---|---|",
    },
}  # fmt: skip
