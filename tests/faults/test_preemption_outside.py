"""Row 5, before and after training: a signal ends the run at once, whatever is going on, and nothing is lost or
taken for something else.
"""

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from lab import Lab, differences, ended, outcome
from lab_more import here, log_of, newest, resumed, together, told, until
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from tunewright.core import store
from tunewright.core.errors import InterruptedRunError

SIGNALS = (signal.SIGTERM, signal.SIGINT)
PROMPT = 2.0
"""Seconds: what goes on may be a call into a library that returns first."""
LIBRARY = {
    "reading a tokenizer": (AutoTokenizer, "from_pretrained"),
    "reading the weights": (AutoModelForCausalLM, "from_pretrained"),
    "rendering a row": (chat_template_utils, "render_jinja_template"),
    "rendering a prompt": (PreTrainedTokenizerFast, "apply_chat_template"),
    "tokenizing rows": (PreTrainedTokenizerFast, "__call__"),
}


@contextmanager
def signalled(owner: Any, name: str, number: int) -> Iterator[None]:
    """A library's function that is reached by a signal in its first call."""
    function = getattr(owner, name)
    calls: list[Any] = []

    def reached(*args: Any, **named: Any) -> Any:
        calls.append(args)
        if len(calls) == 1:
            os.kill(os.getpid(), number)
        return function(*args, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, reached)
        yield
    assert calls, f"{name} was not called"


@pytest.mark.row(5)
@pytest.mark.parametrize("place", LIBRARY)
def test_a_signal_inside_a_library_is_taken_for_nothing_else(lab: Lab, tally, place, monkeypatch):
    owner, name = LIBRARY[place]
    recipe = lab.recipe(train={"max_steps": 4}, data={"on_bad_row": "skip"}, evaluate={"max_new_tokens": 2})
    monkeypatch.setenv("TUNEWRIGHT_CACHE", str(lab.folder / "cache"))
    here(recipe, lab.folder / "whole")
    for number in SIGNALS:
        output = lab.folder / f"signal-{number}"
        monkeypatch.setenv("TUNEWRIGHT_CACHE", f"{output}-cache")
        with signalled(owner, name, number):
            wrong = mistaken(recipe, output, number)
        here(recipe, output)
        wrong += differences(outcome(lab.folder / "whole"), outcome(output))
        tally.add(not wrong, f"{place}, signal {number}: {'; '.join(wrong)}")


def mistaken(recipe: Path, output: Path, number: int) -> list[str]:
    """What the run that gets a signal takes it for, if not for that."""
    try:
        here(recipe, output)
    except InterruptedRunError as error:
        return [] if error.exit_code == 128 + number else [f"exit code {error.exit_code}"]
    except Exception as error:
        return [f"{type(error).__name__}: {error}"]
    return ["it went on"]


@pytest.mark.row(5)
@pytest.mark.parametrize("phase", ["before", "after"])
def test_a_signal_while_the_model_is_measured_ends_the_run_at_once(lab: Lab, tally, times, phase):
    rows = str(lab.data("sft"))
    recipe = lab.recipe(
        train={"max_steps": 4, "eval_every": 0}, data={"valid": rows},
        evaluate={"limit": 40, "max_new_tokens": 40},
    )  # fmt: skip
    assert lab.finish(recipe, lab.folder / "whole") == 0
    whole = outcome(lab.folder / "whole")
    rng = random.Random(phase)
    stopped = []
    for i in range(times(2, 6)):
        output, number = lab.folder / f"stopped-{i}", SIGNALS[i % 2]
        code, seconds = stopped_in(phase, lab, recipe, output, rng, number)
        status = store.read_record(output / "manifest.json")["status"]
        kept = newest(output) == (4 if phase == "after" else 0) and not store.leftovers(output)
        said = "is kept, and the same command goes on from there" in log_of(
            output
        ) and "Traceback" not in log_of(output)
        good = code == 128 + number and seconds < PROMPT and status == "stopped" and kept and said
        tally.add(good, f"{output.name}: code {code}, {seconds:.2f} s, {status}\n{log_of(output)}")
        stopped.append(output)
    together(resumed(lab, recipe, output, whole) for output in stopped)


def stopped_in(
    phase: str, lab: Lab, recipe: Path, output: Path, rng: random.Random, number: int
) -> tuple[int, float]:
    """The exit code of a run that got a signal in the phase, and the seconds that it took to end."""
    process = lab.start(recipe, output)
    if phase == "before":
        until(lambda: process.exitcode is not None or any(output.glob("stages/*/inputs.json")))
    else:
        until(lambda: process.exitcode is not None or any(e["step"] == 4 for e in told(output, "checkpoint")))
    process.join(rng.uniform(0, 0.05))
    assert process.exitcode is None, log_of(output)
    os.kill(process.pid or 0, number)
    began = time.monotonic()
    return ended(process), time.monotonic() - began
