"""How well memory is foretold: ``python -m benchmarks.advice`` measures every case of advice.yaml, and goes on where it was
stopped. Each case is foretold in one process, begun in another as a probe begins it, and run in a third, for a few steps;
peaks are the processes' own.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks import advice_tables, models, rows
from tunewright import children

Tree = dict[str, Any]
HERE = Path(__file__).parent
LOG = Path("runs/benchmarks/advice.jsonl")
RESULTS = HERE / "advice.json"
_STEPS = 2
_WORDS = 64
_FIGURES = ("foreseen", "probed", "measured")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is not in the log yet, then tell all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fixtures", type=Path, default=models.FIXTURES)
    parser.add_argument("--again", action="store_true", help="Foretell anew what was measured before.")
    parser.add_argument("--models", default="", help="Some of them, with commas between.")
    given = parser.parse_args(arguments)
    spec = yaml.safe_load((HERE / "advice.yaml").read_text())
    known = {json.dumps(row["case"]): row for row in rows.read(LOG)} if LOG.exists() else {}
    LOG.parent.mkdir(parents=True, exist_ok=True)
    wanted = given.models.split(",") if given.models else spec["models"]
    for case in (case for case in spec["cases"] if case["model"] in wanted):
        row = known.get(json.dumps(case), {"case": case})
        overrides = _recipe(case, spec["models"][case["model"]], given.fixtures)
        if given.again or "foreseen" not in row:
            row["foreseen"] = _child("foresee", overrides)
        if "measured" not in row:
            row["measured"] = _child("measure", overrides)
        if "probed" not in row:
            row["probed"] = _probed(overrides)
        known[json.dumps(case)] = row
        rows.write(LOG, list(known.values()))
        print(_line(row), flush=True)
    write([row for row in known.values() if _error(row) is not None], spec["cases"])


def write(found: Sequence[Tree], cases: Sequence[Tree]) -> None:
    """Keep what docs/advice.md shows, beside what it shows of other cases, and tell how near it came."""
    kept = {json.dumps(row["case"]): row for row in json.loads(RESULTS.read_text())}
    for row in found:
        peaks = {of: row[of]["peak"] for of in _FIGURES if "peak" in row.get(of, {})}
        kept[json.dumps(row["case"])] = {"case": row["case"], **peaks}
    ordered = [kept[key] for key in map(json.dumps, cases) if key in kept]
    RESULTS.write_text("[\n" + ",\n".join(map(json.dumps, ordered)) + "\n]\n")
    for of in ("foreseen", "probed"):
        if those := [row for row in ordered if of in row]:
            told = "{median} in the median, {worst} at most".format(**advice_tables.errors(those, of))
            print(f"{of}: {len(those)} cases, off by {told}")


def _line(row: Tree) -> str:
    error = _error(row)
    told = " ".join(f"{value}" for value in row["case"].values())
    if error is None:
        return f"{told}: {row['foreseen'].get('failed') or row['measured'].get('failed')}"
    peaks = (row[of].get("peak", 0) / 1e6 for of in _FIGURES)
    return f"{told}: foretold {next(peaks):,.0f} MB, begun {next(peaks):,.0f} MB, measured {next(peaks):,.0f} MB, {error:+.1%}"


def _error(row: Tree) -> float | None:
    if "peak" not in row["foreseen"] or "peak" not in row["measured"]:
        return None
    return float(row["foreseen"]["peak"] / row["measured"]["peak"] - 1)


def _child(what: str, recipe: Tree) -> Tree:
    """What a process of its own finds out, or the end of what it said."""
    command = [sys.executable, "-m", "benchmarks.advice_child", what]
    done = subprocess.run(
        command, check=False, input=json.dumps(recipe), capture_output=True, text=True, env=dict(os.environ)
    )
    if done.returncode:
        return {"failed": done.stderr[-600:]}
    found: Tree = json.loads(done.stdout.splitlines()[-1])
    return found


def _probed(recipe: Tree) -> Tree:
    """The peak of its first steps, in a run that is ended there; with two steps in all they are the whole training."""
    folder = Path(recipe["output"]).parent / "probe"
    shutil.rmtree(folder, ignore_errors=True)
    written = yaml.safe_dump({**recipe, "output": str(folder / "run")})
    begun = children.first_steps(written, folder / "run", folder, "probe", _STEPS)
    return {"failed": begun.reason} if begun.reason else {"peak": begun.of("step")[-1]["memory"]}


def _recipe(case: Tree, spec: Tree, fixtures: Path) -> Tree:
    folder = Path("runs/benchmarks/advice")
    model = models.model_folder(folder, case["model"], spec, fixtures)
    length, tokens = case.get("length", 256), case.get("tokens", 4096)
    kind = case.get("objective", "sft")
    data = folder / "data" / f"{case['model']}-{kind}-{length}-{tokens}.jsonl"
    if not data.exists():
        data.parent.mkdir(parents=True, exist_ok=True)
        rows.write(data, list(some_rows(model, kind, length, max(4, _STEPS * tokens // length))))
    train = {"tokens_per_batch": tokens, "gradient_checkpointing": case.get("checkpointing", False)}
    return {
        "output": str(folder / "run"), "model": str(model), "method": case["method"], "objective": kind,
        "precision": case.get("precision", "bf16"), "data": {"train": str(data), "valid_share": 0, "max_length": length},
        "train": {**train, "max_steps": _STEPS, **({"micro_tokens": case["micro"]} if "micro" in case else {})},
        "fast": {"compile": case.get("compile", False)}, "evaluate": {"enabled": False},
    }  # fmt: skip


def some_rows(model: Path, kind: str, length: int, count: int) -> Any:
    """Rows of words drawn by a seed, of three quarters of the length to the length."""
    from transformers import AutoTokenizer

    tokenizer, draw = AutoTokenizer.from_pretrained(model), random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(_WORDS)]

    def said(tokens: float) -> str:
        text = ""
        while len(tokenizer(text).input_ids) < tokens:
            text += " ".join(draw.choices(words, k=4)) + " "
        return text.strip()

    for number in range(count):
        whole = (length - 40) * draw.uniform(0.75, 0.95)
        asked, answer = said(whole / 3), said(whole * 2 / 3)
        if kind == "pretrain":
            yield {"text": f"{asked} {answer}"}
        elif kind == "kto":
            yield {"prompt": asked, "completion": answer, "label": number % 2 == 0}
        elif kind in {"dpo", "orpo", "simpo", "reward"}:
            yield {"prompt": asked, "chosen": answer, "rejected": said(whole * 2 / 3)}
        else:
            yield {"prompt": asked, "completion": answer}


if __name__ == "__main__":
    main()
