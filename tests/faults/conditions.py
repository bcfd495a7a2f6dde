"""What a run could forget between two steps, and where to stop it so that it would."""

import json
import random
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from bounded import LONG
from lab import Lab, learns_labels
from lab_more import Stop, told

from tunewright import jobs, methods, pipeline
from tunewright.core import plugins
from tunewright.data.batching import BatchPlan
from tunewright.methods import Method
from tunewright.objectives import Objective, kind
from tunewright.recipes import TrainConfig
from tunewright.train import guard, ledger

Overrides = tuple[str, ...]
_BOTH = (signal.SIGKILL, signal.SIGTERM)
_HOOKS = ("state", "at_once")
_SCHEDULES = get_args(TrainConfig.model_fields["schedule"].annotation)
_NOISE = (guard.WINDOW + 4, guard.WINDOW + 14)
"""Steps between which a batch of noise comes up, when the others are learned."""


def nothing(lab: Lab, objective: str) -> Overrides:
    """The recipe as it is."""
    return ()


def fixed(*overrides: str) -> Callable[[Lab, str], Overrides]:
    """The same overrides for every objective."""
    return lambda lab, objective: overrides


def anywhere(whole: Path, rng: random.Random, count: int) -> list[Stop]:
    """After steps drawn at random, by SIGKILL and SIGTERM in turn."""
    start = rng.randrange(2)
    return [Stop(rng.randrange(4, 8), _BOTH[(start + i) % 2]) for i in range(count)]


def inside_steps(whole: Path, rng: random.Random, count: int) -> list[Stop]:
    """SIGKILL between two forward passes of one step; where there are more, also between steps."""
    return [Stop(rng.randrange(3, 7), passes=1) for _ in range(count)] + anywhere(whole, rng, count - 1)


def around_an_edge(whole: Path, rng: random.Random, count: int) -> list[Stop]:
    """SIGKILL so that training goes on from the end of an epoch, from one step before it, from one after."""
    edge = _first_epoch(whole)
    return [Stop(edge + 2, besides=(f"train.save_every={edge + offset}",)) for offset in (-1, 0, 1)]


def _first_epoch(whole: Path) -> int:
    """Steps until a sample comes up again."""
    (path,) = whole.glob("stages/*/samples.jsonl")
    seen: set[int] = set()
    before: list[int] = []
    for step, samples in ledger.read(path).items():
        if samples != before and not seen.isdisjoint(
            samples
        ):  # the same ones at once: answers that serve two steps
            return step - 1
        seen.update(samples)
        before = samples
    raise AssertionError("no second epoch")


def after_worse_losses(whole: Path, rng: random.Random, count: int) -> list[Stop]:
    """When a held-out loss was no better than the best, so that the patience is partly used."""
    first = next(e["step"] for e in told(whole, "eval") if not e["best"])
    stops = [Stop(first + 1), Stop(first, signal.SIGTERM, "eval"), Stop(first, signal.SIGKILL, "eval")]
    rng.shuffle(stops)
    return stops[:count]


def stopped_early(whole: Path) -> bool:
    """Whether training ended before its last step, and with the weights of a step before that."""
    last, restored = told(whole, "step")[-1], told(whole, "restore")
    return bool(last["step"] < last["steps"] and restored and restored[0]["step"] < last["step"])


def at_the_spike(whole: Path, rng: random.Random, count: int) -> list[Stop]:
    """When a batch was just passed over: with a checkpoint of that, and with an older one."""
    step = told(whole, "spike")[0]["step"]
    return [Stop(step, signal.SIGTERM, "spike"), Stop(step, signal.SIGKILL, "spike")][:count]


def mixture(lab: Lab, objective: str) -> Overrides:
    """Half as much again of one file, half of another."""
    rows = lab.data(objective).read_text().splitlines(keepends=True)
    files = []
    for name, some, weight in (("one", rows[:20], 1.5), ("other", rows[20:], 0.5)):
        path = lab.folder / f"{name}-{objective}.jsonl"
        path.write_text("".join(some))
        files.append({"path": str(path), "weight": weight})
    return (f"data.train={json.dumps(files)}", "train.epochs=2", "train.max_steps=null")


def noise(lab: Lab, objective: str) -> Overrides:
    """Rows that are much alike, and one of noise that comes up once the others are learned."""
    like = lab.data(objective).read_text().splitlines()[0]
    rows = [json.loads(like.replace("0", str(n))) for n in range(500)]
    words = "".join(chr(random.Random(i).randrange(0x4E00, 0x9FFF)) for i in range(8))
    rows.append({key: value if key == "prompt" else words for key, value in rows[0].items()})
    path = lab.folder / f"noise-{objective}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides: Overrides = (f"data.train={path}", "data.valid_share=0", "method=full", "train.lr=3e-3", "train.save_every=50",
                 "train.eval_every=0", "train.tokens_per_batch=32", f"train.max_steps={_NOISE[1] + 5}")  # fmt: skip
    if "block" in plugins.load("objectives", objective).Config.model_fields:
        overrides = (*overrides, "objective.block=32")  # else the noise would be a small part of a sample
    return (*overrides, f"train.seed={_late_seed(lab.recipe(objective=objective), overrides)}")


def _late_seed(recipe: Path, overrides: Overrides) -> int:
    """A seed whose order brings the last sample late."""
    job = jobs.check(pipeline.load(recipe, overrides))[0]
    for seed in range(1000):
        plan = BatchPlan(job.data.epoch, job.data.lengths, job.stage.train.tokens_per_batch, seed)
        at = next(step for step, batch in enumerate(plan.batches(0), 1) if len(job.data) - 1 in batch)
        if _NOISE[0] <= at <= _NOISE[1]:
            return seed
    raise AssertionError("no seed brings the noise late")


def _methods() -> list[str]:
    """All in the long counts; in the short ones LoRA, full, and those that keep state or let it come and go."""
    names = plugins.names("methods")
    plain = () if LONG else tuple(name for name in names if not _acts(methods.kind(name)))
    return [name for name in names if name in ("full", "lora") or name not in plain]


def _acts(kind: type[Method]) -> bool:
    return any(getattr(kind, hook) is not getattr(Method, hook) for hook in _HOOKS)


def _pairs(one: Sequence[str], other: Sequence[str]) -> list[tuple[str, str]]:
    """Each of the one and each of the other at least once."""
    return [(one[i % len(one)], other[i % len(other)]) for i in range(max(len(one), len(other)))]


@dataclass(frozen=True)
class Condition:
    """What there is to forget: ``overrides`` bring it about, ``came_about`` looks whether they did."""

    name: str
    overrides: Callable[[Lab, str], Overrides] = nothing
    stops: Callable[[Path, random.Random, int], list[Stop]] = anywhere
    applies: Callable[[type[Objective], Any], bool] = lambda objective, config: True
    """Whether an objective, of which the config is given too, can be in it."""
    came_about: Callable[[Path], bool] = lambda whole: True
    of_any: bool = False
    """Whether it is the same whatever the objective: in the short run one of them stands for all."""


CONDITIONS = (
    Condition("dropout", fixed("method.dropout=0.3")),
    Condition(
        "packing", fixed("objective.block=16"), applies=lambda objective, config: "block" in config.model_fields
    ),
    Condition("accumulation", fixed("train.tokens_per_batch=192", "train.micro_tokens=32"), inside_steps),
    Condition("epoch edge", fixed("train.epochs=3", "train.max_steps=null", "train.tokens_per_batch=192"), around_an_edge,
              of_any=True),
    Condition(
        "early stop",  # the first steps at so high a rate make losses worse on any machine
        fixed("train.eval_every=1", "train.early_stop=2", "train.lr=2.0", "train.max_steps=24"),
        after_worse_losses, lambda objective, config: learns_labels(objective), came_about=stopped_early,
    ),
    Condition("mixture", mixture, of_any=True),
    Condition(
        "spike", noise, at_the_spike, lambda objective, config: learns_labels(objective),
        lambda whole: len(told(whole, "spike")) == 1,
    ),
    *(
        Condition(f"{method}, {schedule}", fixed(f"method={method}", f"train.schedule={schedule}", "train.warmup=0.3"),
                  of_any=True)
        for method, schedule in _pairs(_methods(), _SCHEDULES)
    ),
    Condition("gradient checkpointing", fixed("train.gradient_checkpointing=true"), of_any=True),
)  # fmt: skip


def conditions_of(objective: str) -> list[Condition]:
    """All that apply to an objective; in the short run, those that are the same for any are dealt out."""
    objectives, config = plugins.names("objectives"), plugins.load("objectives", objective).Config
    place = objectives.index(objective)
    return [
        condition
        for number, condition in enumerate(CONDITIONS)
        if condition.applies(kind(objective), config)
        and (LONG or not condition.of_any or number % len(objectives) == place)
    ]
