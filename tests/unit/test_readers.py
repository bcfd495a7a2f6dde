"""What a person sees of the event stream."""

import io

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from tunewright.core.events import EventLog
from tunewright.train import readers

STEP = {"kind": "step", "step": 1, "steps": 4, "loss": 1.5, "lr": 1e-3, "tokens": 100, "tokens_per_second": 50.0,
        "memory": 1 << 30, "stage": "sft", "time": 100.0}  # fmt: skip


def test_plain_lines_are_few_and_tell_time_left(capsys):
    lines = readers.Lines()
    lines(STEP)
    lines({**STEP, "step": 2, "time": 101.0})
    lines({**STEP, "step": 4, "time": 102.0})
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "step 1/4  loss 1.5000  lr 1.0e-03  50 tok/s  1.0 GB  6.0s left"
    assert len(said) == 2
    assert said[1].startswith("step 4/4")


def test_every_event_worth_telling_has_a_line():
    told = {
        "train": {"samples": 3, "steps": 2, "padding_share": 0.05},
        "measure": {"when": "before", "loss": 2.0, "exact_match": 0.5, "count": 4},
        "eval": {"step": 2, "loss": 1.0, "best": True},
        "resume": {"step": 3},
        "restore": {"step": 3, "loss": 1.0},
        "reuse": {"stage": "sft"},
        "saved": {"path": "x", "bytes": 2048},
        "skipped": {"count": 1, "rows": ["a:1: empty"]},
        "remote-code": {"model": "m"},
        "damaged": {"what": "step-00000004/state.json: missing"},
        "drift": {"differences": ["sft: machine.threads: the run was begun with 1, now it is 2", "b"]},
        "spike": {"step": 41, "loss": 9.5, "recent": 1.25, "samples": "my.jsonl:3, my.jsonl:8"},
        "rollback": {"step": 43, "to": 40},
        "out-of-memory": {"step": 2, "micro_tokens": 512},
    }
    lines = {kind: readers.event_line({"kind": kind, **facts}) for kind, facts in told.items()}
    assert lines["train"] == "training 3 samples for 2 steps (5.0% padding)"
    assert lines["measure"] == "before: held-out loss 2.0000, exact match 50.0% of 4"
    assert lines["skipped"] == "left out 1 rows, among them:\n  a:1: empty"
    assert lines["remote-code"] == "running Python code that comes with m (trust_remote_code: true)"
    assert lines["damaged"] == "damaged: step-00000004/state.json: missing"
    assert lines["drift"].splitlines()[1:] == [
        "  sft: machine.threads: the run was begun with 1, now it is 2", "  b"
    ]  # fmt: skip
    assert lines["spike"] == "step 41: loss 9.5000 after 1.2500: passed over (my.jsonl:3, my.jsonl:8)"
    assert lines["rollback"] == "step 43: back to the weights of step 40"
    assert lines["out-of-memory"].startswith("out of memory: going on with 512 tokens in one forward pass")
    smaller = readers.event_line({"kind": "out-of-memory", "step": 2, "eval_tokens": 64})
    assert smaller == "out of memory: going on with 64 tokens at a time in evaluation"
    assert all(lines.values())
    assert readers.event_line({"kind": "measure", "when": "after"}) == "after: nothing to measure"
    assert readers.event_line({"kind": "checkpoint"}) == ""


def test_the_bar_moves_and_keeps_lines_above():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f} {task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        bar = readers.Bar(progress)
        bar.preparing("my.jsonl", 2000)
        bar({"kind": "answering", "when": "before", "done": 3, "of": 9})
        bar({**STEP, "step": 3})
        bar({"kind": "resume", "step": 7})
    text = out.getvalue()
    for part in ("reading my.jsonl", "2000 rows", "answers before", "loss 1.5000", "checkpoint of step 7"):
        assert part in text


def test_the_terminal_reader_suits_its_output():
    with readers.terminal(quiet=True) as silent:
        silent(STEP)
        silent.preparing("x", 100_000)
        assert isinstance(silent, readers.Silent)
    with readers.terminal(quiet=False) as lines:
        assert isinstance(lines, readers.Lines)


def test_reading_is_told_every_hundred_thousand_rows(capsys):
    lines = readers.Lines()
    lines.preparing("big.jsonl", 99_000)
    lines.preparing("big.jsonl", 100_000)
    assert capsys.readouterr().err == "reading big.jsonl: 100000 rows\n"


def test_tensorboard_reads_the_stream(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (reader,) = readers.named(["tensorboard"], tmp_path)
    log = EventLog(tmp_path / "events.jsonl", reader)
    log.context = {"stage": "sft"}
    for step in (1, 2):
        log.emit("step", step=step, steps=2, loss=3.0 - step, lr=1e-3)
    log.emit("saved", path="x")
    log.close()
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [(e.step, e.value) for e in found.Scalars("sft/step/loss")] == [(1, 2.0), (2, 1.0)]
    assert list(readers.missing(["tensorboard"])) == []
