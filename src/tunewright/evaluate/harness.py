"""Measure a model on held-out data: loss over all of it, generated answers over a part."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp
from typing import Any

import numpy as np
import torch

from tunewright.core.answers import exact_match
from tunewright.core.rng import sow
from tunewright.core.units import chunks
from tunewright.data.rows import Row
from tunewright.data.template import ChatCodec
from tunewright.data.tokens import Sample
from tunewright.evaluate.chance import mean_error
from tunewright.evaluate.metrics import token_f1
from tunewright.models.generate import Draw, answer, draw
from tunewright.models.memory import fitting
from tunewright.objectives import Objective
from tunewright.objectives import _rewards as rewards
from tunewright.objectives._causal import pad
from tunewright.objectives._pairs import said
from tunewright.objectives._policy import answered
from tunewright.recipes import EvaluateConfig
from tunewright.train.measure import HeldOut

Tree = dict[str, Any]
_AT_ONCE = 64
"""Prompts answered together, unless memory asks for fewer."""
_LOOKED_AT = 16
"""Answers that a model is passed over together."""


@dataclass(frozen=True)
class Examination:
    """What a model is asked, so that before and after are asked the same."""

    objective: Objective
    codec: ChatCodec
    samples: Sequence[Sample]
    rows: Sequence[Row]
    config: EvaluateConfig
    budget: int = 4096

    def take(self, model: Any, progress: Callable[[int, int], None] = lambda done, of: None) -> Tree:
        """Scores: loss (nats a supervised token) and perplexity, or the objective's own figures; exact match and F1 in
        all and by family.
        """
        scores: Tree = {}
        if len(self.samples):
            scores |= HeldOut(self.objective, self.samples, self.budget).figures(model)
            if self.objective.is_likelihood:
                scores |= {"perplexity": exp(min(scores["loss"], 700.0))}
        if self.asks:
            answers = self._answers(model, progress)
            scores |= {**_scores(self.rows, answers), "families": self._families(answers), "answers": answers}
            if self.config.rewards:
                worth_NR = self.worth(answers)
                for name, found_R in (("worth", worth_NR.mean(0)), ("worth_error", mean_error(worth_NR))):
                    scores[name] = dict(zip(self.config.rewards, found_R.tolist(), strict=True))
        return scores

    def worth(self, answers: Sequence[str]) -> np.ndarray:
        """What each answer is worth [N, R]."""
        asked = [rewards.Asked(row.messages[-2].content, row.messages[-1].content) for row in self.rows]
        names = self.config.rewards
        return rewards.worth(names, rewards.find(names), {}, asked, answers)

    def wins(self, before: Tree, after: Tree) -> dict[str, float]:
        """The share of questions that are answered better than before, by each reward; a tie is half a win."""
        if not (self.config.rewards and "answers" in before and "answers" in after):
            return {}
        was_NR, is_NR = self.worth(before["answers"]), self.worth(after["answers"])
        share_R = ((is_NR > was_NR) + 0.5 * (is_NR == was_NR)).mean(0)
        return dict(zip(self.config.rewards, share_R.tolist(), strict=True))

    def kl(self, model: Any, before: Any) -> float:
        """KL(after ‖ before) in nats an answer, by one answer of the model's to each question."""
        sow(0, "divergence")
        prompts = [self.codec.prompt(row.messages[:-1]) for row in self.rows]
        how = Draw(1, self.config.max_new_tokens)
        answers = fitting(_AT_ONCE, 1, lambda size: draw(model, self.codec, prompts, how, size))
        both = zip(prompts, answers, strict=True)
        samples = [
            answered({"input_ids": np.array(ids, np.int32)}, ids_said) for ids, ids_said in both if ids_said
        ]
        apart = 0.0
        for some in chunks(samples, _LOOKED_AT):
            batch = {name: x.to(model.device) for name, x in pad(some, self.codec.pad_id).items()}
            with torch.no_grad():
                apart += sum(
                    sign * float(said(one, batch)[0].sum()) for sign, one in ((1, model), (-1, before))
                )
        return apart / len(prompts)

    @property
    def asks(self) -> bool:
        """Whether answers are generated."""
        return self.config.generate and bool(self.rows)

    def _answers(self, model: Any, progress: Callable[[int, int], None]) -> list[str]:
        prompts = [row.messages[:-1] for row in self.rows]
        count, tasks = len(prompts), [row.task for row in self.rows]
        return fitting(_AT_ONCE, 1, lambda size: answer(
            model, self.codec, prompts, self.config.max_new_tokens, size, lambda n: progress(n, count), tasks
        ))  # fmt: skip

    def _families(self, answers: list[str]) -> Tree:
        names = sorted({row.family for row in self.rows if row.family})
        picked = {n: [i for i, row in enumerate(self.rows) if row.family == n] for n in names}
        return {n: _scores([self.rows[i] for i in at], [answers[i] for i in at]) for n, at in picked.items()}

    def side_by_side(self, before: Tree, after: Tree) -> list[Tree]:
        """A few questions with both answers: changed ones of every family first."""
        if "answers" not in after:
            return []
        was = before.get("answers", [""] * len(self.rows))
        both = zip(self.questions(), was, after["answers"], strict=True)
        return spread(
            [{**asked, "before": one, "after": other} for asked, one, other in both], self.config.samples
        )

    def questions(self) -> list[Tree]:
        """What is asked, for people."""
        return [
            {"where": row.where, "family": row.family, "prompt": row.messages[-2].content,
             "reference": row.messages[-1].content}
            for row in self.rows
        ]  # fmt: skip


def _scores(rows: Sequence[Row], answers: Sequence[str]) -> Tree:
    """Mean exact match and F1 of answers to these rows."""
    pairs = [(given, row.messages[-1].content) for given, row in zip(answers, rows, strict=True)]
    matches = [exact_match(given, meant) for given, meant in pairs]
    f1 = [token_f1(given, meant) for given, meant in pairs]
    return {"count": len(pairs), "exact_match": sum(matches) / len(pairs), "f1": sum(f1) / len(pairs)}


def spread(items: list[Tree], count: int) -> list[Tree]:
    """``count`` items, taking each family in turn."""
    families = sorted({item["family"] for item in items})
    queues = [[item for item in items if item["family"] == name] for name in families]
    longest = max(map(len, queues), default=0)
    in_turn = [queue[k] for k in range(longest) for queue in queues if k < len(queue)]
    return in_turn[:count]
