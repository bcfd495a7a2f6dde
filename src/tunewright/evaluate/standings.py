"""Several entrants, methods or models, each tried with one or more seeds: what each scores and costs, and who leads."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from tunewright.core.events import Event
from tunewright.core.units import human_bytes, human_seconds
from tunewright.core.words import Words
from tunewright.evaluate.chance import Difference, margin, paired, share_error

Tree = dict[str, Any]


@dataclass(frozen=True)
class Try:
    """One trial, or one model that was there already: what ``results.json`` says of its stage, empty if it failed."""

    seed: int
    stage: Tree
    log: Sequence[Event] = ()
    reason: str = ""
    """Why it failed."""

    @property
    def is_done(self) -> bool:
        """Whether there is something to compare."""
        return not self.reason


@dataclass(frozen=True)
class Measure:
    """What quality is told by; ``path`` leads to it among the scores."""

    name: Words
    path: tuple[str, ...]
    shown: Callable[[float], str]
    lower_is_better: bool = False
    is_share: bool = False

    def of(self, scores: Mapping[str, Any]) -> float | None:
        """The value among scores; None if it was not measured."""
        return _at(scores, self.path)


LOSS = Measure(Words("held-out loss", "留出集损失"), ("loss",), "{:.3f}".format, lower_is_better=True)


@dataclass(frozen=True)
class Cost:
    """What a result is paid with; ``path`` leads to it in a stage's results."""

    key: str
    name: Words
    path: tuple[str, ...]
    shown: Callable[[float], str]


TIME = Cost("seconds", Words("training time", "训练时间"), ("train", "seconds"), human_seconds)
MEMORY = Cost("peak_memory", Words("peak memory", "峰值内存"), ("train", "peak_memory"), human_bytes)


def _at(tree: Mapping[str, Any], path: Sequence[str]) -> float | None:
    found: Any = tree
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return None if found is None else float(found)


@dataclass(frozen=True)
class Entrant:
    """A variant or a model with all that was tried of it."""

    name: str
    tries: Sequence[Try]
    latency: Mapping[str, Any] = field(default_factory=dict)
    """``seconds`` for ``tokens`` tokens at batch 1, and whether it was ``merged``; empty if it was not measured."""

    @property
    def done(self) -> list[Try]:
        """Tries that came to their end."""
        return [one for one in self.tries if one.is_done]

    def scores(self, measure: Measure) -> dict[int, float]:
        """By seed."""
        found = {one.seed: measure.of(one.stage["after"]) for one in self.done}
        return {seed: value for seed, value in found.items() if value is not None}

    def mean(self, *path: str) -> float | None:
        """Of a number in the stage's results, over seeds."""
        found = [value for one in self.done if (value := _at(one.stage, path)) is not None]
        return mean(found) if found else None

    def forgotten(self) -> dict[str, float]:
        """How much the loss on each old set rose, nats a token, mean over seeds; below zero it is known better."""
        names = {name for one in self.done for name in one.stage["after"].get("old", {})}
        rises = {name: [one.stage["after"]["old"][name] - one.stage["before"]["old"][name] for one in self.done
                        if "old" in one.stage.get("before", {})] for name in sorted(names)}  # fmt: skip
        return {name: mean(values) for name, values in rises.items() if values}


@dataclass(frozen=True)
class Standings:
    """All entrants; those without a score stand last."""

    entrants: Sequence[Entrant]
    by: Measure | None = None
    """What decides, instead of the most telling measure."""

    @cached_property
    def measure(self) -> Measure:
        """Exact match where it was measured, else rewards, else held-out loss: the first that tells any two apart."""
        if self.by:
            return self.by
        known = [m for m in self._measures() if all(e.scores(m) for e in self.entrants if e.done)]
        return next(
            (m for m in known if len({m.shown(self.quality(e, m)) for e in self.entrants if e.done}) > 1),
            known[-1],
        )

    def _measures(self) -> Iterator[Measure]:
        yield Measure(Words("exact match", "完全正确率"), ("exact_match",), "{:.1%}".format, is_share=True)
        worth: Tree = next((one.stage["after"].get("worth", {}) for e in self.entrants for one in e.done), {})
        for name in worth:
            short = Path(name).name
            yield Measure(Words(f"reward {short}", f"奖励 {short}"), ("worth", name), "{:.3f}".format)
        yield LOSS

    def quality(self, entrant: Entrant, measure: Measure | None = None) -> float:
        """Its mean score over seeds."""
        return mean(entrant.scores(measure or self.measure).values())

    def spread(self, entrant: Entrant) -> float | None:
        """Standard deviation over seeds; None if there is one seed."""
        values = list(entrant.scores(self.measure).values())
        return stdev(values) if len(values) > 1 else None

    @cached_property
    def ranked(self) -> list[Entrant]:
        """Those with a score, best first."""
        if not any(entrant.done for entrant in self.entrants):
            return []
        there = [entrant for entrant in self.entrants if entrant.scores(self.measure)]
        return sorted(there, key=self.quality, reverse=not self.measure.lower_is_better)

    def difference(self, entrant: Entrant) -> Difference | None:
        """To the best, paired over the seeds that both have; None if they have none in common."""
        own, best = entrant.scores(self.measure), self.ranked[0].scores(self.measure)
        both = [seed for seed in own if seed in best]
        return paired([own[seed] for seed in both], [best[seed] for seed in both]) if both else None

    def chance(self, entrant: Entrant) -> float:
        """What so few questions let a score differ by from the best one's; 0 where that is not known."""
        if not self.measure.is_share:
            return 0.0
        # Other seeds ask the same questions: they make the score no surer of other questions.
        errors = [
            share_error(self.quality(e), e.done[0].stage["after"]["count"]) for e in (entrant, self.ranked[0])
        ]
        return margin(*errors)

    def is_behind(self, entrant: Entrant) -> bool:
        """Whether neither seeds nor questions explain that it stands behind the best."""
        difference = self.difference(entrant)
        return difference is not None and difference.is_clear and abs(difference.mean) > self.chance(entrant)

    def peers(self) -> list[Entrant]:
        """The best, and those that chance may have put behind it."""
        return [entrant for entrant in self.ranked if not self.is_behind(entrant)]

    def frontier(self, cost: Cost) -> list[Entrant]:
        """The efficient ones, cheapest first: nobody else is as good for less, or better for as much (Pareto)."""
        sign = 1 if self.measure.lower_is_better else -1
        priced = [
            (price, sign * self.quality(e), e)
            for e in self.ranked
            if (price := e.mean(*cost.path)) is not None
        ]
        efficient: list[Entrant] = []
        lowest = float("inf")
        for price, badness, entrant in sorted(priced, key=lambda one: one[:2]):
            if badness < lowest or (efficient and (price, badness) == self._paid(efficient[-1], cost, sign)):
                efficient.append(entrant)
                lowest = badness
        return efficient

    def _paid(self, entrant: Entrant, cost: Cost, sign: int) -> tuple[float | None, float]:
        return entrant.mean(*cost.path), sign * self.quality(entrant)


def to_json(standings: Standings) -> list[Tree]:
    """Every entrant's figures, in the order they were named."""
    fronts = {cost.key: standings.frontier(cost) for cost in (TIME, MEMORY)}
    return [_row(standings, entrant, fronts) for entrant in standings.entrants]


def _row(standings: Standings, entrant: Entrant, fronts: Mapping[str, list[Entrant]]) -> Tree:
    failed = [{"seed": one.seed, "reason": one.reason} for one in entrant.tries if not one.is_done]
    row: Tree = {"name": entrant.name, "failed": failed}
    if entrant not in standings.ranked:
        return row
    best = entrant is standings.ranked[0]
    difference = None if best else standings.difference(entrant)
    loss = [one.stage["after"]["loss"] for one in entrant.done if "loss" in one.stage["after"]]
    return {
        **row, "quality": standings.quality(entrant), "quality_sd": standings.spread(entrant),
        "by_seed": entrant.scores(standings.measure), "is_best": best,
        "difference": difference and {"mean": difference.mean, "low": difference.low, "high": difference.high,
                                      "margin_of_questions": standings.chance(entrant)},
        "is_behind": not best and standings.is_behind(entrant),
        "loss": mean(loss) if loss else None, "f1": entrant.mean("after", "f1"),
        "seconds": entrant.mean(*TIME.path), "peak_memory": entrant.mean(*MEMORY.path),
        "tokens_per_second": entrant.mean("train", "tokens_per_second"), "steps": entrant.mean("train", "steps"),
        "trainable": entrant.mean("parameters", "trainable"), "share": entrant.mean("parameters", "share"),
        "artifact_bytes": entrant.mean("artifact_bytes"), "latency": dict(entrant.latency) or None,
        "forgotten": entrant.forgotten(),
        "efficient_by": [key for key, front in fronts.items() if entrant in front],
    }  # fmt: skip
