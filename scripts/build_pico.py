"""Build the built-in base model in two steps, around ``tunewright run recipes/pretrain-pico.yaml``.

python scripts/build_pico.py tokenizer     # config.json and the BPE tokenizer, before pretraining
python scripts/build_pico.py install RUN   # the run's weights and its card, into the package
"""

import sys
from itertools import islice
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from tunewright.core import events, store
from tunewright.data import builtin
from tunewright.models.load import BUILTIN

FOLDER = BUILTIN["pico"]
SPECIAL = ["<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] if m['role'] != 'tool' else 'user' }}|>"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
VOCABULARY = 4096


def build_tokenizer() -> None:
    """Byte-level BPE over a sample of the corpus; every digit and Chinese character stands alone."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[0-9\x{3400}-\x{9fff}]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    texts = (str(row["text"]) for row in islice(builtin.rows("pico-corpus"), 60_000))
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>",
        additional_special_tokens=SPECIAL[2:], model_max_length=512,
    )  # fmt: skip
    fast.chat_template = TEMPLATE
    FOLDER.mkdir(exist_ok=True)
    fast.save_pretrained(FOLDER)
    LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=704, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=0, pad_token_id=1, rms_norm_eps=1e-5,
    ).save_pretrained(FOLDER)  # fmt: skip
    print(f"{FOLDER}: vocabulary {len(fast)}")


def install(run: Path) -> None:
    """Copy the weights of a finished run into the package as bf16, and write the model's card."""
    stage = store.read_json(run / "results.json")["stages"][-1]
    weights = load_file(run / stage["artifact"] / "model.safetensors")
    save_file({k: v.bfloat16() for k, v in weights.items()}, FOLDER / "model.safetensors", {"format": "pt"})
    (FOLDER / "README.md").write_text(card(stage, list(events.read(run / "events.jsonl"))), encoding="utf-8")


def card(stage: dict[str, Any], log: list[dict[str, Any]]) -> str:
    """The card: data, loss curve, seed, what it cannot do."""
    measured = {0: stage["before"]["loss"], **{e["step"]: e["loss"] for e in log if e["kind"] == "eval"}}
    measured[stage["train"]["steps"]] = stage["after"]["loss"]
    train, data, config = stage["train"], stage["data"]["train"], stage["train_config"]
    curve = "\n".join(f"| {step} | {loss:.4f} |" for step, loss in sorted(measured.items()))
    return CARD.format(
        parameters=stage["parameters"]["total"], samples=data["samples"], tokens=data["tokens"],
        rows=sum(f["rows"] for f in data["files"]), skipped=len(data["skipped"]), steps=train["steps"],
        minutes=train["seconds"] / 60, speed=train["tokens_per_second"], lr=config["lr"], seed=config["seed"],
        batch=config["tokens_per_batch"], schedule=config["schedule"], sha=data["files"][0]["sha256"],
        generator=builtin.version(), curve=curve,
    )  # fmt: skip


CARD = """---
license: apache-2.0
language: [en, zh]
library_name: transformers
tags: [tunewright]
---
# builtin:pico

A base model of {parameters:,} parameters with the Llama architecture (6 layers, width 256, 4 heads sharing
2 key/value heads, context 512) and a byte-level BPE of 4,096 tokens in which every digit and every Chinese
character stands alone. It is small enough to be fine-tuned on a laptop in under a minute.

## Data
Text that Tunewright's own generator writes (`tunewright.data.builtin`, version `{generator}`): statements of
fact, sums, number sequences, rewritings and small stories, half English, half Chinese. {rows:,} documents,
{skipped:,} of them left out as duplicates, {tokens:,} tokens in {samples:,} blocks. The additions,
subtractions, sequences, rewritings and stories of the demo's held-out split never occur in it. The file's
SHA-256 is `{sha}`.

## Training
`tunewright run recipes/pretrain-pico.yaml`: {steps:,} steps of {batch:,} tokens, AdamW, peak rate {lr},
schedule {schedule}, bf16 with fp32 masters, seed {seed}; {minutes:.0f} minutes on two cores
({speed:,.0f} tokens/s).

Loss on held-out documents, in nats per token:

| step | loss |
|---|---|
{curve}

## What it cannot do
It continues text; it follows no instructions and holds no conversation until it is fine-tuned. It knows some
hundred countries, fifty chemical elements and a few hundred words, adds and subtracts one digit below one
hundred, and nothing else.
Its facts are fixed at the time of writing. It has not been made safe, and it is not meant for any use but
learning and testing.
"""


if __name__ == "__main__":
    if sys.argv[1:] == ["tokenizer"]:
        build_tokenizer()
    else:
        install(Path(sys.argv[2]))
