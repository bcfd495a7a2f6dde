"""Whether a chat template that comes with a model can be used: it is tried before it is believed.

Jinja's sandbox keeps a template from Python's insides, but not from running for ever or filling the memory.
"""

import hashlib
import signal
import subprocess
import sys
from contextlib import suppress
from functools import cache
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from tunewright.core import store
from tunewright.core.errors import ModelError, Problem
from tunewright.core.paths import cache_folder
from tunewright.data import template_probe

_LONGEST = 1 << 20
_PATIENCE = 30
"""Seconds on the clock for what has half a second of processor time, on a machine that is busy."""
_TOO_MUCH_MEMORY = "needs more than 200 MB for a conversation of a few words"


def check(template: Any, fix: str) -> None:
    """ModelError with ``fix`` if a tokenizer's template, or one of its named ones, cannot be used."""
    texts = list(template.values()) if isinstance(template, dict) else [template] if template else []
    for text in texts:
        if what := _fault(text):
            raise ModelError(Problem("data.template", f"the model's chat template {what}", fix))


def _fault(text: Any) -> str:
    """What is wrong with one template, or an empty string."""
    if not isinstance(text, str):
        return f"is {type(text).__name__}, expected text"
    if len(text) > _LONGEST:
        return f"is {len(text)} characters long, at most {_LONGEST} are read"
    try:
        raw = text.encode()
    except UnicodeEncodeError:
        return "is no text: it holds half of a surrogate pair"
    return _tried(raw)


def _tried(raw: bytes) -> str:
    remembered = cache_folder() / "templates" / f"{hashlib.sha256(_version() + raw).hexdigest()}.json"
    if remembered.is_file():
        return ""
    line = _run(raw)
    if line != "good":
        return line
    with suppress(OSError):  # it is only tried again next time
        store.write_json(remembered, {"verdict": line})
    return ""


@cache
def _version() -> bytes:
    """Changes when the verdict may."""
    probe = Path(str(resources.files("tunewright.data"))) / "template_probe.py"
    return f"{store.sha256_file(probe)} {metadata.version('jinja2')}\n".encode()


def _run(raw: bytes) -> str:
    """The verdict of the probe, in a process with limits."""
    command = [sys.executable, "-I", template_probe.__file__]
    try:
        child = subprocess.run(command, input=raw, capture_output=True, timeout=_PATIENCE, check=False)  # noqa: S603
    except subprocess.TimeoutExpired:
        return f"ran longer than {_PATIENCE} s for a conversation of a few words"
    if child.returncode == -signal.SIGPROF:
        return f"ran longer than {template_probe.SECONDS} s for conversations of a few words"
    line = child.stdout.decode("utf-8", "replace").strip()
    if line == "memory" or b"MemoryError" in child.stderr:
        return _TOO_MUCH_MEMORY
    return line if child.returncode == 0 and line else f"made its trial end with status {child.returncode}"
