"""How fast training goes: operations of a token over what devices do, and what they must send meanwhile."""

from dataclasses import dataclass

from tunewright.advise.hardware import Fleet
from tunewright.advise.memory import HELD, ON_POLICY, Choice, estimate
from tunewright.advise.placement import Placement
from tunewright.advise.shape import Shape
from tunewright.advise.trained import count


@dataclass(frozen=True)
class Pace:
    """What a plan's speed is made of."""

    tokens_per_second: float
    """Of all devices together."""
    operations: float
    """For a token."""
    waiting: float
    """Share of the time in which devices neither compute nor draw: they send, or wait for a stage."""


def operations(shape: Shape, choice: Choice) -> float:
    """Of one token, forwards and backwards.

    Kaplan et al. 2020 (arXiv:2001.08361, section 2.1) and Chowdhery et al. 2022 (arXiv:2204.02311, appendix B): 2 for
    each weight forwards, 2 for the gradient of its input, 2 for its own if it is trained, and ``12·L·h·s`` for
    attention. A pass backwards ends at the first block that is trained; checkpointing makes the pass forwards twice.
    Adapters add 6 for each of their own numbers.
    """
    family = choice.family
    weights, attention = (
        2.0 * shape.multiplied,
        4.0 * shape.layers * shape.heads * shape.head_size * choice.length,
    )
    forwards = weights + attention
    back = (weights + 2 * attention) * family.reaches
    if choice.method == "full":
        own = weights
    elif choice.method == "partial":
        own = weights * family.reaches
    else:
        own = 6.0 * _own(shape, choice)
    again = forwards * family.reaches if choice.checkpointing else 0.0
    asked = forwards if choice.objective in ("dpo", "kto", *ON_POLICY) else 0.0
    return forwards + back + own + again + asked


def _own(shape: Shape, choice: Choice) -> float:
    """Numbers of an adapter that each token is multiplied by; prompts and prefixes are longer input instead."""
    return 0.0 if choice.method in ("prompt", "prefix") else count(choice.method, shape, choice.options)


def pace(shape: Shape, choice: Choice, placement: Placement, fleet: Fleet, batch: int) -> Pace:
    """Tokens a second of the fleet for optimizer steps of ``batch`` tokens.

    Work and traffic of data parallelism overlap, so the longer one counts; that of tensor parallelism does not.
    Devices reach a share of their rate that devices.yaml gives, with its source. Answers that are drawn are bound by
    reading the weights once a token for all of them.
    """
    device = fleet.device
    rate = device.rate * device.utilisation / choice.family.pace
    split = placement.tensor * placement.pipeline
    passes = max(1, round(batch / (choice.micro_tokens * placement.copies)))
    tokens = passes * choice.micro_tokens
    work = tokens * operations(shape, choice) / split / rate
    link = device.link if placement.devices <= fleet.node else fleet.between
    sending = placement.traffic(shape, choice, passes) / link if placement.copies > 1 else 0.0
    inside = passes * placement.tensor_traffic(shape, choice) / device.link
    hosted = _hosted(shape, choice, placement)
    drawing = _drawing(shape, choice, tokens, fleet, placement)
    busy = (work + inside + drawing) / (1 - placement.bubble(passes))
    seconds = max(busy, sending) + hosted
    waiting = 1 - (work + drawing) / seconds
    return Pace(tokens * placement.copies / seconds, operations(shape, choice), waiting)


_HOST_LINK = 32e9
"""Bytes a second to the host's memory: PCIe 4.0 x16, one way."""


def _hosted(shape: Shape, choice: Choice, placement: Placement) -> float:
    """Seconds of a step in which gradients go to the host and weights come back."""
    if not placement.offload:
        return 0.0
    held = HELD[choice.precision]
    sent = (held.gradient + held.weight) * count(choice.method, shape, choice.options) / placement.devices
    return sent / _HOST_LINK


def _drawing(shape: Shape, choice: Choice, tokens: int, fleet: Fleet, placement: Placement) -> float:
    """Seconds in which answers of ``tokens`` are drawn, a token of each at a time (Pope et al. 2022, arXiv:2211.05102)."""
    if choice.objective not in ON_POLICY:
        return 0.0
    read = estimate(shape, choice).weights / (placement.tensor * placement.pipeline)
    return tokens / choice.answers * read / fleet.device.bandwidth
