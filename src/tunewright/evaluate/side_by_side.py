"""Several models on the same questions: the table and the words that the report has of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunewright.core.units import human_percent, human_perplexity
from tunewright.evaluate.chance import margin, share_error

Tree = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """One score of every model, None where it was not measured."""

    name: str
    values: Sequence[float | None]
    shown: Callable[[float], str]
    lower_is_better: bool = False
    errors: Sequence[float] = ()
    """Standard error of each, where it is known."""
    is_share: bool = False
    """Whether it lies between 0 and 1, so that a bar shows it."""

    @property
    def leaders(self) -> list[int]:
        """Whose is best, as far as it is written out; none if all look the same."""
        known = [value for value in self.values if value is not None]
        if len({self.shown(value) for value in known}) < 2:
            return []
        best = self.shown((min if self.lower_is_better else max)(known))
        return [
            place
            for place, value in enumerate(self.values)
            if value is not None and self.shown(value) == best
        ]

    def cells(self) -> list[Tree]:
        """For each model: what is written, the length of its bar in percent, whether it is the best."""
        return [
            {
                "text": "–" if value is None else self.shown(value),
                "bar": 100 * value if self.is_share and value is not None else None,
                "best": place in self.leaders,
            }
            for place, value in enumerate(self.values)
        ]


def table(found: Tree) -> Tree:
    """For the page: models, columns, rows of cells and sentences."""
    rows, columns = found["rows"], list(_columns(found["rows"]))
    cells = zip(*(column.cells() for column in columns), strict=True)
    return {
        "models": [row["model"] for row in rows],
        "columns": [column.name for column in columns],
        "rows": list(zip((row["model"] for row in rows), cells, strict=True)),
        "sentences": list(_sentences(rows, columns)),
        "samples": found["samples"],
        "count": rows[0].get("count", 0),
    }


def _columns(rows: Sequence[Tree]) -> Iterator[Column]:
    """Most telling first."""
    for name in rows[0].get("worth", {}):
        worth, errors = ([row[of][name] for row in rows] for of in ("worth", "worth_error"))
        yield Column(Path(name).name, worth, "{:.3f}".format, errors=errors)
        won = [row.get("wins", {}).get(name) for row in rows]
        yield Column(f"Wins against {rows[0]['model']}", won, human_percent, is_share=True)
    if "exact_match" in rows[0]:
        shares = [row["exact_match"] for row in rows]
        errors = [share_error(row["exact_match"], row["count"]) for row in rows]
        yield Column("Exact match", shares, human_percent, errors=errors, is_share=True)
        yield Column("F1", [row["f1"] for row in rows], human_percent, is_share=True)
    yield Column("Held-out loss", [row["loss"] for row in rows], "{:.3f}".format, lower_is_better=True)
    yield Column("Perplexity", [row["perplexity"] for row in rows], human_perplexity, lower_is_better=True)


def _sentences(rows: Sequence[Tree], columns: Sequence[Column]) -> Iterator[str]:
    told = next((column for column in columns if column.leaders), None)
    if told is None:
        yield "No score tells these models apart."
        return
    value = {place: value for place, value in enumerate(told.values) if value is not None}
    ranked = sorted(value, key=lambda place: value[place], reverse=not told.lower_is_better)
    leaders, second = told.leaders, next(place for place in ranked if place not in told.leaders)
    names = " and ".join(rows[place]["model"] for place in leaders)
    verb = "is" if len(leaders) == 1 else "are"
    first = ranked[0]
    yield (
        f"{names} {verb} best by {told.name}: {told.shown(value[first])}, "
        f"before {rows[second]['model']} with {told.shown(value[second])}."
    )
    if told.errors and abs(value[first] - value[second]) < margin(told.errors[first], told.errors[second]):
        yield f"With {rows[0]['count']:,} questions, a difference this small may be chance."
