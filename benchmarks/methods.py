"""Every method on the same data, budget and seeds: quality, memory, speed and size, for docs/methods.md.

Each run is a process of its own. Three passes, each taken up again where it stopped:

    python benchmarks/methods.py rates     one seed, a few learning rates: the best is the method's own
    python benchmarks/methods.py quality   three seeds at that rate
    python benchmarks/methods.py cost      few steps, no evaluation, one method after another and again: speed, memory
    python benchmarks/methods.py sweeps    LoRA by rank, and by which layers
    python benchmarks/methods.py table     all of it into benchmarks/methods.json

Run ``cost`` on an idle machine; the others only count steps, and run two at once.
"""

import argparse
import json
import multiprocessing
import multiprocessing.connection
import os
import statistics
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LOG = HERE / "methods.runs.jsonl"
FIXTURES = HERE.parents[1] / "shared" / "fixtures"
Tree = dict[str, Any]

TASKS: dict[str, Tree] = {
    "pico": {
        "model": "builtin:pico",
        "data": {"train": "builtin:demo-train", "valid": "builtin:demo-valid", "max_length": 256},
    },
    "tinytalk": {
        "model": str(FIXTURES / "models/tinytalk-3m-chat"),
        "data": {"train": str(FIXTURES / "data/llamafactory-data/data/alpaca_en_demo.json"), "on_bad_row": "skip",
                 "valid_share": 0.05, "max_length": 256},
    },
}  # fmt: skip
STEPS = {"pico": 40, "tinytalk": 15}
TOKENS = 1024
FACTORS = (3, 10, 30)
"""Learning rates that are tried, as multiples of the method's default: small models take larger ones."""
LEFT_OUT = {"scratch": "begins from random weights"}
OPTIONS: dict[str, Tree] = {"vera": {"rank": 64}, "peft": {"type": "MISS"}}
RANKS = (1, 2, 4, 8, 16, 32, 64)
LAYERS: dict[str, Any] = {
    "all linear": "all-linear", "attention": r".*self_attn\..*", "feed-forward": r".*mlp\..*",
    "query, value": ("q_proj", "v_proj"), "first half": "FIRST", "last half": "LAST",
}  # fmt: skip


def one(recipe: Tree, found: Any) -> None:
    """Run a recipe in this process and send its figures."""
    import tunewright as tw

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    with tempfile.TemporaryDirectory() as folder:
        run = tw.run({**recipe, "output": f"{folder}/run"}, quiet=True)
        stage = run.results["stages"][0]
    train = stage["train"]
    found.send({
        "loss": stage["after"].get("loss"), "before": stage["before"].get("loss"),
        "exact_match": stage["after"].get("exact_match"), "trainable": stage["parameters"]["trainable"],
        "share": stage["parameters"]["share"], "tokens_per_second": train["tokens_per_second"],
        "peak_memory": train["peak_memory"], "artifact_bytes": stage["artifact_bytes"], "seconds": train["seconds"],
    })  # fmt: skip


def recipe(task: str, method: str, options: Tree, seed: int, lr: float, steps: int, measure: str) -> Tree:
    """What a run does; ``measure`` is nothing, loss or answers."""
    evaluate = {
        "enabled": measure != "nothing",
        "generate": measure == "answers",
        "limit": 100,
        "max_new_tokens": 24,
    }
    return {
        **TASKS[task], "method": {"name": method, **OPTIONS.get(method, {}), **options}, "objective": "sft",
        "train": {"max_steps": steps, "lr": lr, "tokens_per_batch": TOKENS, "seed": seed, "save_every": 0,
                  "on_spike": "learn", "warmup": 0.1},
        "evaluate": evaluate,
    }  # fmt: skip


def done() -> dict[str, Tree]:
    """Runs by their key, as the log has them."""
    lines = LOG.read_text().splitlines() if LOG.exists() else []
    return {entry["key"]: entry for entry in map(json.loads, lines)}


def run_all(jobs: Iterator[tuple[str, Tree]], at_once: int) -> None:
    """Run what is not in the log yet, each in a process of its own, and add it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "peft", "tunewright.pipeline"])
    known = done()
    todo = ((key, what) for key, what in jobs if key not in known)
    running: Tree = {}
    while True:
        while len(running) < at_once and (job := next(todo, None)):
            receive, send = context.Pipe(duplex=False)
            process = context.Process(target=one, args=(job[1], send))
            process.start()
            send.close()
            running[job[0]] = process, receive
        if not running:
            return
        ready = multiprocessing.connection.wait([receive for _, receive in running.values()])
        for key in [key for key, (_, receive) in running.items() if receive in ready]:
            process, receive = running.pop(key)
            keep(key, figures(receive))
            process.join()


def figures(receive: Any) -> Tree:
    """What a run sent, or that it failed."""
    try:
        sent: Tree = receive.recv()
    except EOFError:
        return {"failed": True}
    return sent


def keep(key: str, found: Tree) -> None:
    """Into the log, and told."""
    with LOG.open("a") as log:
        log.write(json.dumps({"key": key, **found}) + "\n")
    told = {k: found.get(k) for k in ("loss", "exact_match", "tokens_per_second", "failed")}
    print(
        key,
        {k: round(v, 3) if isinstance(v, float) else v for k, v in told.items() if v is not None},
        flush=True,
    )


def names(only: str = "") -> list[str]:
    """The methods to run."""
    from tunewright.core import plugins

    wanted = only.split(",") if only else plugins.names("methods")
    return [name for name in wanted if name not in LEFT_OUT]


def default_lr(method: str) -> float:
    """The method's own."""
    from tunewright import methods

    return methods.kind(method).default_lr


def rates(methods: list[str], tasks: list[str]) -> Iterator[tuple[str, Tree]]:
    """Seed 0 at each rate on pico, held-out loss only, half the steps."""
    for method in methods:
        for factor in FACTORS:
            lr = default_lr(method) * factor
            yield f"rates {method} {factor}", recipe("pico", method, {}, 0, lr, STEPS["pico"] // 2, "loss")


def best_factor(method: str, known: dict[str, Tree]) -> int:
    """The rate with the lowest held-out loss."""
    tried = {f: known.get(f"rates {method} {f}", {}).get("loss") for f in FACTORS}
    losses = {f: loss for f, loss in tried.items() if loss is not None}
    return min(losses, key=lambda f: losses[f]) if losses else FACTORS[1]


def quality(methods: list[str], tasks: list[str]) -> Iterator[tuple[str, Tree]]:
    """Three seeds at the best rate, with answers."""
    known = done()
    for seed in range(3):
        for task in tasks:
            for method in methods:
                lr = default_lr(method) * best_factor(method, known)
                measure = "answers" if task == "pico" else "loss"
                yield (
                    f"quality {task} {method} {seed}",
                    recipe(task, method, {}, seed, lr, STEPS[task], measure),
                )


def cost(methods: list[str], tasks: list[str]) -> Iterator[tuple[str, Tree]]:
    """Eight steps, the methods in turn."""
    for task in tasks:
        for method in methods:
            yield f"cost {task} {method}", recipe(task, method, {}, 0, default_lr(method), 8, "nothing")


def sweeps(methods: list[str], tasks: list[str]) -> Iterator[tuple[str, Tree]]:
    """LoRA by rank and by layers on pico, three seeds each."""
    lr, layers = default_lr("lora") * 10, _layers("pico")
    half = {"FIRST": layers[: len(layers) // 2], "LAST": layers[len(layers) // 2 :]}
    for seed in range(3):
        for rank in RANKS:
            options: Tree = {"rank": rank, "alpha": 2 * rank}
            yield f"rank {rank} {seed}", recipe("pico", "lora", options, seed, lr, STEPS["pico"], "loss")
        for name, wanted in LAYERS.items():
            blocks = "".join(map(str, half.get(wanted, [])))
            chosen = {"target_modules": rf".*\.layers\.[{blocks}]\..*" if blocks else wanted}
            yield f"layers {name} {seed}", recipe("pico", "lora", chosen, seed, lr, STEPS["pico"], "loss")


def _layers(task: str) -> list[int]:
    config = TASKS[task]["model"]
    from tunewright.models.load import find

    text = (Path(find(config).path) / "config.json").read_text()
    return list(range(json.loads(text)["num_hidden_layers"]))


def table() -> None:
    """The log's runs as the rows of docs/methods.md."""
    known = done()
    out: Tree = {"steps": STEPS, "tokens_per_batch": TOKENS, "seeds": 3, "tasks": {}}
    for task in TASKS:
        rows = {method: _row(task, method, known) for method in names()}
        out["tasks"][task] = {method: row for method, row in rows.items() if row}
    for what, keys in (("rank", map(str, RANKS)), ("layers", LAYERS)):
        found = {k: _seeds(f"{what} {k}", known) for k in keys}
        out[what] = {
            k: {**spread("loss", runs), "trainable": runs[0]["trainable"]}
            for k, runs in found.items()
            if runs
        }
    (HERE / "methods.json").write_text(json.dumps(out, indent=1) + "\n")


def _seeds(key: str, known: dict[str, Tree]) -> list[Tree]:
    """The three runs of a kind; nothing unless all of them were made."""
    runs = [known.get(f"{key} {seed}", {}) for seed in range(3)]
    return runs if all(run.get("loss") is not None for run in runs) else []


def _row(task: str, method: str, known: dict[str, Tree]) -> Tree:
    """A method's line; nothing unless all its runs were made."""
    seeds, cost_of = _seeds(f"quality {task} {method}", known), known.get(f"cost {task} {method}", {})
    if not seeds or "peak_memory" not in cost_of:
        return {}
    whole = {key: seeds[0][key] for key in ("before", "trainable", "share", "artifact_bytes")}
    costs = {key: cost_of[key] for key in ("tokens_per_second", "peak_memory")}
    return {
        "factor": best_factor(method, known),
        **spread("loss", seeds),
        **spread("exact_match", seeds),
        **whole,
        **costs,
    }


def spread(key: str, runs: list[Tree]) -> Tree:
    """Mean and standard deviation over seeds."""
    values = [run.get(key) for run in runs]
    if any(value is None for value in values):
        return {}
    return {key: statistics.mean(values), f"{key}_sd": statistics.stdev(values)}


def main() -> None:
    """One pass."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("rates", "quality", "cost", "sweeps", "table"))
    parser.add_argument("--only", default="", help="methods, with commas between; all if not given")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--at-once", type=int, default=2, help="runs side by side; cost runs one")
    given = parser.parse_args()
    if given.what == "table":
        table()
        return
    at_once = 1 if given.what == "cost" else given.at_once
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // at_once))
    passes = {"rates": rates, "quality": quality, "cost": cost, "sweeps": sweeps}
    run_all(passes[given.what](names(given.only), given.tasks.split(",")), at_once)


if __name__ == "__main__":
    main()
