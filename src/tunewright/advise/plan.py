"""Plans: for each method where it runs and what it takes, best first, with the reasons."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tunewright.advise import reasons, trained
from tunewright.advise.memory import Choice, Parts, estimate
from tunewright.advise.past import Measured
from tunewright.advise.placement import MEASURED_HEADROOM, Placement, fits, simplest
from tunewright.advise.rules import Rule, holding
from tunewright.advise.situation import Situation
from tunewright.advise.speed import pace
from tunewright.core.words import Words

_LEAST_BATCH, _MOST_BATCH = 2048, 1 << 17
DEFAULT_BATCH = 4096
"""Tokens of a step where a recipe gives the number of steps and not what they hold."""
_ROWS = 32
"""Rows of an optimizer step."""
_STEPS = 50
"""At least so many steps should be made, if the data allows it."""
_LATE = -5
"""Score of a plan that does not end in time."""
_WARM, _LONGEST_WARM, _LEAST_WARM = 40, 0.3, 0.03
"""Steps over which the rate rises, 2 / (1 - beta2) with Adam's beta2 of 0.95 (Ma & Yarats 2019, arXiv:1910.04209), and what
share of the run they may be."""
_SMALL = 50_000_000
_MOST_MICRO = 4096
"""Tokens in a forward pass beyond which matrix units gain nothing more."""
_TWICE = 2.0
"""So much faster must a placement be for a simpler one to be passed over."""
_FASTER = 10.0
"""Small models take ten times the default rate: the best of three in docs/methods.md, for most methods."""


@dataclass(frozen=True)
class Plan:
    """A way to train, and what it takes."""

    choice: Choice
    placement: Placement
    parts: Parts
    """Of one device."""
    fits: bool
    tokens_per_second: float
    """Once it is warm, where it was tried."""
    hours: float
    trainable: int
    artifact_bytes: int
    batch: int
    """Tokens of an optimizer step."""
    epochs: float
    """Passes over the data."""
    wanted: float
    """Passes that would be made without a deadline."""
    lr: float
    merit: int = 0
    """What rules give it."""
    late: bool = False
    """Whether it ends after the deadline however few passes it makes."""
    past_loss: float | None = None
    """Held-out loss of the best earlier run of its method."""
    train: Mapping[str, Any] = field(default_factory=dict)
    """Dials that rules ask for."""
    reasons: tuple[Words, ...] = ()
    """What rules, runs and tries say of it; ``reasons.of`` adds what its numbers do."""
    measured: Measured | None = None
    tuned: tuple[str, ...] = ()
    """Dials whose values were found by trying, such as ``train.lr``."""
    cold: float = 0.0
    """Seconds of ``hours`` that the first steps take beyond what later ones do, where it was tried."""

    @property
    def method(self) -> str:
        """Its name."""
        return self.choice.method

    @property
    def warmup(self) -> float:
        """Share of the steps over which the rate rises: some forty, which are much of a short run."""
        return round(min(_LONGEST_WARM, max(_LEAST_WARM, _WARM / max(1.0, self.steps))), 2)

    @property
    def steps(self) -> float:
        """Of the optimizer, about."""
        return (self.hours * 3600 - self.cold) * self.tokens_per_second / self.batch

    @property
    def score(self) -> int:
        """What it is ranked by."""
        return self.merit + (_LATE if self.late else 0)

    @property
    def memory(self) -> float:
        """Bytes of a device: measured where it was, else predicted."""
        return self.measured.peak_memory if self.measured and self.measured.here else self.parts.total


def plans(situation: Situation, past: Mapping[str, Measured] | None = None) -> list[Plan]:
    """One for each method, best first: what fits comes before what does not, then what was measured to be best, then
    what rules prefer, then what is fastest.
    """
    past, tasks = past or {}, situation.data.tasks
    names = [name for name in trained.FAMILIES if name != "multi_task" or len(tasks) > 1]
    objective = situation.objective or "sft"
    first = {name: _plan(situation, name, objective, ()) for name in names}
    rules = holding(
        situation, {name for name, plan in first.items() if plan.fits and not plan.placement.offload}
    )
    asked = next((rule.objective for rule in rules if rule.objective), "")
    objective = situation.objective or asked or "sft"
    found = [_told(situation, _plan(situation, name, objective, rules), rules, past) for name in names]
    return ranked(found)


def ranked(found: Iterable[Plan]) -> list[Plan]:
    """Best first. Losses that were measured overrule rules once there are two to compare."""
    found = list(found)
    losses = sorted(plan.past_loss for plan in found if plan.past_loss is not None)
    best = max(plan.score for plan in found)

    def key(plan: Plan) -> tuple[bool, float, float]:
        order = -plan.score
        if plan.past_loss is not None and len(losses) > 1:
            order = -best - len(losses) + losses.index(plan.past_loss)
        return not plan.fits, order, plan.hours

    return sorted(found, key=key)


def _plan(situation: Situation, method: str, objective: str, rules: list[Rule] | tuple[()]) -> Plan:
    data, shape, fleet = situation.data, situation.shape, situation.fleet
    options = {key: value for rule in rules for key, value in rule.options.get(method, {}).items()}
    options |= {"tasks": data.tasks} if method == "multi_task" else {}
    choice = Choice(
        method,
        objective,
        situation.given.precision or ("bf16" if fleet.device.bf16 else "fp16"),
        length=situation.length,
        options=options,
    )
    epochs = _epochs(situation, objective)
    batch = _batch(situation, epochs)
    choice, placement, parts = _placed(situation, choice, batch)
    if not situation.given.batch:
        batch = max(batch, choice.micro_tokens * placement.copies)
    rate = pace(shape, choice, placement, fleet, batch).tokens_per_second
    return Plan(
        choice, placement, parts, fits(parts, fleet.device.memory), rate, data.tokens * epochs / rate / 3600,
        trained.count(method, shape, options), trained.saved_bytes(method, shape, options, choice.precision),
        batch, epochs, epochs, _lr(situation, choice, rules),
    )  # fmt: skip


def _lr(situation: Situation, choice: Choice, rules: Iterable[Rule]) -> float:
    """The method's default, times what the model's size and rules say."""
    factors = [rule.rates.get(choice.method, 1.0) for rule in rules]
    return choice.family.lr * (_FASTER if situation.shape.parameters < _SMALL else 1) * math.prod(factors)


def _epochs(situation: Situation, objective: str) -> float:
    """Passes over the data: one where there is much or where a second would learn pairs by heart."""
    given = situation.given
    if given.steps:
        return given.steps * (given.batch or DEFAULT_BATCH) / max(1, situation.data.tokens)
    if given.epochs:
        return given.epochs
    if objective == "sft" and situation.data.rows < 50_000:
        return 3.0 if situation.data.rows >= 1000 else 5.0
    return 1.0


def _batch(situation: Situation, epochs: float) -> int:
    """Tokens of a step, a power of two: some dozen rows, fewer if there would be too few steps."""
    if situation.given.batch or situation.given.steps:
        return situation.given.batch or DEFAULT_BATCH
    data = situation.data
    rows = _ROWS * data.tokens / max(1, data.rows)
    most = max(_LEAST_BATCH, min(rows, data.tokens * epochs / _STEPS, _MOST_BATCH))
    return max(1 << round(math.log2(most)), _power(situation.length))


def _power(number: int) -> int:
    """The next power of two."""
    return 1 << max(3, math.ceil(math.log2(number)))


def _placed(situation: Situation, choice: Choice, batch: int) -> tuple[Choice, Placement, Parts]:
    """The simplest placement that fits, unless it waits for its links so long that another is twice as fast.

    Where nothing fits it is what comes nearest.
    """
    placements = [
        place
        for place in simplest(situation.shape, situation.fleet)
        if choice.family.within or not place.offload
    ]  # the state of an adapter is too small to be worth moving
    found = [_largest(situation, choice, placement, batch) for placement in placements]
    memory = situation.fleet.device.memory
    fitting = [one for one in found if fits(one[2], memory)]
    if not fitting:
        return min(found, key=lambda one: one[2].total)
    best = fitting[0]
    for one in fitting[1:]:
        if not one[1].offload and _rate(situation, one, batch) > _TWICE * _rate(situation, best, batch):
            best = one
    return best


def _rate(situation: Situation, placed: tuple[Choice, Placement, Parts], batch: int) -> float:
    choice, placement, _ = placed
    return pace(situation.shape, choice, placement, situation.fleet, batch).tokens_per_second


def _largest(
    situation: Situation, choice: Choice, placement: Placement, batch: int
) -> tuple[Choice, Placement, Parts]:
    """With the largest micro-batch that fits, without checkpointing if that is possible; else with the least of all."""
    device = situation.fleet.device
    for option in _options(situation, choice, placement, batch):
        parts = placement.divide(estimate(situation.shape, option, device.process), situation.shape, option)
        if fits(parts, device.memory):
            break
    return option, placement, parts


def _options(situation: Situation, choice: Choice, placement: Placement, batch: int) -> Iterator[Choice]:
    least = _power(situation.length)
    largest = max(least, min(_MOST_MICRO, batch // placement.copies))
    sizes = (
        [least] if situation.goal == "memory" else [largest >> i for i in range(32) if largest >> i >= least]
    )
    for checkpointing in (False, True):
        for size in sizes:
            yield replace(choice, micro_tokens=size, checkpointing=checkpointing)


def _told(situation: Situation, plan: Plan, rules: list[Rule], past: Mapping[str, Measured]) -> Plan:
    """The plan with its score and reasons, and with figures that were measured in place of predicted ones."""
    said = [rule for rule in rules if rule.scores.get(plan.method) or _always(rule)]
    told = [rule.words for rule in sorted(said, key=lambda rule: -rule.scores.get(plan.method, 0))]
    merit = sum(rule.scores.get(plan.method, 0) for rule in rules)
    own = past.get(plan.method)
    if own:
        told.insert(0, reasons.as_measured(own))
        plan = replace(plan, past_loss=own.loss)
        if own.here and situation.fleet.device.here:
            rate = own.tokens_per_second
            hours = situation.data.tokens * plan.epochs / rate / 3600
            plan = replace(plan, tokens_per_second=rate, hours=hours, measured=own)
            plan = replace(
                plan, fits=own.peak_memory <= (1 - MEASURED_HEADROOM) * situation.fleet.device.memory
            )
    train = {key: value for rule in said for key, value in rule.train.items()}
    return in_time(situation, replace(plan, merit=merit, reasons=tuple(told), train=train))


def in_time(situation: Situation, plan: Plan) -> Plan:
    """With as many passes over the data as end by the deadline: one at least, and no more than are wanted without one."""
    if not situation.deadline:
        return plan
    given, per_pass = situation.given, (plan.hours * 3600 - plan.cold) / plan.epochs
    if per_pass and not (given.epochs or given.steps):
        left = situation.deadline - plan.cold
        epochs = min(plan.wanted, max(1.0, math.floor(100 * left / per_pass) / 100))
        plan = replace(plan, epochs=epochs, hours=(epochs * per_pass + plan.cold) / 3600)
    return replace(plan, late=plan.hours * 3600 > situation.deadline)


def _always(rule: Rule) -> bool:
    """Whether it is said of every method: it decides about something else."""
    return bool(rule.objective) or not rule.scores
