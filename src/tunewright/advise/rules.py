"""The rules of the field as data: conditions of a closed vocabulary, never code."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from tunewright.advise.configs import table
from tunewright.advise.memory import ON_POLICY
from tunewright.advise.situation import Situation
from tunewright.core.words import Words

Fitting = Collection[str]
"""Methods of which a plan fits in memory."""
Holds = Callable[[Situation, Fitting, Any], bool]
_GB = 1 << 30


@dataclass(frozen=True)
class Rule:
    """What is said where all conditions hold."""

    id: str
    when: Mapping[str, Any]
    scores: Mapping[str, int]
    words: Words
    source: str
    objective: str = ""
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Method -> options."""
    rates: Mapping[str, float] = field(default_factory=dict)
    """Method -> what its learning rate is multiplied by."""
    train: Mapping[str, Any] = field(default_factory=dict)

    def holds(self, situation: Situation, fitting: Fitting) -> bool:
        """Whether every condition is met."""
        return all(CONDITIONS[name](situation, fitting, value) for name, value in self.when.items())


CONDITIONS: dict[str, Holds] = {
    "goal": lambda s, fitting, value: s.goal == value,
    "kind": lambda s, fitting, value: s.data.kind == value,
    "kind_not": lambda s, fitting, value: s.data.kind != value,
    "rows_below": lambda s, fitting, value: s.data.rows < value,
    "rows_at_least": lambda s, fitting, value: s.data.rows >= value,
    "tasks_below": lambda s, fitting, value: len(s.data.tasks) < value,
    "tasks_at_least": lambda s, fitting, value: len(s.data.tasks) >= value,
    "parameters_below": lambda s, fitting, value: s.shape.parameters < value,
    "parameters_at_least": lambda s, fitting, value: s.shape.parameters >= value,
    "devices_below": lambda s, fitting, value: s.fleet.count < value,
    "device_memory_below": lambda s, fitting, value: s.fleet.device.memory < value * _GB,
    "memory_over_weights": lambda s, fitting, value: s.memory_over_weights > value,
    "experts": lambda s, fitting, value: (s.shape.experts is not None) == value,
    "bf16": lambda s, fitting, value: s.fleet.device.bf16 == value,
    "on_policy": lambda s, fitting, value: (s.objective in ON_POLICY) == value,
    "fits": lambda s, fitting, value: value in fitting,
    "fits_not": lambda s, fitting, value: value not in fitting,
}
"""All that a rule may ask."""


@cache
def rules() -> tuple[Rule, ...]:
    """Those of rules.yaml, in its order."""
    return tuple(
        Rule(
            **{
                **{k: v for k, v in raw.items() if k not in ("en", "zh")},
                "words": Words(raw["en"], raw["zh"]),
            }
        )
        for raw in table("rules.yaml")
    )


def holding(situation: Situation, fitting: Fitting) -> list[Rule]:
    """The rules whose conditions are all met."""
    return [rule for rule in rules() if rule.holds(situation, fitting)]
