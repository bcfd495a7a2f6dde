"""Passes before the first step that are not learned from: whether memory is enough for the widest, how fast sizes are."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tunewright.methods import Clock
from tunewright.models.memory import is_out_of_memory
from tunewright.objectives import Objective
from tunewright.train.feed import Feed
from tunewright.train.lesson import Lesson
from tunewright.train.passes import Accumulator


@dataclass(frozen=True)
class Rehearsal:
    """Of the step that the clock shows."""

    feed: Feed
    objective: Objective
    passes: Accumulator
    clock: Clock

    def seconds(self, budget: int) -> float:
        """What a typical step's passes take in parts of so many tokens; infinity if memory does not allow that."""
        parts = Lesson(self.feed, self.feed.typical()).batches(budget)
        began = time.perf_counter()
        try:
            with self._unlearned():
                self.passes.over(parts, self.clock)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return math.inf
        return time.perf_counter() - began

    def widest(self, budget: int) -> None:
        """Learn from the part of so many tokens that takes most memory."""
        with self._unlearned():
            self.passes.over([self.feed.batch(self.feed.widest(budget))], self.clock)

    @contextmanager
    def _unlearned(self) -> Iterator[None]:
        """Passes within leave no trace."""
        declared = {name: tensor.clone() for name, tensor in self.objective.state().items()}
        try:
            yield
        finally:
            self.passes.optimizer.drop()
            self.objective.set_state(declared)
