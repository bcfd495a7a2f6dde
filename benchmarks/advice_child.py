"""One process of ``benchmarks.advice``: a recipe comes by standard input, the last line printed is what was found."""

import json
import shutil
import sys
import time
from typing import Any

Tree = dict[str, Any]


def foresee(recipe: Tree) -> Tree:
    """The bytes foretold, and the seconds that took."""
    from tunewright import foresight, jobs, pipeline

    (job,) = jobs.check(pipeline.load(recipe))
    began = time.monotonic()
    found = foresight.foresee(job)
    return {**vars(found), "peak": found.peak, "seconds": time.monotonic() - began}


def measure(recipe: Tree) -> Tree:
    """The peak of a real run, and what of it lay in the arena."""
    from tunewright import pipeline
    from tunewright.core.units import peak_memory_bytes
    from tunewright.fast import arena

    shutil.rmtree(recipe["output"], ignore_errors=True)
    run = pipeline.run(pipeline.load(recipe), quiet=True)
    results = json.loads((run.folder / "results.json").read_text())["stages"][0]
    told = arena.told().most if "arena" in results["fast"] else 0
    return {"peak": peak_memory_bytes(), "arena": told, "fast": results["fast"], "steps": results["train"]["steps"],
            "tokens_per_second": results["train"]["tokens_per_second"]}  # fmt: skip


if __name__ == "__main__":
    found = {"foresee": foresee, "measure": measure}[sys.argv[1]](json.loads(sys.stdin.read()))
    print(json.dumps(found))
    sys.stdout.flush()
