"""What a comparison leaves: ``report.html``, ``comparison.json``, ``comparison.csv`` and ``comparison.png``.

Names and reasons come from recipes and from children: the template escapes all of it.
"""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from tunewright.core import store
from tunewright.core.events import Event
from tunewright.core.units import human_bytes, human_count, human_percent, human_seconds
from tunewright.evaluate import charts, frontier, picture, standings, verdict
from tunewright.evaluate.charts import Chart, Point
from tunewright.evaluate.report import environment
from tunewright.evaluate.side_by_side import Column
from tunewright.evaluate.standings import MEMORY, TIME, Entrant, Standings

Tree = dict[str, Any]
_SMOOTH = 25
"""A curve is a mean over so small a part of its steps."""
RECORD = "comparison.json"


@dataclass(frozen=True)
class Subject:
    """What was compared, for the head of the page."""

    title: str
    facts: Sequence[tuple[str, str]]
    """What was the same for all."""
    notes: Sequence[str] = ()


def write(folder: Path, subject: Subject, entrants: Sequence[Entrant]) -> Tree:
    """All four files into the folder; returns what ``comparison.json`` says."""
    found = Standings(entrants)
    words = verdict.sentences(found)
    fronts = [front for cost in (TIME, MEMORY) if found.ranked and (front := frontier.picture(found, cost))]
    curves = [chart for chart in (_curves(entrants, along) for along in ("steps", "time")) if chart]
    record: Tree = {
        "title": subject.title, "facts": dict(subject.facts), "notes": list(subject.notes),
        "measure": _measure(found), "rows": standings.to_json(found),
        "verdict": {"en": [one.en for one in words], "zh": [one.zh for one in words]},
    }  # fmt: skip
    page = environment().get_template("compare.html.jinja").render(
        subject=subject, words=words, columns=list(_columns(found)) if found.ranked else [], fronts=fronts,
        curves=curves, colours=charts.COLOURS, entrants=entrants,
    )  # fmt: skip
    store.write_record(folder / RECORD, record)
    store.write_text(folder / "comparison.csv", table(entrants))
    store.write_bytes(
        folder / "comparison.png", picture.png(subject.title, [e.name for e in entrants], fronts, curves)
    )
    store.write_text(folder / "report.html", page.encode("utf-8", "replace").decode())
    return record


def _measure(found: Standings) -> Tree | None:
    if not found.ranked:
        return None
    return {"name": found.measure.name.en, "lower_is_better": found.measure.lower_is_better}


def table(entrants: Sequence[Entrant]) -> str:
    """A line for every trial, as CSV."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["name", "seed", "failed", *(name for name, _ in _FIELDS), "latency_seconds", "latency_merged"]
    )
    for entrant in entrants:
        timed = [entrant.latency.get(key, "") for key in ("seconds", "merged")]
        for one in entrant.tries:
            alone = Entrant(entrant.name, [one])
            values = [alone.mean(*path) for _, path in _FIELDS]
            writer.writerow(
                [
                    entrant.name,
                    one.seed,
                    one.reason,
                    *("" if v is None else f"{v:.10g}" for v in values),
                    *timed,
                ]
            )
    return out.getvalue()


_FIELDS = (
    ("exact_match", ("after", "exact_match")), ("f1", ("after", "f1")), ("loss", ("after", "loss")),
    ("loss_before", ("before", "loss")), ("questions", ("after", "count")), ("steps", ("train", "steps")),
    ("tokens", ("train", "tokens")), ("seconds", TIME.path), ("tokens_per_second", ("train", "tokens_per_second")),
    ("peak_memory_bytes", MEMORY.path), ("trainable", ("parameters", "trainable")),
    ("trainable_share", ("parameters", "share")), ("artifact_bytes", ("artifact_bytes",)),
)  # fmt: skip


def _curves(entrants: Sequence[Entrant], along: str) -> Chart | None:
    """Training loss of all, over steps or over seconds of training; none where no one trained."""
    lines: charts.Lines = {f"c{number % len(charts.COLOURS)}" + f" e{number}": line for number, entrant in enumerate(entrants)
             if (line := _curve(entrant, along))}  # fmt: skip
    if not lines:
        return None
    told = charts.in_steps if along == "steps" else human_seconds
    return charts.chart(f"Training loss over {along}", lines, end_told=told)


def _curve(entrant: Entrant, along: str) -> list[Point]:
    """Mean over the seeds at each step that all of them made, smoothed."""
    logs = [_steps(one.log) for one in entrant.done if one.log]
    if not logs:
        return []
    common = sorted(set.intersection(*(set(log) for log in logs)))
    losses = [(float(step), mean(log[step][1] for log in logs)) for step in common]
    smooth = charts.smoothed(losses, len(losses) // _SMOOTH)
    if along == "steps":
        return smooth
    return [
        (mean(log[step][0] for log in logs), loss) for step, (_, loss) in zip(common, smooth, strict=True)
    ]


def _steps(log: Sequence[Event]) -> dict[int, tuple[float, float]]:
    """Step -> (seconds of training, loss). What lies between a stop and going on is no training."""
    found: dict[int, tuple[float, float]] = {}
    since, before = 0.0, 0.0
    for event in log:
        if event["kind"] == "train":
            found = {step: point for step, point in found.items() if step <= event["step"]}
            since, before = event["time"], found.get(event["step"], (0.0, 0.0))[0]
        elif event["kind"] == "step" and event["loss"] is not None:
            found[event["step"]] = (before + event["time"] - since, event["loss"])
    return found


def _columns(found: Standings) -> Iterator[tuple[str, list[Tree]]]:
    """What the table says of each entrant: the measure that decides, differences, the rest, costs."""
    entrants, measure = found.entrants, found.measure
    scored = [found.quality(e) if e in found.ranked else None for e in entrants]
    cells = Column(
        measure.name.en, scored, measure.shown, measure.lower_is_better, is_share=measure.is_share
    ).cells()
    for cell, entrant in zip(cells, entrants, strict=True):
        spread = found.spread(entrant) if entrant in found.ranked else None
        cell["text"] += "" if spread is None else f" ± {measure.shown(spread)}"
    yield _capital(measure.name.en), cells
    yield (
        f"To the best{' in points' if measure.is_share else ''}, 95 %",
        [_plain(_difference(found, e)) for e in entrants],
    )
    if not measure.lower_is_better:
        losses = [e.mean("after", "loss") for e in entrants]
        yield "Held-out loss", Column("", losses, "{:.3f}".format, lower_is_better=True).cells()
    for title, path, shown, lower in _COSTS:
        values = [entrant.mean(*path) for entrant in entrants]
        if any(value is not None for value in values):
            yield title, Column(title, values, shown, lower).cells()
    steps = [entrant.mean("train", "steps") for entrant in entrants]
    if any(steps):
        yield "Steps", [_plain("–" if count is None else f"{count:,.0f}") for count in steps]
    if any(entrant.latency for entrant in entrants):
        yield "Latency", [_plain(_latency(entrant)) for entrant in entrants]
    for name in dict.fromkeys(name for e in entrants for name in e.forgotten()):
        rises = [e.forgotten().get(name) for e in entrants]
        yield f"Forgotten: {name}", Column(name, rises, "{:+.3f}".format, lower_is_better=True).cells()


_COSTS = (
    ("Training time", TIME.path, human_seconds, True),
    ("Tokens/s", ("train", "tokens_per_second"), human_count, False),
    ("Peak memory", MEMORY.path, human_bytes, True),
    ("Trained share", ("parameters", "share"), human_percent, True),
    ("Saved", ("artifact_bytes",), human_bytes, True),
)


def _plain(text: str) -> Tree:
    return {"text": text, "bar": None, "best": False}


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _difference(found: Standings, entrant: Entrant) -> str:
    if entrant not in found.ranked or entrant is found.ranked[0]:
        return "–"
    difference, scale = found.difference(entrant), 100.0 if found.measure.is_share else 1.0
    if difference is None:
        return "no seed in common"
    digits = 1 if found.measure.is_share else 3
    told = f"{scale * difference.mean:+.{digits}f}"
    if difference.low is None or difference.high is None:
        return told
    reach = scale * (difference.high - difference.low) / 2
    return f"{told} ± {reach:.{digits}f}{'' if found.is_behind(entrant) else ' (chance?)'}"


def _latency(entrant: Entrant) -> str:
    if not entrant.latency:
        return "–"
    return f"{1000 * entrant.latency['seconds']:,.0f} ms{'' if entrant.latency['merged'] else ', unmerged'}"
