"""Where a training runs: how its memory is divided over devices, and what that sends between them."""

from collections.abc import Iterator
from dataclasses import dataclass

from tunewright.advise import trained
from tunewright.advise.hardware import Fleet
from tunewright.advise.memory import HELD, Choice, Parts, layer_bytes
from tunewright.advise.shape import Shape

HEADROOM = 0.1
"""Share of a device's memory that a plan leaves free: allocators lose some, and formulas are not exact."""
MEASURED_HEADROOM = 0.05
"""The same where the peak was measured here."""


@dataclass(frozen=True)
class Placement:
    """``devices`` = data-parallel copies x ``tensor`` x ``pipeline``.

    ``zero``: 0 divides nothing among copies, 2 gradients and optimizer, 3 the weights too (Rajbhandari et al. 2020,
    arXiv:1910.02054); 3 is what PyTorch calls fully sharded (Zhao et al. 2023, arXiv:2304.11277).
    """

    devices: int = 1
    zero: int = 0
    tensor: int = 1
    pipeline: int = 1
    offload: bool = False
    """Whether masters and moments lie in the host's memory (Ren et al. 2021, arXiv:2101.06840)."""

    @property
    def copies(self) -> int:
        """Data-parallel copies of the model."""
        return self.devices // (self.tensor * self.pipeline)

    @property
    def name(self) -> str:
        """As people call it."""
        split = f"tensor {self.tensor}" if self.tensor > 1 else ""
        split += f" x pipeline {self.pipeline}" if self.pipeline > 1 else ""
        data = ("zero3" if self.zero == 3 else f"zero{self.zero}") if self.zero else "ddp"
        data = "" if self.copies == 1 else data + (f" x {self.copies}" if split else "")
        told = " + ".join(filter(None, (split, data))) or "single"
        return told + (" + offload" if self.offload else "")

    def divide(self, parts: Parts, shape: Shape, choice: Choice) -> Parts:
        """What one device holds.

        Tensor parallelism divides weights and, with the sequence divided too, activations (Korthikanti et al. 2022,
        arXiv:2205.05198, section 4.2.2). A pipeline divides weights; its first stage keeps as many micro-batches as
        there are stages, so activations stay (section 4.2.3).
        """
        split = self.tensor * self.pipeline
        states = split * (self.copies if self.zero else 1)
        weights = split * (self.copies if self.zero == 3 else 1)
        gathered = 2 * layer_bytes(shape, choice) / split if self.zero == 3 and self.copies > 1 else 0.0
        found = parts.scaled(
            weights=1 / weights, gradients=1 / states, optimizer=0 if self.offload else 1 / states,
            activations=1 / self.tensor, logits=1 / self.tensor, cache=1 / split, evaluation=1 / self.tensor,
        )  # fmt: skip
        return Parts(**{**vars(found), "weights": found.weights + gathered})

    def traffic(self, shape: Shape, choice: Choice, passes: int) -> float:
        """Bytes that a device sends in a step of ``passes`` micro-batches, without those of tensor parallelism.

        All-reduce sends a number twice, reduce-scatter and all-gather once each (Rajbhandari et al. 2020, section
        7): gradients once a step; ZeRO-3 gathers the weights twice for every micro-batch, before both passes. What
        is offloaded goes to the host and back.
        """
        held, split = HELD[choice.precision], self.tensor * self.pipeline
        count = trained.count(choice.method, shape, choice.options) / split
        share = (self.copies - 1) / self.copies
        sent = 2 * held.gradient * count * share
        if self.zero == 3:
            sent += 2 * passes * HELD[choice.precision].weight * shape.parameters / split * share
        return sent

    def tensor_traffic(self, shape: Shape, choice: Choice) -> float:
        """Bytes that a device sends for a micro-batch: four all-reduces of a block's output in each block.

        Shoeybi et al. 2019, arXiv:1909.08053, section 3.
        """
        if self.tensor == 1:
            return 0.0
        output = choice.micro_tokens * shape.hidden * HELD[choice.precision].activation
        return 4 * 2 * output * (self.tensor - 1) / self.tensor * shape.layers / self.pipeline

    def bubble(self, passes: int) -> float:
        """Share of a step in which pipeline stages wait (Narayanan et al. 2021, arXiv:2104.04473, section 2.2)."""
        return (self.pipeline - 1) / (passes + self.pipeline - 1)


def fits(parts: Parts, memory: int) -> bool:
    """Whether it leaves the head-room free."""
    return parts.total <= (1 - HEADROOM) * memory


def simplest(shape: Shape, fleet: Fleet) -> Iterator[Placement]:
    """Placements that use the whole fleet, simplest first."""
    if fleet.count == 1:
        yield Placement()
        if (
            not fleet.device.here or fleet.device.link != fleet.device.bandwidth
        ):  # else there is no other memory
            yield Placement(offload=True)
        return
    for zero in (0, 2, 3):
        yield Placement(fleet.count, zero)
    yield from _split(shape, fleet)
    yield Placement(fleet.count, 3, offload=True)


def _split(shape: Shape, fleet: Fleet) -> Iterator[Placement]:
    """Tensor parallelism inside a node; over nodes, a pipeline."""
    tensor = max((n for n in (2, 4, 8) if fleet.node % n == 0 and shape.kv_heads % n == 0), default=1)
    if tensor == 1:
        return
    nodes = fleet.count // tensor
    if nodes * tensor != fleet.count:
        return
    yield Placement(fleet.count, 2 if nodes > 1 else 0, tensor)
    for stages in (2, 4, 8, 16):
        if nodes % stages == 0 and shape.layers % stages == 0:
            yield Placement(fleet.count, 2 if nodes > stages else 0, tensor, stages)
