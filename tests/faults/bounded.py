"""Calls made in forked children of a process whose imports are warm: what each raised, its time and memory.

Run as a script it is the server: a JSON line in says what to call, a JSON line out what came of it.
"""

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

LONG = os.environ.get("TUNEWRIGHT_FAULTS") == "long"
HUNG = 20.0
SECONDS, BYTES = 1.0, 200 << 20
ALSO_ON_A_BUSY_MACHINE = 5.0


def within(told: dict[str, Any]) -> bool:
    """Whether a call kept the bounds: a second, of processor time where others keep the processor busy."""
    soon = told["seconds"] <= SECONDS or (
        told["processor"] <= SECONDS and told["seconds"] <= ALSO_ON_A_BUSY_MACHINE
    )
    return soon and bool(told["growth"] <= BYTES)


class Bounded:
    """The client. ``call(name, ...)`` is one of the functions of :func:`calls`, in a child of its own."""

    def __init__(self) -> None:
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false",
                       "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}  # fmt: skip
        self.server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, text=True,
                                       stdout=subprocess.PIPE, env=environment)  # fmt: skip

    def call(self, name: str, *arguments: Any) -> dict[str, Any]:
        """``error`` and ``problems`` that it raised, ``seconds`` and ``growth`` (bytes) that it took."""
        self.server.stdin.write(json.dumps([name, list(map(str, arguments))]) + "\n")
        self.server.stdin.flush()
        return dict(json.loads(self.server.stdout.readline()))

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait()
        self.server.stdout.close()


@cache
def shared() -> Bounded:
    """The one server of a test session."""
    server = Bounded()
    atexit.register(server.close)
    return server


def chosen(payloads: Iterable[str], every: int = 4) -> list[str]:
    """All of them in the long counts, one of ``every`` in the short ones."""
    return list(payloads) if LONG else list(payloads)[::every]


def calls() -> dict[str, Any]:
    import peft  # noqa: F401
    import torch  # noqa: F401
    import transformers.models.auto.modeling_auto
    import transformers.models.llama.modeling_llama
    import transformers.models.llama.tokenization_llama  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    from tunewright import jobs, methods, recipes
    from tunewright.data.template import ChatCodec
    from tunewright.models.load import ModelSource, find, load_model, load_tokenizer
    from tunewright.serve import speaker

    def unfound(path: str) -> ModelSource:
        return ModelSource(path, path)

    def adapter(path: str) -> object:
        return methods.load_adapter(Path(path), methods.foreign_manifest(Path(path)), "fp32")

    def template(path: str) -> None:
        from tunewright.data.template_check import check

        check(Path(path).read_text(encoding="utf-8", errors="surrogatepass"), "name one")

    return {
        "find": find,
        "trusted": lambda path: load_tokenizer(find(path, trust_remote_code=True)),
        "tokenizer": lambda path: ChatCodec(load_tokenizer(unfound(path))).stop_ids,
        "model": lambda path: load_model(unfound(path)),
        "scratch": lambda path: load_model(unfound(path), random_weights=True),
        "all": lambda path: (load_tokenizer(find(path)), load_model(find(path))),
        "speaker": speaker.load,
        "adapter": adapter,
        "template": template,
        "recipe": recipes.load,
        "override": lambda text: recipes.load({"model": "builtin:pico", "data": "a.jsonl"}, [text]),
        "data": lambda path: jobs.check(recipes.load({"model": "builtin:pico", "data": path})),
    }  # fmt: skip


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _measured(function: Any, arguments: list[str]) -> dict[str, Any]:
    os.close(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before, began, used = _memory("VmRSS"), time.monotonic(), sum(os.times()[:4])
    told: dict[str, Any] = {"error": "", "problems": []}
    try:
        function(*arguments)
    except BaseException as error:
        problems = [[p.where, p.what, p.fix] for p in getattr(error, "problems", ())]
        told = {"error": type(error).__name__, "problems": problems, "text": str(error)[:500]}
    seconds, processor = time.monotonic() - began, sum(os.times()[:4])
    # A template is tried in a process that RLIMIT_AS keeps below the bound; its peak is not in this one.
    return {**told, "seconds": seconds, "processor": processor - used, "growth": _memory("VmHWM") - before}


def _in_child(function: Any, arguments: list[str]) -> str:
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ours)
        os.dup2(2, 1)
        os.write(theirs, json.dumps(_measured(function, arguments)).encode())
        os._exit(0)
    os.close(theirs)
    ready, _, _ = select.select([ours], [], [], HUNG)
    if not ready:
        os.kill(child, signal.SIGKILL)
    with os.fdopen(ours, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(child, 0)
    return said or json.dumps(
        {
            "error": "hung" if not ready else "died",
            "problems": [],
            "seconds": HUNG,
            "processor": HUNG,
            "growth": 0,
        }
    )


def main() -> None:
    known = calls()
    for line in sys.stdin:
        name, arguments = json.loads(line)
        print(_in_child(known[name], arguments), flush=True)


if __name__ == "__main__":
    main()
