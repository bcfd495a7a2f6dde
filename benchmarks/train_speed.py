"""Tokens per second of our loop against a plain transformers + PEFT loop on the same rows.

Runs alternate, A B A B, each in a process of its own; the table has medians and the ratio of each pair.
The plain loop is what a careful user writes: bf16 base, batches of 32 rows in random order padded to the
longest, AdamW on the adapter, full logits.

    python benchmarks/train_speed.py [PAIRS]
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STEPS, ROWS = 60, 32
PAIRS = 3


def ours() -> dict[str, float]:
    """Our loop: rank-16 LoRA, 2,048 tokens a batch, bucketed by length."""
    import tunewright as tw

    with tempfile.TemporaryDirectory() as folder:
        run = tw.run(
            {"model": "builtin:pico", "data": {"train": "builtin:demo-train", "valid_share": 0}, "output": folder,
             "train": {"max_steps": STEPS, "tokens_per_batch": 2048}, "evaluate": {"enabled": False}},
            quiet=True,
        )  # fmt: skip
        stage = run.results["stages"][0]
    tokens, seconds = stage["train"]["tokens"], stage["train"]["seconds"]
    return {"tokens_per_second": tokens / seconds, "peak_memory": stage["train"]["peak_memory"]}


def plain() -> dict[str, float]:
    """A plain loop over the same rows, with the same adapter."""
    import torch
    from peft import LoraConfig, get_peft_model

    from tunewright.core.units import peak_memory_bytes
    from tunewright.data import builtin
    from tunewright.data.rows import Message, Row
    from tunewright.data.template import ChatCodec
    from tunewright.models.load import find, load_model, load_tokenizer

    source = find("builtin:pico")
    codec, model = ChatCodec(load_tokenizer(source)), load_model(source, "bf16")
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    rows = [Row("", tuple(Message(**m) for m in row["messages"])) for row in builtin.rows("demo-train")]
    samples = codec.encode_many(rows)
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0)).tolist()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    tokens, began = 0, time.monotonic()
    for step in range(STEPS):
        batch = [samples[i] for i in order[step * ROWS : (step + 1) * ROWS]]
        longest = max(len(s.ids) for s in batch)
        ids = torch.tensor([s.ids + [codec.pad_id] * (longest - len(s.ids)) for s in batch])
        mask = torch.tensor([[1] * len(s.ids) + [0] * (longest - len(s.ids)) for s in batch])
        said = torch.tensor([s.learned + [0] * (longest - len(s.ids)) for s in batch])
        labels = ids.masked_fill(said == 0, -100)
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        tokens += int(mask.sum())
    return {"tokens_per_second": tokens / (time.monotonic() - began), "peak_memory": peak_memory_bytes()}


def measure(name: str) -> dict[str, float]:
    """One run in a process of its own."""
    done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(pairs: int) -> None:
    """Alternate, then print and write the table."""
    runs = [(measure("ours"), measure("plain")) for _ in range(pairs)]
    ratio = statistics.median(a["tokens_per_second"] / b["tokens_per_second"] for a, b in runs)
    lines = ["| loop | tokens/s (median) | peak memory, MB |", "|---|---|---|"]
    for name, column in (("tunewright", 0), ("plain transformers + PEFT", 1)):
        speed = statistics.median(pair[column]["tokens_per_second"] for pair in runs)
        memory = statistics.median(pair[column]["peak_memory"] for pair in runs)
        lines.append(f"| {name} | {speed:,.0f} | {memory / 2**20:,.0f} |")
    table = "\n".join(lines) + f"\n\nRatio, median of {pairs} interleaved pairs: {ratio:.2f}.\n"
    print(table)
    page = Path(__file__).parents[1] / "docs" / "benchmarks.md"
    page.write_text(
        f"# Benchmarks\n\nBy `make bench`: {__doc__.splitlines()[0]}\n\n{table}", encoding="utf-8"
    )


if __name__ == "__main__":
    argument = sys.argv[1] if len(sys.argv) > 1 else str(PAIRS)
    if argument in ("ours", "plain"):
        print(json.dumps({"ours": ours, "plain": plain}[argument]()))
    else:
        main(int(argument))
