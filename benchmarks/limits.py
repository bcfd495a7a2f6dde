"""Runs under a memory limit: ``python -m benchmarks.limits`` draws recipes at random, has each written by ``advise --probe
--apply`` and run under a limit that the system sets, and tries the same with TRL at its defaults. It goes on where it was
stopped, also from what limits.json has. No learning rates are tried: they change neither memory nor speed.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from benchmarks import advice, launch, models, rows
from tunewright import children
from tunewright.core import cgroups, events, machine

Tree = dict[str, Any]
HERE = Path(__file__).parent
LOG = Path("runs/benchmarks/limits.jsonl")
RESULTS = HERE / "limits.json"
FOLDER = Path("runs/benchmarks/limits").absolute()
_PATIENCE = 1800.0
_MB = 1_000_000
_LIMIT = {1: "memory.limit_in_bytes", 2: "memory.max"}
_TOLD = 600
_NO_MEMORY = ("exit status -9", "allocate memory", "MemoryError", "out of memory")
_REFUSED = "no plan fits"
_FIGURES = ("memory", "tokens_per_second")
_DIALS = ("precision", "micro_tokens", "gradient_checkpointing", "lr")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is not in the log yet, then tell all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fixtures", type=Path, default=models.FIXTURES)
    parser.add_argument("--told", action="store_true", help="Run nothing, tell what there is.")
    given = parser.parse_args(arguments)
    spec = yaml.safe_load((HERE / "limits.yaml").read_text())
    known = {json.dumps(row["case"]): row for row in [*_kept(), *(rows.read(LOG) if LOG.exists() else ())]}
    LOG.parent.mkdir(parents=True, exist_ok=True)
    found = list[Tree]()
    for case in drawn(spec):
        count = sum("refused" not in row["ours"] for row in found)
        if count == spec["cases"]:
            break
        row = known.setdefault(json.dumps(case), {"case": case})
        if given.told and "ours" not in row:
            break
        files = _files(case, spec["rows"], spec["models"], given.fixtures)
        if "ours" not in row:
            row["processor"] = machine.processor()
            row["ours"] = _ours(case, files, spec["steps"])
        found.append(row)
        if "trl" not in row and "refused" not in row["ours"] and count < spec["beside"]:
            row["trl"] = _trl(case, row["ours"], files, spec["steps"])
        rows.write(LOG, list(known.values()))
        print(_line(row), flush=True)
        write(found, spec["steps"])
    for system in ("ours", "trl"):
        ends = [row[system]["finished"] for row in found if system in row and "refused" not in row["ours"]]
        print(f"{system}: {sum(ends)} of {len(ends)} ran to their end")


def drawn(spec: Tree) -> Iterator[Tree]:
    """Cases by a seed, each once, without end: those are counted for which a recipe is written."""
    draw, found = random.Random(0), list[Tree]()
    while True:
        model = draw.choice(sorted(spec["limits"]))
        case = {
            "model": model, "objective": draw.choice(spec["objectives"]), "goal": draw.choice(spec["goals"]),
            "length": draw.choice(spec["lengths"]), "limit": draw.choice(spec["limits"][model]),
        }  # fmt: skip
        if case not in found:
            found.append(case)
            yield case


def write(found: Sequence[Tree], steps: int) -> None:
    """Keep what docs/advice.md shows."""
    written = [row for row in found if "refused" not in row["ours"]]
    kept = [{**row, "trl": _briefly(row["trl"])} if "trl" in row else row for row in written]
    lines = ",\n".join(map(json.dumps, kept))
    refused = json.dumps(
        [{"case": row["case"], "processor": row["processor"]} for row in found if row not in written]
    )
    RESULTS.write_text(f'{{"steps": {steps}, "refused": {refused}, "rows": [\n{lines}\n]}}\n')


def _kept() -> Iterator[Tree]:
    """What limits.json has; what does not say on which processor it ran is run again."""
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"refused": [], "rows": []}
    nothing = {"ours": {"finished": False, "why": _REFUSED, "refused": True}}
    every = [*({**row, **nothing} for row in found["refused"]), *found["rows"]]
    return (row for row in every if "processor" in row)


def _briefly(trl: Tree) -> Tree:
    """How TRL's run ended, without all that it said."""
    if "ended" in trl:
        return trl
    memory = any(sign in trl.get("why", "") for sign in _NO_MEMORY)
    ended = "ended" if trl["finished"] else "failed" if memory else "other"
    return {key: value for key, value in trl.items() if key != "why"} | {"ended": ended}


def _line(row: Tree) -> str:
    told = " ".join(str(value) for value in row["case"].values() if value)
    ends = (
        f"{of}: {'finished' if row[of]['finished'] else row[of].get('why', '')[-160:]!r}"
        for of in ("ours", "trl")
        if of in row
    )
    return f"{told}: {row['ours'].get('choice', '')}; {'; '.join(ends)}"


@contextmanager
def limited(megabytes: int) -> Iterator[None]:
    """Processes that begin within share so much resident memory: a control group, made for them."""
    own, group = _own_group(), _own_group() / f"tunewright-limits-{os.getpid()}"
    group.mkdir()
    try:
        (group / _LIMIT[_version()]).write_text(str(megabytes * _MB))
        (group / "cgroup.procs").write_text(str(os.getpid()))
        yield
    finally:
        (own / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


def _version() -> int:
    return 2 if (cgroups.ROOT / "cgroup.controllers").exists() else 1


def _own_group() -> Path:
    """The folder of this process's group, which it must be allowed to write to."""
    wanted, base = ("", cgroups.ROOT) if _version() == 2 else ("memory", cgroups.ROOT / "memory")
    lines = (line.split(":", 2) for line in cgroups.OWN.read_text().splitlines())
    path = next(path for _, controllers, path in lines if wanted in controllers.split(","))
    return base / path.strip().lstrip("/")


def _ours(case: Tree, files: Tree, steps: int) -> Tree:
    """What was advised, and whether it ran to its end."""
    name = "-".join(str(value).replace(":", "-") for value in case.values() if value)
    recipe, output = FOLDER / "recipes" / f"{name}.yaml", FOLDER / "run"
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.unlink(missing_ok=True)
    shutil.rmtree(output, ignore_errors=True)
    asked = [f"model={files['model']}", f"data={files['data']}", f"runs={FOLDER / 'none'}"]
    asked += [f"objective={case['objective']}"] if case["objective"] == "dpo" else []
    asked += [f"goal={case['goal']}"] if case["goal"] else []
    told, why = _command(case, ["advise", *asked, "--probe", "--no-rates", "--apply", str(recipe), "--json"])
    if why:
        return {"finished": False, "why": why} | ({"refused": True} if _REFUSED in why else {})
    best = json.loads(told)["plans"][0]
    found = {"choice": best["method"]["name"], "foretold": {name: best[name] for name in _FIGURES},
             "dials": {name: best[name] for name in _DIALS}}  # fmt: skip
    told, why = _command(case, ["run", str(recipe), f"output={output}", f"train.max_steps={steps}", "--json"])
    if why:
        return {**found, "finished": False, "why": why}
    train = json.loads(told)["results"]["stages"][0]["train"]
    pace = children.Begun(list(events.read(output / "events.jsonl")), "").pace()
    came = {"memory": train["peak_memory"], "tokens_per_second": pace.tokens_per_second}
    return {**found, "finished": True, "measured": came}


def _command(case: Tree, arguments: list[str]) -> tuple[str, str]:
    """The last line that the command printed, and what went wrong if anything did."""
    with limited(case["limit"]):
        done = subprocess.run(
            [sys.executable, "-m", "tunewright", *arguments], check=False, capture_output=True, text=True,
            env=dict(os.environ),
        )  # fmt: skip
    lines = done.stdout.splitlines() or [""]
    return lines[
        -1
    ], "" if done.returncode == 0 else f"exit {done.returncode}: {(done.stderr or lines[-1])[-_TOLD:]}"


def _trl(case: Tree, ours: Tree, files: Tree, steps: int) -> Tree:
    """The same model, rows and length with TRL's trainer at its defaults; LoRA where an adapter was advised."""
    whole = ours.get("choice") in ("full", "partial")
    work = {
        "model": files["model"], "train": files["data"], "output": str(FOLDER / "trl" / "output"), "lr": 1e-4, "epochs": 1,
        "max_length": case["length"], "snapshots": 0, "method": {"name": "full" if whole else "lora"},
        "objective": {"name": case["objective"]}, "settings": {"args": {"max_steps": steps}},
    }  # fmt: skip
    env = launch.environment(
        FOLDER / "caches", {}, int(os.environ.get("OMP_NUM_THREADS", "0")) or None, "cpu"
    )
    with limited(case["limit"]):
        done = launch.run(launch.PYTHONS["peers"], "systems.trl", work, FOLDER / "trl", env, _PATIENCE)
    method = work["method"]
    if "failed" in done:
        how, _, said = done["failed"].partition("\n")
        return {"finished": False, "method": method, "why": f"{how}: {said[-_TOLD:]}"}
    return {"finished": True, "method": method, "peak": done["peak_memory"]}


def _files(case: Tree, count: int, shapes: Tree, fixtures: Path) -> Tree:
    """A model's folder, and rows for it as messages."""
    name = case["model"]
    model = name if name.startswith("builtin:") else str(models.model_folder(
        FOLDER, name, shapes[name], fixtures).absolute())  # fmt: skip
    data = FOLDER / "data" / f"{name.replace(':', '-')}-{case['objective']}-{case['length']}.jsonl"
    if not data.exists():
        data.parent.mkdir(parents=True, exist_ok=True)
        made = advice.some_rows(Path(_folder(model)), case["objective"], case["length"], count)
        rows.write(data, [_as_messages(row) for row in made])
    return {"model": _folder(model), "data": str(data)}


def _folder(model: str) -> str:
    """Of a model by its name."""
    from tunewright.models.load import find

    return str(find(model).folder or model)


def _as_messages(row: Tree) -> Tree:
    if "completion" not in row:
        return row
    turns = (("user", row["prompt"]), ("assistant", row["completion"]))
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


if __name__ == "__main__":
    main()
