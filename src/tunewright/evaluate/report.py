"""The report: one page that says what a run gained, what it cost and what it came from.

Everything is in ``report.html``; nothing is fetched. Data is untrusted: the template escapes all of it.
"""

import shlex
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from tunewright.core import events, figures, store
from tunewright.core.answers import exact_match
from tunewright.core.units import human_bytes, human_count, human_percent, human_perplexity, human_seconds
from tunewright.evaluate import charts, foretold, side_by_side
from tunewright.evaluate.chance import margin, share_error
from tunewright.evaluate.charts import Point
from tunewright.recipes import EVAL

Tree = dict[str, Any]
_NOTICED = 5e-4
"""Smaller changes do not show in the digits that are printed."""
_TELLING = ("reward", "accuracy")
"""Figures of which more is better, and which say what an objective is for."""
_CARDS = 3
_LISTED = 200
"""Rows left out that are listed; a page of a hundred thousand helps nobody."""


def write(folder: Path) -> None:
    """``folder/report.html`` from its ``results.json``, ``events.jsonl`` and ``recipe.yaml``."""
    results = store.read_record(folder / "results.json")
    log = list(events.read(folder / "events.jsonl"))
    found = charts.histories(log)
    stages = [_stage(s, found.get(s["name"], charts.History())) for s in results["stages"]]
    page = environment().get_template("report.html.jinja").render(
        run=results["run"], status=results["status"], stages=stages, when=_when(log),
        recipe=_recipe(folder / "recipe.yaml"), folder=shlex.quote(str(folder)),
        last=side_by_side.table(results[EVAL]) if EVAL in results else None,
    )  # fmt: skip
    store.write_text(folder / "report.html", page.encode("utf-8", "replace").decode())


@cache
def environment() -> Environment:
    """Templates beside this file, and how they write numbers."""
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    made.filters |= {
        "size": human_bytes, "short": human_count, "duration": human_seconds, "whole": "{:,}".format,
        "percent": human_percent, "points": _points, "perplexity": human_perplexity, "right": _is_right, "figure": figures.shown, "named": _named,
    }  # fmt: skip
    return made


def _recipe(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _when(log: list[events.Event]) -> str:
    return f"{datetime.fromtimestamp(log[-1]['time'], UTC):%Y-%m-%d %H:%M} UTC" if log else ""


def _points(share: float) -> str:
    return f"{100 * abs(share):.1f}"


def _named(name: str) -> str:
    words = figures.NAMES.get(name, name.replace("_", " "))
    return words[0].upper() + words[1:]


def _is_right(answer: str, reference: str) -> bool:
    return bool(exact_match(answer, reference))


@dataclass(frozen=True)
class Change:
    """A score before (None if it was not measured) and after."""

    before: float | None
    after: float
    lower_is_better: bool = False

    @property
    def gain(self) -> float:
        """How much better it got; below zero is worse."""
        moved = 0.0 if self.before is None else self.after - self.before
        return -moved if self.lower_is_better else moved

    @property
    def verdict(self) -> str:
        """In a word; empty if there is nothing to compare with."""
        if self.before is None:
            return ""
        return "unchanged" if abs(self.gain) < _NOTICED else "better" if self.gain > 0 else "worse"


def _change(stage: Tree, key: str, **how: bool) -> Change | None:
    after: float | None = stage["after"].get(key)
    return None if after is None else Change(stage["before"].get(key), after, **how)


def _stage(stage: Tree, history: charts.History) -> Tree:
    """The stage's results and all that is worked out from them for the page."""
    exact, loss = _change(stage, "exact_match"), _change(stage, "loss", lower_is_better=True)
    own = [
        (name, Change(stage["before"].get(name), value)) for name, value in figures.of(stage["after"]).items()
    ]
    if "reward" in stage["after"]:  # its loss is the reward, negative
        loss = None
    old = {
        name: Change(stage["before"].get("old", {}).get(name), value, lower_is_better=True)
        for name, value in stage["after"].get("old", {}).items()
    }  # fmt: skip
    best = own[0] if own and own[0][0] in _TELLING else None
    return {
        **stage, "exact": exact, "loss": loss, "history": history, "figures": own[:_CARDS],
        "sentences": [*_sentences(stage, exact, loss, best, history.curve("loss")), *_forgotten(old),
                      *_worth(stage["before"].get("worth", {}), stage["after"])],
        "verdict": next((change.verdict for change in (exact, best[1] if best else None, loss) if change), ""),
        "loss_words": "Loss in nats per learned token" if "perplexity" in stage["after"] else "Loss",
        "families": _families(stage), "samples": stage.get("samples", []),
        "loss_chart": charts.loss_chart(history, stage["before"], stage["after"]),
        "side_charts": charts.side_charts(history),
        "advice": foretold.of(stage) if "advised" in stage else None,
        "sets": [_dataset("Training", stage["data"]["train"]), _dataset("Held-out", stage["data"]["valid"])],
        "chosen": [_options(stage[key]) for key in ("method", "objective")], **_own(stage.get("method_report", {})),
    }  # fmt: skip


def _own(figures: Tree) -> Tree:
    """What the method says of itself: single figures, and one row of bars for each mapping."""
    named = {name.replace("_", " ").capitalize(): value for name, value in figures.items()}
    return {
        "own_figures": [(n, _figure(v)) for n, v in named.items() if not isinstance(v, dict)],
        "own_bars": [(n, list(v.items())) for n, v in named.items() if isinstance(v, dict) and v],
    }


def _figure(value: Any) -> str:
    return (
        f"{value:,.4g}"
        if isinstance(value, float)
        else f"{value:,}"
        if isinstance(value, int)
        else str(value)
    )


def _options(choice: Tree) -> str:
    """``lora (rank 16, alpha 32)``."""
    options = ", ".join(f"{k.replace('_', ' ')} {_plain(v)}" for k, v in choice.items() if k != "name")
    return f"{choice['name']} ({options})" if options else str(choice["name"])


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _sentences(
    stage: Tree,
    exact: Change | None,
    loss: Change | None,
    best: tuple[str, Change] | None,
    curve: list[Point],
) -> Iterator[str]:
    """What happened, in words, good or bad."""
    if exact:
        yield from _exact_sentences(exact, stage["after"]["count"])
    if best:
        yield _own_sentence(*best)
    if loss:
        yield _loss_sentence(loss)
    if not exact and not best and not loss:
        yield "Nothing was measured on held-out data."
        if curve:
            first, last = curve[0][1], curve[-1][1]
            yield f"The training loss went from {first:.3f} to {last:.3f}; that alone proves little."


def _exact_sentences(exact: Change, count: int) -> Iterator[str]:
    now = f"{human_percent(exact.after)} of {count:,} held-out questions are answered exactly right"
    if exact.before is None:
        yield f"{now}."
        return
    points = f"{_points(exact.gain)} percentage points"
    words = {"better": f"{points} better", "worse": f"{points} worse", "unchanged": "no change"}
    yield f"{now}, {human_percent(exact.before)} before training: {words[exact.verdict]}."
    if (
        _NOTICED
        <= abs(exact.gain)
        < margin(share_error(exact.before, count), share_error(exact.after, count))
    ):
        yield f"With {count:,} questions, a difference this small may be chance."


def _worth(before: dict[str, float], after: Tree) -> Iterator[str]:
    """What answers are worth by the recipe's own rewards."""
    for name, value in after.get("worth", {}).items():
        was = f", {before[name]:.3f} before" if name in before else ""
        won = after.get("wins", {}).get(name)
        against = (
            f"; {human_percent(won)} of answers win against those before (ties count half)"
            if won is not None
            else ""
        )
        yield f"By {Path(name).name}, answers are worth {value:.3f}{was}{against}."
    if "kl" in after:
        yield f"Its own answers are {after['kl']:.2f} nats, an answer's mean, from those of the model before (KL)."


def _forgotten(old: dict[str, Change]) -> Iterator[str]:
    """What became of what the model knew before."""
    words = {
        "better": "is known better than before",
        "worse": "was partly forgotten",
        "unchanged": "is known as before",
    }
    for name, change in old.items():
        if change.before is not None:
            moved = f"its loss was {change.before:.3f} before and is {change.after:.3f} now"
            yield f"The old data “{name}” {words[change.verdict]}: {moved}."


def _own_sentence(name: str, change: Change) -> str:
    named, now = figures.NAMES[name].capitalize(), figures.shown(name, change.after)
    if change.before is None:
        return f"{named} on held-out data is {now}."
    words = {"better": "rose", "worse": "fell", "unchanged": "is unchanged"}
    return f"{named} on held-out data {words[change.verdict]}: {figures.shown(name, change.before)} before, {now} after."


def _loss_sentence(loss: Change) -> str:
    if loss.before is None:
        return f"The held-out loss is {loss.after:.3f}."
    words = {"better": "fell, which is better", "worse": "rose, which is worse", "unchanged": "is unchanged"}
    return f"The held-out loss {words[loss.verdict]}: {loss.before:.3f} before, {loss.after:.3f} after."


def _families(stage: Tree) -> list[Tree]:
    """A row for each family, the largest gain first."""
    before, after = (stage[when].get("families", {}) for when in ("before", "after"))
    rows = [
        {"name": name, "count": scores["count"], "f1": scores["f1"],
         "change": Change(before.get(name, {}).get("exact_match"), scores["exact_match"])}
        for name, scores in after.items()
    ]  # fmt: skip
    return sorted(rows, key=lambda row: (-row["change"].gain, -row["change"].after, row["name"]))


def _dataset(name: str, facts: Tree) -> Tree:
    """One data set over all its files."""
    files, good = facts["files"], sum(file["good"] for file in facts["files"])
    families: Counter[str] = Counter()
    for file in files:
        families.update(file["families"])
    return {
        **facts, "name": name, "rows": sum(file["rows"] for file in files),
        "cjk": sum(file["cjk"] * file["good"] for file in files) / good if good else None,
        "families": families.most_common(), "lengths": _lengths(facts["lengths"]),
        "skipped": facts["skipped"][:_LISTED], "left_out": len(facts["skipped"]),
    }  # fmt: skip


def _lengths(bins: Iterable[Tree]) -> list[tuple[str, int]]:
    """The histogram from its first to its last bin that holds a sample."""
    found = list(bins)
    filled = [i for i, b in enumerate(found) if b["samples"]]
    shown = found[filled[0] : filled[-1] + 1] if filled else []
    return [(_range(b["from"], b["below"]), b["samples"]) for b in shown]


def _range(low: int, below: int) -> str:
    return f"{low:,} and more" if below >= 1 << 30 else f"{max(low, 1):,}–{below - 1:,}"
