"""Quality against a cost as plain geometry: a mark for each entrant, its spread, and the efficient ones on a line.

Places are percentages of the picture's box, as in ``charts.py``; names are put where they cover nothing, as far as
that is possible.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

from tunewright.evaluate.charts import Scale, linear, logarithmic, percent
from tunewright.evaluate.standings import MEMORY, Cost, Entrant, Standings

_CHARACTER, _LINE, _DOT = 1.15, 6.0, 1.1
"""Width of a letter, height of a line of text and half a dot: those of the PNG, on the page they are smaller."""
_BESIDE = 1.6
_RISES = (0.0, -0.8, 0.8, -1.6, 1.6, -2.6, 2.6)
"""Lines by which a name may stand above or below its mark."""
_FAR = 4.0
"""Where the costs are so many times apart, the axis is logarithmic."""
Place = tuple[float, float]


@dataclass(frozen=True)
class Mark:
    """An entrant. ``low`` to ``high`` is a standard deviation on either side of ``y``; equal if there is none."""

    name: str
    x: float
    y: float
    low: float
    high: float
    colour: int
    """The entrant's number."""
    efficient: bool
    title: str
    label_left: bool = False
    """Whether the name ends to the left of the mark; else it begins to the right of it."""
    label_y: float = 0.0
    """The name's middle."""


@dataclass(frozen=True)
class Frontier:
    """The picture; ``line`` joins the efficient marks, cheapest first."""

    title: str
    across: str
    marks: list[Mark]
    line: list[Place]
    x: list[tuple[float, str]]
    y: list[tuple[float, str]]


class _Box(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: "_Box") -> float:
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(width, 0.0) * max(height, 0.0)


_ALL = _Box(-2, -_LINE, 104, 100)
"""Where names may stand."""


def picture(standings: Standings, cost: Cost) -> Frontier | None:
    """Everyone whose cost is known; None for fewer than two."""
    prices = {e.name: price for e in standings.ranked if (price := e.mean(*cost.path)) is not None}
    if len(prices) < 2:
        return None
    unit, size = _unit(cost, max(prices.values()))
    low, high = min(prices.values()) / size, max(prices.values()) / size
    across = logarithmic(low, high) if low * _FAR < high else linear(low, high)
    there = [entrant for entrant in standings.ranked if entrant.name in prices]
    up = linear(min(_reach(standings, e)[0] for e in there), max(_reach(standings, e)[2] for e in there))
    front, measure = standings.frontier(cost), standings.measure
    marks = [
        Mark(e.name, percent(across.share(prices[e.name] / size)), y, bottom, top, standings.entrants.index(e), e in front,
             f"{e.name}: {measure.shown(standings.quality(e))}, {cost.shown(prices[e.name])}")
        for e in there for bottom, y, top in [[percent(1 - up.share(value)) for value in _reach(standings, e)]]
    ]  # fmt: skip
    places = {mark.name: (mark.x, mark.y) for mark in marks}
    line = [places[entrant.name] for entrant in front]
    how = f"{' in %' if measure.is_share else ''}{' (lower is better)' if measure.lower_is_better else ''}"
    title = f"{measure.name.en}{how} against {cost.name.en}"
    return Frontier(
        title[0].upper() + title[1:], f"{cost.name.en} in {unit}", list(_named(marks, line)), line,
        _ticks(across), [(100 - at, label) for at, label in _ticks(up)],
    )  # fmt: skip


def _reach(standings: Standings, entrant: Entrant) -> tuple[float, float, float]:
    """Quality less a standard deviation, itself, and with it; a share in percent, of which there are 0 to 100."""
    value, spread = standings.quality(entrant), standings.spread(entrant) or 0.0
    if not standings.measure.is_share:
        return value - spread, value, value + spread
    return 100 * max(value - spread, 0.0), 100 * value, 100 * min(value + spread, 1.0)


def _unit(cost: Cost, most: float) -> tuple[str, float]:
    if cost is MEMORY:
        return ("GB", 2.0**30) if most >= 2 * 2.0**30 else ("MB", 2.0**20)
    units = (("hours", 3600.0), ("minutes", 60.0))
    return next((unit for unit in units if most >= 2 * unit[1]), ("seconds", 1.0))


def _ticks(scale: Scale) -> list[tuple[float, str]]:
    return [(percent(scale.share(at)), label) for at, label in zip(scale.ticks, scale.labels(), strict=True)]


def _named(marks: Sequence[Mark], line: Sequence[Place]) -> Iterator[Mark]:
    """The marks with their names beside them, else above or below: where least is covered."""
    taken = [_Box(m.x - _DOT, m.y - 2 * _DOT, m.x + _DOT, m.y + 2 * _DOT) for m in marks]
    taken += [_Box(m.x - 0.3, m.high, m.x + 0.3, m.low) for m in marks]
    taken += [_Box(x - 0.5, y - 1, x + 0.5, y + 1) for x, y in _along(line)]
    for mark in marks:
        tried = [
            replace(mark, label_left=left, label_y=mark.y + rise * _LINE)
            for rise in _RISES
            for left in (False, True)
        ]
        best = min(tried, key=lambda one: _covered(_label(one), taken))  # the first of equals
        taken.append(_label(best))
        yield best


def _along(line: Sequence[Place], pieces: int = 40) -> Iterator[Place]:
    """Points on the line."""
    for (x, y), (to_x, to_y) in pairwise(line):
        for number in range(pieces):
            yield x + (to_x - x) * number / pieces, y + (to_y - y) * number / pieces


def _label(mark: Mark) -> _Box:
    width = _CHARACTER * len(mark.name)
    left = mark.x - _BESIDE - width if mark.label_left else mark.x + _BESIDE
    return _Box(left, mark.label_y - _LINE / 2, left + width, mark.label_y + _LINE / 2)


def _covered(box: _Box, taken: Sequence[_Box]) -> float:
    """How much of others the box hides; what stands outside of the picture counts twice."""
    whole = (box.right - box.left) * (box.bottom - box.top)
    return sum(map(box.overlap, taken)) + 2 * (whole - box.overlap(_ALL))
