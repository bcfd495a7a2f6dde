"""Quality against a cost as plain geometry: a mark for each entrant, its spread, and the efficient ones on a line.

Places are percentages of the picture's box, as in ``charts.py``; names are put where they cover nothing, as far as
that is possible.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tunewright.evaluate.charts import Scale, linear, logarithmic, percent
from tunewright.evaluate.standings import MEMORY, Cost, Standings

_CHARACTER, _LINE, _DOT = 0.78, 6.0, 1.1
"""Width of a letter, height of a line of text and half a dot, in percent of a box of about 1000 by 300 pixels."""
_FAR = 4.0
"""Where the costs are so many times apart, the axis is logarithmic."""


@dataclass(frozen=True)
class Mark:
    """An entrant. ``low`` to ``high`` is a standard deviation on either side of ``y``; equal if there is none."""

    name: str
    x: float
    y: float
    low: float
    high: float
    label_x: float
    label_y: float
    """The middle of the label's left end."""
    colour: int
    efficient: bool
    title: str


@dataclass(frozen=True)
class Frontier:
    """The picture; ``line`` joins the efficient marks, cheapest first."""

    title: str
    across: str
    marks: list[Mark]
    line: list[tuple[float, float]]
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


def picture(standings: Standings, cost: Cost) -> Frontier | None:
    """Everyone whose cost is known; None for fewer than two."""
    priced = [
        (entrant, price) for entrant in standings.ranked if (price := entrant.mean(*cost.path)) is not None
    ]
    if len(priced) < 2:
        return None
    unit, per_unit = _unit(cost, max(price for _, price in priced))
    measure, scale = standings.measure, 100.0 if standings.measure.is_share else 1.0
    prices = [price / per_unit for _, price in priced]
    values = [scale * standings.quality(entrant) for entrant, _ in priced]
    spreads = [scale * (standings.spread(entrant) or 0.0) for entrant, _ in priced]
    reach = [value + sign * spread for value, spread in zip(values, spreads, strict=True) for sign in (-1, 1)]
    across, up = _across(min(prices), max(prices)), linear(min(reach), max(reach))
    places = [
        (percent(across.share(p)), percent(1 - up.share(v))) for p, v in zip(prices, values, strict=True)
    ]
    bars = [
        (percent(1 - up.share(v + s)), percent(1 - up.share(v - s)))
        for v, s in zip(values, spreads, strict=True)
    ]
    names = [entrant.name for entrant, _ in priced]
    labels = _labels(names, places, bars)
    front = standings.frontier(cost)
    order = {entrant.name: number for number, entrant in enumerate(standings.entrants)}
    marks = [
        Mark(entrant.name, *place, *bar[::-1], *label, order[entrant.name], entrant in front,
             f"{entrant.name}: {measure.shown(standings.quality(entrant))}, {cost.shown(price)}")
        for (entrant, price), place, bar, label in zip(priced, places, bars, labels, strict=True)
    ]  # fmt: skip
    by_name = {mark.name: (mark.x, mark.y) for mark in marks}
    better = " (lower is better)" if measure.lower_is_better else ""
    title = f"{measure.name.en}{' in %' if measure.is_share else ''}{better} against {cost.name.en}"
    return Frontier(
        title[0].upper() + title[1:], f"{cost.name.en} in {unit}", marks, [by_name[e.name] for e in front],
        _ticks(across), [(100 - at, label) for at, label in _ticks(up)],
    )  # fmt: skip


def _unit(cost: Cost, most: float) -> tuple[str, float]:
    units = (("GB", 2.0**30), ("MB", 2.0**20)) if cost is MEMORY else (("hours", 3600.0), ("minutes", 60.0))
    small = ("MB", 2.0**20) if cost is MEMORY else ("seconds", 1.0)
    return next((unit for unit in units if most >= 2 * unit[1]), small)


def _across(low: float, high: float) -> Scale:
    return logarithmic(low, high) if low * _FAR < high else linear(low, high)


def _ticks(scale: Scale) -> list[tuple[float, str]]:
    return [
        (percent(scale.share(tick)), label) for tick, label in zip(scale.ticks, scale.labels(), strict=True)
    ]


def _labels(
    names: Sequence[str], places: Sequence[tuple[float, float]], bars: Sequence[tuple[float, float]]
) -> Iterator[tuple[float, float]]:
    """Where each name begins: beside its mark, else above or below it, at the place that covers least."""
    taken = [_Box(x - _DOT, y - 2 * _DOT, x + _DOT, y + 2 * _DOT) for x, y in places]
    taken += [_Box(x - 0.3, top, x + 0.3, bottom) for (x, _), (top, bottom) in zip(places, bars, strict=True)]
    for name, (x, y) in zip(names, places, strict=True):
        width = _CHARACTER * len(name)
        sides = [x + 1.6, x - 1.6 - width]
        tried = [(left, y + rise * _LINE) for rise in (0, -0.8, 0.8, -1.6, 1.6, -2.6, 2.6) for left in sides]

        def covered(place: tuple[float, float], width: float = width) -> float:
            left, middle = place
            box = _Box(left, middle - _LINE / 2, left + width, middle + _LINE / 2)
            within = box.overlap(_Box(0, -_LINE / 2, 104, 100))
            return sum(map(box.overlap, taken)) + 2 * (width * _LINE - within)

        best = min(tried, key=covered)  # the first of equals
        taken.append(_Box(best[0], best[1] - _LINE / 2, best[0] + width, best[1] + _LINE / 2))
        yield best
