"""Models with random weights in the shapes of real ones, and the data files that every system reads.

A model is made from the workloads' ``models`` section: the configuration's numbers, a tokenizer of the fixtures and a
chat template. Weights are seeded and saved in bf16. What is made stays in a cache folder and is made once.
"""

import json
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import rows

Tree = dict[str, Any]
HERE = Path(__file__).parent
FIXTURES = HERE.parents[1] / "shared" / "fixtures"
DATA = "data/llamafactory-data/data"
PROSE = "text/d2l_en_original.txt"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}"
    "{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}"
)
MARKERS = {
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "additional_special_tokens": ["<|im_start|>"],
}
_DONE = "facts.json"
_CONTROL = re.compile(r"\\x|\\f|\\v")
"""Control characters, as Python shows them."""


def prepare(cache: Path, name: str, spec: Tree, data: Tree, fixtures: Path = FIXTURES) -> Tree:
    """Make what a workload needs unless it is there: paths ``model``, ``train``, ``held_out``, and their ``facts``."""
    if not fixtures.is_dir():
        raise FileNotFoundError(
            f"{fixtures}: real tokenizers and data are not there; name their folder by --fixtures"
        )
    model = model_folder(cache, name, spec, fixtures)
    key = json.dumps([name, data], sort_keys=True)
    folder = cache / "data" / f"{name}-{random.Random(key).getrandbits(64):016x}"
    if not (folder / _DONE).exists():
        _make_data(folder, model, data, fixtures)
    facts = json.loads((folder / _DONE).read_text())
    paths = {"model": model, "train": folder / "train.jsonl", "held_out": folder / "held_out.jsonl"}
    return {**{key: str(path) for key, path in paths.items()}, "facts": facts}


def model_folder(cache: Path, name: str, spec: Tree, fixtures: Path) -> Path:
    """The fixture's own folder, or a model with random weights of the given shape."""
    if "folder" in spec:
        return fixtures / str(spec["folder"])
    folder = cache / "models" / name
    done = folder / "spec.json"
    if not done.exists() or json.loads(done.read_text()) != spec:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _make_model(folder, spec, fixtures)
        done.write_text(json.dumps(spec))
    return folder


def _make_model(folder: Path, spec: Tree, fixtures: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(fixtures / "tokenizers" / spec["tokenizer"])
    if spec.get("template") == "chatml":
        tokenizer.add_special_tokens(MARKERS)
        tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    ids = {
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    config = AutoConfig.for_model(**spec["config"], **ids)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the model only {config.vocab_size}")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)


def _make_data(folder: Path, model: Path, data: Tree, fixtures: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    if "prose" in data:
        source = _prose(data["prose"], data["max_length"], fixtures)
    else:
        source = _pairs(data, fixtures, tokenizer) if "pairs" in data else _talks(data, fixtures)
    every = list(
        {json.dumps(row): row for row in source}.values()
    )  # a row that repeats another teaches nothing
    start = data.get("held_out_from", data["rows"])
    parts = {"train": every[: data["rows"]], "held_out": every[start : start + data.get("held_out", 0)]}
    if len(parts["train"]) < data["rows"] or len(parts["held_out"]) < data.get("held_out", 0):
        raise ValueError(f"{data}: the files have only {len(every)} rows")
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        rows.write(folder / f"{name}.jsonl", part)
    facts: Tree = {name: rows.facts(tokenizer, part, data["max_length"]) for name, part in parts.items()}
    facts["config"] = json.loads((model / "config.json").read_text())
    (folder / _DONE).write_text(json.dumps(facts))


def _talks(data: Tree, fixtures: Path) -> Iterator[Tree]:
    """The rows of Alpaca files as conversations, in a seed-0 shuffle; rows without an answer are left out."""
    found = [
        row
        for name in data["files"]
        for row in json.loads((fixtures / DATA / f"{name}.json").read_text("utf-8"))
    ]
    random.Random(0).shuffle(found)
    for row in found:
        asked = "\n".join(filter(None, (row["instruction"], row.get("input", ""))))
        if asked.strip() and row["output"].strip():
            yield _talk(asked, row["output"])


def _pairs(data: Tree, fixtures: Path, tokenizer: Any) -> Iterator[Tree]:
    """The rows of a preference file in a seed-0 shuffle: a prompt and two answers, as messages.

    Left out are those that would be cut, that begin with an answer or hold control characters.
    """
    found = json.loads((fixtures / DATA / f"{data['pairs']}.json").read_text("utf-8"))
    random.Random(0).shuffle(found)
    for row in found:
        turns = [
            _said("user" if m["from"] == "human" else "assistant", m["value"]) for m in row["conversations"]
        ]
        sides = {side: [_said("assistant", row[side]["value"])] for side in ("chosen", "rejected")}
        pair = {"prompt": turns, **sides}
        if turns[0]["role"] == "user" and not _CONTROL.search(str(row)):
            coded = rows.encode(tokenizer, rows.talks(pair), 1 << 30)
            if all(len(sample["input_ids"]) <= data["max_length"] for sample in coded):
                yield pair


def _said(role: str, content: str) -> Tree:
    return {"role": role, "content": content}


def _prose(characters: int, max_length: int, fixtures: Path) -> Iterator[Tree]:
    """Answers so long that each row fills ``max_length`` when it is cut there."""
    text = (fixtures / PROSE).read_text("utf-8")
    size = characters * max_length
    for start in range(0, len(text) - size, size):
        yield _talk("Go on.", text[start : start + size].strip())


def _talk(asked: str, answered: str) -> Tree:
    return {"messages": [_said("user", asked), _said("assistant", answered)]}
