"""One process from start to end: its time, its exit, and the memory that its whole tree holds at most."""

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

Tree = dict[str, Any]
ROOT = Path(__file__).parents[1]
PYTHONS = {
    "ours": ROOT / ".venv/bin/python",
    "peers": ROOT / ".venv-peers/bin/python",
    "llamafactory": ROOT / ".venv-llamafactory/bin/python",
}
_LOOK_EVERY = 0.1
_TOLD = 2000
_OWN_SETTINGS = (
    "GLIBC_TUNABLES",
    "MALLOC_",
    "OMP_",
    "KMP_",
    "GOMP_",
    "LD_PRELOAD",
    "TORCH",
    "ACCELERATE_",
    "TUNEWRIGHT_",
)
"""Set in the shell of whoever runs the benchmark, these would change what a system does by itself."""


def search_path() -> str:
    """Where modules are found besides an environment's own: this repository, also where it is not installed."""
    return os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH"))))


def environment(caches: Path, more: Mapping[str, str], threads: int | None, device: str) -> dict[str, str]:
    """A clean environment: no network, no settings but the system's own, caches where the run says."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_OWN_SETTINGS)}
    return {
        **kept,
        "HF_HUB_OFFLINE": "1", "DISABLE_VERSION_CHECK": "1", "TOKENIZERS_PARALLELISM": "false",
        "HF_HOME": str(caches / "huggingface"), "TUNEWRIGHT_CACHE": str(caches / "tunewright"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"), "PYTHONPATH": search_path(),
        **({"OMP_NUM_THREADS": str(threads)} if threads else {}),
        **({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}),
        **more,
    }  # fmt: skip


def run(
    python: str | Path, module: str, work: Tree, folder: Path, env: Mapping[str, str], timeout: float
) -> Tree:
    """Run ``benchmarks.MODULE`` on the work and return ``seconds``, ``peak_memory`` and its ``result``.

    ``failed`` is there instead of ``result`` if it did not end well: the end of what it wrote.
    """
    folder.mkdir(parents=True, exist_ok=True)
    asked, result, log = (
        folder / f"{module}.work.json",
        folder / f"{module}.result.json",
        folder / f"{module}.log",
    )
    result.unlink(missing_ok=True)
    command = [str(python), "-m", f"benchmarks.{module}", str(asked), str(result)]
    with log.open("wb") as out:
        began = time.time()
        asked.write_text(json.dumps({**work, "started": began}))
        process = subprocess.Popen(command, cwd=ROOT, env=dict(env), stdout=out, stderr=subprocess.STDOUT)
        ended, peak = watch(process, began + timeout)
    found: Tree = {"seconds": time.time() - began, "peak_memory": peak}
    if ended == 0 and result.exists():
        return {**found, "result": json.loads(result.read_text())}
    how = f"stopped after {timeout:.0f} s" if ended is None else f"exit status {ended}"
    return {**found, "failed": f"{how}\n{log.read_text(errors='replace')[-_TOLD:]}"}


def watch(process: subprocess.Popen[bytes], until: float) -> tuple[int | None, int]:
    """Wait for the end; the exit status (None if it had to be stopped) and the tree's highest resident memory.

    Pages that processes of the tree share count for each of them. The kernel's own high-water mark of the largest
    process fills in what happened between two looks.
    """
    peak, seen = 0, psutil.Process(process.pid)
    try:
        while True:
            peak = max(peak, _resident(seen))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_LOOK_EVERY)
                return process.returncode, max(peak, _highest_of(seen, 0))
            peak = max(peak, _highest_of(seen, peak))
            if time.time() > until:
                return None, peak
    finally:
        _stop(seen)
        process.wait()


def _resident(root: psutil.Process) -> int:
    total = 0
    with contextlib.suppress(psutil.Error):
        for process in (root, *root.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
    return total


def _highest_of(root: psutil.Process, otherwise: int) -> int:
    """The kernel's high-water mark of the process alone, where it tells one."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path(f"/proc/{root.pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    return otherwise


def _stop(root: psutil.Process) -> None:
    """End what is left of the tree."""
    with contextlib.suppress(psutil.Error):
        for process in (*root.children(recursive=True), root):
            with contextlib.suppress(psutil.Error):
                process.kill()
