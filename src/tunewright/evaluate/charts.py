"""Curves as plain geometry; the report's template draws them as SVG, ``picture.py`` as PNG.

Lines are points in a box of 1000 by 1000 that the page stretches to any width; dots, ticks and labels are
percentages of that box, so that they keep their size on a phone. Not here: colours and fonts, which are CSS.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from math import ceil, floor, isfinite, log10
from typing import Any

from tunewright.core.events import Event
from tunewright.core.units import human_count

Point = tuple[float, float]
Lines = dict[str, Sequence[Point]]
COLOURS = ("#1d64d8", "#c25e00", "#0e7350", "#a3308f", "#8a6d00", "#0a7f96", "#bf2f27", "#5b4bb5")
"""Of several entrants in one picture; each is told from white and from nearly black."""
_MOST = 1000
"""Points of a line: about as many as a screen has pixels across."""
_KNOWN = ("time", "step", "steps", "loss", "lr", "tokens", "tokens_per_second", "grad_norm", "memory")
"""Of a step event; other numbers are the objective's own, and each gets a curve."""


@dataclass
class History:
    """What one stage's events say of each step. Steps that a resumed run did again count once."""

    steps: dict[int, dict[str, float]] = field(default_factory=dict)
    held_out: dict[int, float] = field(default_factory=dict)
    resumed: list[int] = field(default_factory=list)
    kept: int | None = None
    """The step whose weights were restored at the end."""

    def add(self, event: Event) -> None:
        """Take note of one event."""
        if event["kind"] == "train":
            self._begin(event["step"])
        elif event["kind"] == "step":
            numbers = {k: v for k, v in event.items() if isinstance(v, (int, float)) and isfinite(v)}
            self.steps[event["step"]] = numbers
        elif event["kind"] == "eval" and isfinite(event["loss"]):
            self.held_out[event["step"]] = event["loss"]
        elif event["kind"] == "restore":
            self.kept = event["step"]

    def _begin(self, at: int) -> None:
        """Training starts or goes on from here: what an earlier try did later than this is undone."""
        self.steps = {step: numbers for step, numbers in self.steps.items() if step <= at}
        self.held_out = {step: loss for step, loss in self.held_out.items() if step <= at}
        self.resumed = [step for step in self.resumed if step < at] + [at] * (at > 0)
        self.kept = None

    def curve(self, key: str) -> list[Point]:
        """One number over the steps, in order."""
        return [(step, numbers[key]) for step, numbers in sorted(self.steps.items()) if key in numbers]

    def extras(self) -> list[str]:
        """Names of the numbers that only this objective reports."""
        return list(dict.fromkeys(k for numbers in self.steps.values() for k in numbers if k not in _KNOWN))


def histories(log: Iterable[Event]) -> dict[str, History]:
    """The history of every stage in the log."""
    found: dict[str, History] = {}
    for event in log:
        found.setdefault(event.get("stage", ""), History()).add(event)
    return found


def smoothed(points: Sequence[Point], span: int) -> list[Point]:
    """Mean of about ``span`` points around each, of fewer towards the ends, so that nothing is shifted."""
    sums = [0.0, *accumulate(value for _, value in points)]
    reach = [min(span // 2, i, len(points) - 1 - i) for i in range(len(points))]
    means = [(sums[i + r + 1] - sums[i - r]) / (2 * r + 1) for i, r in enumerate(reach)]
    return [(step, mean) for (step, _), mean in zip(points, means, strict=True)]


def thinned(points: Sequence[Point], most: int = _MOST) -> list[Point]:
    """Every n-th point, and the last, so that at most ``most`` are left."""
    stride = ceil(len(points) / (most - 1)) if len(points) > most else 1
    return [*points[:-1:stride], *points[-1:]]


@dataclass(frozen=True)
class Scale:
    """From values to shares of an axis, 0 at its first tick and 1 at its last."""

    ticks: tuple[float, ...]
    log: bool = False

    def share(self, value: float) -> float:
        """Where a value is."""
        low, high, at = self.ticks[0], self.ticks[-1], value
        if self.log:
            low, high, at = log10(low), log10(high), log10(value)
        return (at - low) / (high - low)

    def labels(self) -> list[str]:
        """The ticks in words, all with the same number of decimals."""
        step = min(b - a for a, b in pairwise(self.ticks))
        return [_number(tick, step) for tick in self.ticks]


def _number(value: float, step: float) -> str:
    if step >= 1000:
        return human_count(value)
    if value and step < 1e-3:
        return f"{value:.3g}".replace("e-0", "e-")
    return f"{value:,.{max(0, -floor(log10(step) + 1e-9))}f}" if value else "0"


def linear(low: float, high: float, count: int = 5, least: float = 0.0) -> Scale:
    """About ``count`` round steps of at least ``least`` that enclose both values."""
    spread = high - low
    if spread < 1e-9 * max(abs(low), abs(high)):  # they differ by rounding
        spread = 0.0
    rough = max((spread or abs(high) or 1.0) / count, least)
    size: float = 10.0 ** floor(log10(rough))
    step = next(m * size for m in (1, 2, 5, 10) if m * size >= rough * (1 - 1e-9))
    first, last = floor(low / step + 1e-9), ceil(high / step - 1e-9)
    return Scale(tuple(k * step for k in range(first, max(last, first + 1) + 1)))


def logarithmic(low: float, high: float) -> Scale:
    """Round numbers that enclose both values, the fewer the further they are apart."""
    ratio = high / low
    heads = (1, 1.5, 2, 3, 5, 7) if ratio < 20 else (1, 2, 5) if ratio < 200 else (1,)
    decades = range(floor(log10(low)), ceil(log10(high)) + 1)
    marks = [head * 10.0**decade for decade in decades for head in heads]
    first = max(mark for mark in marks if mark <= low)
    last = min(mark for mark in marks if mark >= high)
    return Scale(tuple(mark for mark in marks if first <= mark <= last), log=True)


@dataclass(frozen=True)
class Chart:
    """A titled plot: lines by CSS class, dots with what to say of them, ticks as (percent, label)."""

    title: str
    lines: dict[str, str]
    dots: list[tuple[float, float, str]]
    x: list[tuple[float, str]]
    y: list[tuple[float, str]]
    log: bool = False


def in_steps(end: float) -> str:
    """How the end of an axis of steps is told."""
    return f"step {end:,.0f}"


def chart(
    title: str,
    lines: Lines,
    dots: Sequence[Point] = (),
    zero: bool = False,
    end_told: Callable[[float], str] = in_steps,
) -> Chart:
    """A chart of lines by CSS class. ``zero`` starts the y axis there; ``end_told`` tells what x is."""
    points = [p for line in lines.values() for p in line] + list(dots)
    x, y = linear(0, max(p[0] for p in points), least=1), vertical([p[1] for p in points], zero)
    end = max(p[0] for p in points)
    x = Scale((*(tick for tick in x.ticks if tick < end * 0.88), end))
    boxed = {name: _path(thinned(line), x, y) for name, line in lines.items()}
    spots = [(percent(x.share(s)), percent(1 - y.share(v)), f"step {s:,.0f}: {v:.4f}") for s, v in dots]
    across = [(percent(x.share(tick)), end_told(tick) if tick == end else f"{tick:,.0f}") for tick in x.ticks]
    up = [(percent(1 - y.share(t)), label) for t, label in zip(y.ticks, y.labels(), strict=True)]
    return Chart(title, boxed, spots, across, up, y.log)


def vertical(values: list[float], zero: bool) -> Scale:
    """Logarithmic where a straight axis would squeeze all but the beginning into its lowest quarter."""
    low, high = min(values), max(values)
    if not zero and 0 < low * 4 < high:
        return logarithmic(low, high)
    return linear(min(0.0, low) if zero else low, high)


def percent(share: float) -> float:
    """As places in a chart are written."""
    return round(100 * share, 2)


def _path(line: Sequence[Point], x: Scale, y: Scale) -> str:
    return " ".join(f"{1000 * x.share(s):.1f},{1000 * (1 - y.share(v)):.1f}" for s, v in line)


def loss_chart(history: History, before: dict[str, Any], after: dict[str, Any]) -> Chart | None:
    """Training loss, smoothed, and every held-out loss; None without training steps."""
    raw = history.curve("loss")
    last = history.kept or max(history.steps, default=0)
    known: dict[int, float | None] = {0: before.get("loss"), **history.held_out}
    known[last] = after.get("loss", known.get(last))
    dots = sorted((step, loss) for step, loss in known.items() if loss is not None and isfinite(loss))
    span = len(raw) // 25
    trained: Lines = {"raw": raw, "smooth": smoothed(raw, span)} if span > 1 else {"smooth": raw}
    return chart("Loss", {**trained, "held": dots}, dots) if raw else None


def side_charts(history: History) -> list[Chart]:
    """Learning rate, speed, and what else the objective reports."""
    named = {"lr": "Learning rate", "tokens_per_second": "Tokens per second, mean since the start"}
    named |= {key: key.replace("_", " ").capitalize() for key in history.extras()}
    curves = [(title, history.curve(key), key in _KNOWN) for key, title in named.items()]
    return [chart(title, {"smooth": curve}, zero=known) for title, curve, known in curves if curve]
