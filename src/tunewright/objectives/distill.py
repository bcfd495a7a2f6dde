"""Distillation: a student learns what a larger teacher makes of each token (Hinton et al. 2015; Agarwal et al. 2024)."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tunewright.core import store
from tunewright.core.config import Config as BaseConfig
from tunewright.core.errors import DataError, Problem
from tunewright.core.paths import cache_folder
from tunewright.core.rng import sow
from tunewright.core.words import Words
from tunewright.data import tokens
from tunewright.data.rows import Row
from tunewright.data.template import ChatCodec
from tunewright.data.tokens import LENGTH
from tunewright.models import likelihood
from tunewright.models.generate import Draw, draw
from tunewright.models.likelihood import IGNORED
from tunewright.models.memory import fitting
from tunewright.objectives import OTHERS, Batch, Facts, Other, Sample, Turn, sft
from tunewright.objectives._causal import Causal
from tunewright.objectives._divergence import ROWS, Kind, Logits, divergences, with_rest
from tunewright.objectives._policy import answered, question

_NUMBER = "number"
_TABLE, _ANSWERS = "teacher.table", "answers."
_AT_ONCE = 64
"""Answers drawn together, unless memory asks for fewer."""


class Config(BaseConfig):
    """Who teaches, on which answers, and how."""

    teacher: str = ""
    """stage:NAME, or model:NAME for a model, an adapter or a finished run; its tokenizer must be the student's."""
    answers: Literal["given", "teacher", "own"] = "given"
    """given: those of the data. teacher: its own to the data's questions (Kim & Rush 2016). own: the student's, drawn
    anew at each step, so that it learns from its mistakes (on-policy, Agarwal et al. 2024)."""
    divergence: Kind = "forward"
    """forward: what the teacher says, the student must be able to say. reverse: the student says only what the teacher
    would. jensen_shannon: between them."""
    mixture: float = Field(0.5, gt=0, lt=1)
    """The teacher's share in jensen_shannon's mixture."""
    temperature: float = Field(1.0, gt=0)
    """Above 1 unlikely words count more."""
    top: int = Field(0, ge=0)
    """So many of the teacher's words are kept for each token, on disk, and it is asked once; 0 asks it at every step."""
    hard: float = Field(0.0, ge=0, le=1)
    """The share of ordinary cross-entropy on the answers' tokens; 1 learns the answers alone."""
    longest: int = Field(64, ge=1)
    """Of an answer that is drawn, in tokens."""

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        if not self.teacher.startswith(OTHERS):
            raise ValueError(f"needs a teacher, stage:NAME or model:NAME, found {self.teacher!r}")
        if self.top and self.answers != "given":
            raise ValueError("top keeps what the teacher says of given answers; these are drawn")
        return self


class Distill(Causal):
    """Draws the student's distribution of words to the teacher's at every token of an answer."""

    is_likelihood = False
    facts = Facts(
        idea=Words(
            "A smaller model learns a larger one's distribution of words at every token of an answer.",
            "小模型在回答的每个词元上学习大模型的词分布。",
        ),
        formula="(1 − h)·T²·D(softmax(z_teacher/T) ‖ softmax(z/T)) + h·cross-entropy, a token's mean",
        dials=Words(
            "answers first: given is cheapest, own is the best for a student that must speak alone; reverse or jensen_shannon with own; top 50 where the teacher is slow; temperature 1 to 2.",
            "首先是 answers：given 最省，own 最适合要独立作答的学生；own 宜配 reverse 或 jensen_shannon；教师较慢时取 top 50；temperature 取 1 到 2。",
        ),
        watch=Words(
            "divergence falls; cross_entropy on held-out answers comes near the teacher's.",
            "divergence 下降；留出回答上的 cross_entropy 接近教师。",
        ),
        when=Words(
            "A good model is too large to serve, and a smaller one of the same tokenizer is at hand.",
            "好模型太大无法部署，且有同一分词器的小模型时。",
        ),
        paper="Hinton et al. 2015, arXiv:1503.02531; Kim & Rush 2016, arXiv:1606.07947; Agarwal et al. 2024, arXiv:2306.13649",
    )

    def __init__(self, config: Any, codec: ChatCodec) -> None:
        super().__init__(config, codec)
        self._given = sft.Sft(sft.Config(), codec)
        self._answers: dict[int, list[int]] = {}
        self._key, self._kept = "", dict[int, int]()
        self._table: Sequence[Sample] = ()

    @property
    def explores(self) -> bool:
        """Unless answers are given."""
        return bool(self.config.answers != "given")

    @property
    def is_changing(self) -> bool:
        """The student's own answers are drawn anew each time."""
        return bool(self.config.answers == "own")

    def others(self) -> list[Other]:
        """The teacher."""
        return [Other(self.config.teacher, "objective.teacher", speaks=True)]

    @property
    def _teacher(self) -> Any:
        return self.asked[self.config.teacher]()

    def sizes(self, lengths_N: np.ndarray) -> np.ndarray:
        """With an answer as long as it may be, where it is to be drawn."""
        return lengths_N + (self.config.longest if self.explores else 0)

    def encode(self, rows: Iterable[Row]) -> Iterator[Sample | Problem]:
        """As ``sft``, or questions alone; ``number`` int64 [1] follows from the tokens."""
        made = (
            (question(self.codec, row, self.config.longest) for row in rows)
            if self.explores
            else self._given.encode(rows)
        )
        return (item if isinstance(item, Problem) else {**item, _NUMBER: _number(item)} for item in made)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Also ``number`` and ``length`` [B]; a question that is not answered yet has labels throughout."""
        all_learned = ({**s, "learned": np.ones(len(s["input_ids"]), np.uint8)} for s in samples)
        samples = samples if "learned" in samples[0] else list(all_learned)
        return {
            LENGTH: torch.tensor([len(s["input_ids"]) for s in samples]),
            _NUMBER: torch.tensor([int(s[_NUMBER][0]) for s in samples]), **super().collate(samples),
        }  # fmt: skip

    def begin(self, model: Any, batches: Iterable[Batch]) -> None:
        """Let the teacher answer all questions, or keep the likeliest words of all answers, where that is asked for."""
        if self.config.answers == "teacher":
            for batch in batches:
                rows = zip(batch["input_ids"].tolist(), batch[LENGTH].tolist(), strict=True)
                self._answer(batch[_NUMBER].tolist(), [ids[:length] for ids, length in rows])
        elif self.config.top:
            self._keep(batches)

    def explore(self, model: Any, samples: list[Sample], turn: Turn) -> list[Sample]:
        """With the teacher's answers, or the student's."""
        if self.config.answers == "teacher":
            return self._answered(samples)
        sow(turn.seed, "draw", turn.step)
        return self._drawn(model, samples)

    def judged(self, model: Any, samples: list[Sample]) -> dict[str, float]:
        """Of held-out questions: the loss on the teacher's answers, or on some that the student draws."""
        if self.config.answers == "teacher":
            found = self._answered(samples)
        else:
            sow(0, "judge")
            found = self._drawn(model, samples)
        loss, figures = self.loss(model, self.batch(found, next(model.parameters()).device))
        return {"loss": loss.item(), **figures}

    def _drawn(self, model: Any, samples: list[Sample]) -> list[Sample]:
        prompts = [sample["input_ids"].tolist() for sample in samples]
        how = Draw(1, self.config.longest)
        answers = fitting(_AT_ONCE, 1, lambda size: draw(model, self.codec, prompts, how, size))
        return [answered(sample, ids) for sample, ids in zip(samples, answers, strict=True)]

    def _answered(self, samples: list[Sample]) -> list[Sample]:
        numbers = [int(sample[_NUMBER][0]) for sample in samples]
        self._answer(numbers, [sample["input_ids"].tolist() for sample in samples])
        return [answered(s, self._answers[number]) for s, number in zip(samples, numbers, strict=True)]

    def _answer(self, numbers: list[int], prompts: list[list[int]]) -> None:
        """Ask the teacher what it was not asked yet; greedy answers."""
        new = {n: ids for n, ids in zip(numbers, prompts, strict=True) if n not in self._answers}
        if not new:
            return
        how, asked, teacher = Draw(1, self.config.longest, temperature=0.0), list(new.values()), self._teacher
        found = fitting(_AT_ONCE, 1, lambda size: draw(teacher.model, teacher.codec, asked, how, size))
        self._answers |= zip(new, found, strict=True)

    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """A token's mean; figures of both parts of it."""
        labels_N = batch["labels"][batch["labels"] != IGNORED]
        rows, words = likelihood.words(model, batch)
        taught = self._taught(batch)
        parts = [
            checkpoint(self._part, words, some, labels, told, use_reentrant=False)
            for some, labels, told in zip(
                *(torch.split(x, ROWS) for x in (rows, labels_N)), taught, strict=True
            )
        ]  # fmt: skip
        apart, entropy = torch.stack(parts).sum(0) / len(labels_N)
        hard, softness = self.config.hard, self.config.temperature**2
        return (1 - hard) * softness * apart + hard * entropy, {
            "divergence": float(apart.detach()), "cross_entropy": float(entropy.detach()),
        }  # fmt: skip

    def _part(self, words: Logits, rows: Tensor, labels_N: Tensor, taught: "_Taught") -> Tensor:
        """Sums of the divergence and of cross-entropy."""
        logits_NV = words(rows).float()
        student_NV = (logits_NV / self.config.temperature).log_softmax(-1)
        teacher_NV, student_NV = taught.beside(student_NV, self.config.temperature)
        apart_N = divergences(self.config.divergence, self.config.mixture, teacher_NV, student_NV)
        return torch.stack([apart_N.sum(), F.cross_entropy(logits_NV, labels_N, reduction="sum")])

    def _taught(self, batch: Batch) -> Iterator["_Taught"]:
        """What the teacher says, of some rows at a time."""
        if self.config.top and all(int(number) in self._kept for number in batch[_NUMBER]):
            kept = [self._table[self._kept[int(number)]] for number in batch[_NUMBER]]
            count, device = sum(len(one["input_ids"]) for one in kept), batch["labels"].device
            ids_NK, logs_NK = (
                torch.from_numpy(np.concatenate([one[name] for one in kept])).view(count, -1).to(device)
                for name in ("words", "logs")
            )
            parts = zip(torch.split(ids_NK, ROWS), torch.split(logs_NK, ROWS), strict=True)
            return (_Some(ids.long(), logs.float()) for ids, logs in parts)
        with torch.no_grad():
            rows, words = likelihood.words(self._teacher.model, batch)
        return (_All(words, some) for some in torch.split(rows, ROWS))

    def _keep(self, batches: Iterable[Batch]) -> None:
        """The teacher's likeliest words of every token, in the cache, by what they follow from; read through twice."""
        numbers = [int(number) for batch in batches for number in batch[_NUMBER]]
        config, teacher = self.config, self._teacher
        told = [
            teacher.sha256,
            config.top,
            config.temperature,
            str(teacher.model.dtype),
            sorted(set(numbers)),
        ]
        key = store.sha256_json(told)
        if not store.is_complete(_place(key)):
            tokens.write(_place(key), self._likeliest(batches), lambda: {"teacher": config.teacher})
        self._open(key)

    def _likeliest(self, batches: Iterable[Batch]) -> Iterator[Sample]:
        with torch.no_grad():
            for batch in batches:
                rows, words = likelihood.words(self._teacher.model, batch)
                found = [_All(words, some).likeliest(self.config) for some in torch.split(rows, ROWS)]
                logs_NK, ids_NK = (torch.cat(each).cpu() for each in zip(*found, strict=True))
                counts = (batch["labels"] != IGNORED).sum(1).tolist()
                parts = zip(
                    batch[_NUMBER], torch.split(ids_NK, counts), torch.split(logs_NK, counts), strict=True
                )
                for number, ids, logs in parts:
                    yield {
                        "input_ids": np.zeros(len(ids), np.int32), _NUMBER: np.array([int(number)], np.int64),
                        "words": ids.int().numpy().ravel(), "logs": logs.half().numpy().ravel(),
                    }  # fmt: skip

    def _open(self, key: str) -> None:
        self._key, self._table = key, (table := tokens.TokenTable(_place(key)))
        self._kept = {number: place for place, number in enumerate(table.column(_NUMBER).tolist())}

    def state(self) -> dict[str, Tensor]:
        """The teacher's answers, or where its words are."""
        if self._key:
            return {_TABLE: torch.tensor(list(self._key.encode()), dtype=torch.uint8)}
        if not self._answers or not self.explores:
            return {}
        flat = [token for ids in self._answers.values() for token in ids]
        found = {
            "numbers": list(self._answers),
            "counts": list(map(len, self._answers.values())),
            "ids": flat,
        }
        return {_ANSWERS + name: torch.tensor(values, dtype=torch.int64) for name, values in found.items()}

    def set_state(self, state: dict[str, Tensor]) -> None:
        """Take it back. DataError if the teacher's words are no longer in the cache."""
        known = (_TABLE, *(_ANSWERS + name for name in ("numbers", "counts", "ids")))
        super().set_state({name: x for name, x in state.items() if name not in known})
        if _TABLE in state:
            key = bytes(state[_TABLE].tolist()).decode()
            if not store.is_complete(_place(key)):
                what = "what the teacher said is no longer in the cache"
                raise DataError(Problem("objective.top", what, "begin again with --fresh"))
            self._open(key)
        elif state:
            numbers, counts, ids = (state[_ANSWERS + name] for name in ("numbers", "counts", "ids"))
            each = (part.tolist() for part in torch.split(ids, counts.tolist()))
            self._answers = dict(zip(numbers.tolist(), each, strict=True))


class _All:
    """What the teacher's output layer would be given, and that layer: its logits are made when they are needed."""

    def __init__(self, words: Logits, rows: Tensor) -> None:
        self._words, self._rows = words, rows

    def logs(self, temperature: float) -> Tensor:
        with torch.no_grad():
            return (self._words(self._rows).float() / temperature).log_softmax(-1)

    def beside(self, student_NV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Both over the words that both have: models of one tokenizer pad their vocabularies differently."""
        teacher_NV = self.logs(temperature)
        shared = min(teacher_NV.shape[1], student_NV.shape[1])
        return teacher_NV[:, :shared], student_NV[:, :shared]

    def likeliest(self, config: Config) -> tuple[Tensor, Tensor]:
        """Log-probabilities and words [N, K]."""
        logs_NV = self.logs(config.temperature)
        found = logs_NV.topk(min(config.top, logs_NV.shape[1]), -1)
        return found.values, found.indices


class _Some:
    """The teacher's likeliest words, and how likely each was."""

    def __init__(self, ids_NK: Tensor, logs_NK: Tensor) -> None:
        self._ids, self._logs = ids_NK, logs_NK

    def beside(self, student_NV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Both over these words, and all others together: what is made coarser is never farther apart."""
        student_NK = student_NV.gather(-1, self._ids)
        return with_rest(self._logs), with_rest(student_NK)


_Taught = _All | _Some


def _place(key: str) -> Any:
    return cache_folder() / "teachers" / key


def _number(sample: Sample) -> np.ndarray:
    learned = sample.get("learned", np.empty(0, np.uint8))
    code = hashlib.sha256(sample["input_ids"].tobytes() + learned.tobytes()).digest()
    return np.array([int.from_bytes(code[:8], "little") >> 1], np.int64)
