"""What objectives share that learn from answers of the model's own: drawing them, judging them, keeping them.

One question becomes a group of samples, each the question with one answer. Numbers of a sample are kept by their bits,
since samples are integers.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from tunewright.core.config import Config as BaseConfig
from tunewright.core.errors import Problem
from tunewright.core.rng import sow
from tunewright.core.units import chunks
from tunewright.data.rows import Row
from tunewright.data.template import ChatCodec
from tunewright.data.tokens import LENGTH, TASK
from tunewright.models.announce import announced
from tunewright.models.generate import Draw, draw, text
from tunewright.models.likelihood import IGNORED, token_losses
from tunewright.models.memory import fitting
from tunewright.objectives import OTHERS, Batch, Objective, Other, Sample, Turn, origin
from tunewright.objectives import _rewards as rewards
from tunewright.objectives._causal import pad

_QUESTION, _REFERENCE, _ADVANTAGE, _REWARD, _BEFORE = "question", "reference", "advantage", "reward", "before"
Found = TypeVar("Found")

_AT_ONCE = 128
"""Answers drawn together, unless memory asks for fewer."""
_LOOKED_AT = 16
"""Answers that the model is passed over together."""


class DrawConfig(BaseConfig):
    """How answers are drawn and judged."""

    rewards: tuple[str, ...] = Field(("exact_match",), min_length=1)
    """exact_match, contains, brevity; stage:NAME or model:FOLDER for a reward model; or FILE.py:FUNCTION, which is given
    the question with its row's answer, and an answer, and returns a number."""
    weights: tuple[float, ...] = ()
    """Of the rewards, in their order; 1 each if not given."""
    group: int = Field(8, ge=2)
    """Answers drawn for each question."""
    longest: int = Field(64, ge=1)
    """Of an answer, in tokens."""
    temperature: float = Field(1.0, gt=0)
    """Below 1 likely tokens are drawn more often still."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Tokens are drawn from the most likely ones that together have this probability."""
    steps_per_draw: int = Field(1, ge=1)
    """Optimizer steps that learn from the same answers."""

    @model_validator(mode="after")
    def _weighed(self) -> "DrawConfig":
        if self.weights and len(self.weights) != len(self.rewards):
            raise ValueError(f"{len(self.rewards)} rewards, but {len(self.weights)} weights")
        return self


class Policy(Objective):
    """A subclass says what a group's rewards are worth, and what is minimised."""

    @property
    def explores(self) -> bool:
        """Always."""
        return True

    def __init__(self, config: Any, codec: ChatCodec) -> None:
        super().__init__(config, codec)
        self._rewards = rewards.find(config.rewards, judges=True)
        self._drawn: list[Sample] = []
        self._figures: dict[str, float] = {}

    @property
    def is_changing(self) -> bool:
        """Each step draws its own answers."""
        return True

    @property
    def reuse(self) -> int:
        """As the recipe says."""
        return int(self.config.steps_per_draw)

    def others(self) -> list[Other]:
        """Of its rewards, those that are models."""
        models = (name for name in self.config.rewards if name.startswith(OTHERS))
        return [Other(name, "objective.rewards") for name in models]

    def sizes(self, lengths_N: np.ndarray) -> np.ndarray:
        """A whole group, its answers as long as they may be."""
        sizes: np.ndarray = self.config.group * (lengths_N + self.config.longest)
        return sizes

    def encode(self, rows: Iterable[Row]) -> Iterator[Sample | Problem]:
        """``input_ids`` int32 [P]: the question; ``question`` and ``reference`` uint8: its text and its row's answer."""
        return (self._asking(row) for row in rows)

    def _asking(self, row: Row) -> Sample | Problem:
        made = question(self.codec, row, self.config.longest)
        if isinstance(made, Problem):
            return made
        reference = row.messages[-1].content if row.answered else row.chosen
        return {**made, _QUESTION: _bytes(row.prompt[-1].content), _REFERENCE: _bytes(reference)}

    def explore(self, model: Any, samples: list[Sample], turn: Turn) -> list[Sample]:
        """The groups of this step, drawn now or in a step before."""
        if turn.step % self.reuse == 0 or not self._drawn:
            sow(turn.seed, "draw", turn.step)
            self._drawn = self._groups(model, samples)
        return self._drawn

    def _groups(self, model: Any, samples: list[Sample]) -> list[Sample]:
        answers, table_NR, worth_PG = self._answered(model, samples)
        self._figures = self._told(table_NR, worth_PG, answers)
        of = [sample for sample in samples for _ in range(self.config.group)]
        each = zip(of, answers, self.advantages(worth_PG).ravel(), worth_PG.ravel(), strict=True)
        found = [self._sample(*four) for four in each]
        return self.looked_at(model, lambda: self.remembered(model, found))

    def _answered(self, model: Any, samples: list[Sample]) -> tuple[list[list[int]], np.ndarray, np.ndarray]:
        """Answers [P x G], each one's rewards [P x G, R], and their weighted sums [P, G]."""
        config = self.config
        how = Draw(config.group, config.longest, config.temperature, config.top_p)
        prompts = [sample["input_ids"].tolist() for sample in samples]
        answers = fitting(_AT_ONCE, config.group, lambda size: self._draw(model, samples, prompts, how, size))
        asked = [
            rewards.Asked(_words(sample[_QUESTION]), _words(sample[_REFERENCE]))
            for sample in samples for _ in range(config.group)
        ]  # fmt: skip
        said = [text(self.codec, ids) for ids in answers]
        table_NR = rewards.worth(config.rewards, self._rewards, self.asked, asked, said)
        worth_N = table_NR @ np.array(config.weights or (1.0,) * len(config.rewards))
        return answers, table_NR, worth_N.reshape(len(samples), config.group)

    def _draw(
        self, model: Any, samples: list[Sample], prompts: list[list[int]], how: Draw, size: int
    ) -> list[list[int]]:
        tasks = torch.tensor([int(s[TASK][0]) if TASK in s else 0 for s in samples]).repeat_interleave(
            how.count
        )
        if not tasks.any():
            return draw(model, self.codec, prompts, how, size)
        answers: list[list[int]] = []
        for sample, ids in zip(samples, prompts, strict=True):  # adapters differ by question
            with announced(model, {TASK: torch.tensor([int(sample[TASK][0])] * how.count)}):
                answers += draw(model, self.codec, [ids], how, size)
        return answers

    def _told(self, table_NR: np.ndarray, worth_PG: np.ndarray, answers: list[list[int]]) -> dict[str, float]:
        each = {f"reward.{n}": float(x) for n, x in zip(self.config.rewards, table_NR.mean(0), strict=True)}
        ended = np.mean([bool(ids) and ids[-1] in self.codec.stop_ids for ids in answers])
        return {
            "reward": float(worth_PG.mean()), "reward_spread": float(worth_PG.std(1).mean()),
            "answer_tokens": float(np.mean([len(ids) for ids in answers])), "ended": float(ended),
            **(each if len(each) > 1 else {}),
        }  # fmt: skip

    def _sample(self, asked: Sample, answer: list[int], advantage: float, reward: float) -> Sample:
        kept = {name: asked[name] for name in ("input_ids", TASK) if name in asked}
        return {**answered(kept, answer), _ADVANTAGE: bits([advantage]), _REWARD: bits([reward])}

    def looked_at(self, model: Any, work: Callable[[], Found]) -> Found:
        """What ``work`` finds of the model without dropout or gradients."""
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                return work()
        finally:
            model.train(was_training)

    def remembered(self, model: Any, found: list[Sample]) -> list[Sample]:
        """With each token's log-probability as it is now, for steps when it will have changed."""
        if self.reuse == 1:
            return found
        said = self.per_token(model, found, lambda batch: -token_losses(model, batch))
        return [{**sample, _BEFORE: bits(said_A)} for sample, said_A in zip(found, said, strict=True)]

    def per_token(
        self, model: Any, found: Sequence[Sample], numbers_of: Callable[[Batch], Tensor]
    ) -> list[np.ndarray]:
        """Of each sample the numbers [A] of its answer's tokens, given those [N] of a batch, row by row."""
        device, each = next(model.parameters()).device, list[np.ndarray]()
        for some in chunks(found, _LOOKED_AT):
            batch = self.batch(some, device)
            with announced(model, batch):
                flat = np.array(numbers_of(batch).double().tolist())
            ends = np.cumsum([int(sample["learned"].sum()) for sample in some])
            each += np.split(flat, ends[:-1])
        return each

    def judged(self, model: Any, samples: list[Sample]) -> dict[str, float]:
        """What answers drawn now are worth; the loss is their mean reward, negative."""
        sow(0, "judge")
        answers, table_NR, worth_PG = self._answered(model, samples)
        figures = self._told(table_NR, worth_PG, answers)
        return {"loss": -figures["reward"], **figures}

    @abstractmethod
    def advantages(self, rewards_PG: np.ndarray) -> np.ndarray:
        """How much better each answer [P, G] is than was to be expected of its question."""

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """``input_ids`` and ``labels`` [B, T], ``advantage`` [B]; ``before`` [N] where answers serve several steps.

        Questions that nothing was answered to yet have labels throughout, for those who look at data beforehand.
        """
        samples = [
            s if "learned" in s else {**s, "learned": np.ones(len(s["input_ids"]), np.uint8)} for s in samples
        ]
        lengths_B = torch.tensor([len(s["input_ids"]) for s in samples])
        batch = {LENGTH: lengths_B, **pad(samples, self.codec.pad_id)}
        if _ADVANTAGE in samples[0]:
            batch[_ADVANTAGE] = torch.from_numpy(np.concatenate([numbers(s[_ADVANTAGE]) for s in samples]))
        if _BEFORE in samples[0]:
            batch[_BEFORE] = torch.from_numpy(np.concatenate([numbers(s[_BEFORE]) for s in samples]))
        return batch

    def state(self) -> dict[str, Tensor]:
        """The answers that further steps will learn from."""
        if self.reuse == 1 or not self._drawn:
            return {}
        names = list(self._drawn[0])
        flat = {f"drawn.{n}": torch.from_numpy(np.concatenate([s[n] for s in self._drawn])) for n in names}
        counts = {f"counts.{n}": torch.tensor([len(s[n]) for s in self._drawn]) for n in names}
        figures = {
            f"figure.{n}": torch.tensor(value, dtype=torch.float64) for n, value in self._figures.items()
        }
        return {**flat, **counts, **figures}

    def set_state(self, state: dict[str, Tensor]) -> None:
        """Take them back."""
        kinds = ("drawn.", "counts.", "figure.")
        super().set_state({name: x for name, x in state.items() if not name.startswith(kinds)})
        names = [name.removeprefix("counts.") for name in state if name.startswith("counts.")]
        parts = {
            n: np.split(state[f"drawn.{n}"].numpy(), np.cumsum(state[f"counts.{n}"].numpy())[:-1])
            for n in names
        }
        self._drawn = [
            dict(zip(names, some, strict=True)) for some in zip(*(parts[n] for n in names), strict=True)
        ]
        self._figures = {
            n.removeprefix("figure."): float(x) for n, x in state.items() if n.startswith("figure.")
        }


class Grouped(Policy):
    """Answers as wholes: an answer has one advantage, which all its tokens share."""

    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Of the drawn answers; figures of them all."""
        labels_BT = batch["labels"]
        rows_N = (labels_BT != IGNORED).nonzero()[:, 0]
        now_N = -token_losses(model, batch)
        before_N = batch.get(_BEFORE, now_N.detach())
        loss, figures = self.improved(now_N, before_N, rows_N, batch[_ADVANTAGE])
        return loss, {**self._figures, **figures}

    @abstractmethod
    def improved(
        self, now_N: Tensor, before_N: Tensor, rows_N: Tensor, advantages_B: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss, of tokens' log-probabilities now and when they were drawn, and the rows they are of."""


def question(codec: ChatCodec, row: Row, longest: int) -> Sample | Problem:
    """``input_ids`` int32 [P] of a row's question, with room for an answer of ``longest`` tokens behind it."""
    turns = row.prompt
    if not turns or turns[-1].role != "user":
        return Problem(row.where, "no question to answer", "give it a prompt")
    ids, room = codec.prompt(turns, row.tools), codec.max_length - longest
    if len(ids) > room:
        what = f"a question of {len(ids)} tokens, at most {room} fit beside an answer of {longest}"
        return Problem(row.where, what, "raise data.max_length, lower objective.longest or shorten the row")
    return {"input_ids": np.array(ids, np.int32), **origin(row.where)}


def answered(asked: Sample, answer: list[int]) -> Sample:
    """A question with an answer, which alone is learned."""
    prompt = asked["input_ids"]
    return {
        **asked, "input_ids": np.concatenate([prompt, np.array(answer, np.int32)]),
        "learned": np.concatenate([np.zeros(len(prompt), np.uint8), np.ones(len(answer), np.uint8)]),
    }  # fmt: skip


def _bytes(words: str) -> np.ndarray:
    return np.frombuffer(words.encode(), np.uint8)


def _words(code: np.ndarray) -> str:
    return bytes(np.asarray(code, np.uint8)).decode()


def bits(values: Any) -> np.ndarray:
    """Numbers as integers of the same bits."""
    found: np.ndarray = np.asarray(values, np.float32).view(np.int32)
    return found


def numbers(code: np.ndarray) -> np.ndarray:
    """The numbers whose bits these are."""
    found: np.ndarray = np.asarray(code, np.int32).view(np.float32)
    return found
