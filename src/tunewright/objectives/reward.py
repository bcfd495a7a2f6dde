"""A reward model: how good an answer is, learned from which of two is better (Bradley & Terry 1952)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from tunewright.core.config import Config as BaseConfig
from tunewright.core.words import Words
from tunewright.data.rows import Row
from tunewright.data.template import ChatCodec
from tunewright.data.tokens import LENGTH
from tunewright.objectives import Batch, Facts, Sample
from tunewright.objectives import _words as words
from tunewright.objectives._causal import pad
from tunewright.objectives._pairs import Pairs

_MARGIN = "margin"


class Config(BaseConfig):
    """What rewards are read from, and what keeps them in bounds."""

    words: tuple[str, str] = ("good", "bad")
    """An answer's reward is how much larger the first word's logit is than the second's after the answer."""
    center: float = Field(0.0, ge=0)
    """Weight of the squared sum of both rewards, which holds them around 0 (Eisenstein et al. 2023)."""


class Reward(Pairs):
    """Learns to give the chosen answer the higher reward, by a row's ``margin`` if it names one.

    The reward is read at the last token, in nats: log-odds of a good against a bad word there. So a reward model is
    a language model, and every method trains, merges and saves it.
    """

    speaks = False
    facts = Facts(
        idea=Words(
            "After an answer, the logit of a word for good against one for bad is its reward; the chosen answer's shall be higher.",
            "在回答之后，用表示“好”与“坏”的两个词的 logit 之差作为奖励；被选回答的奖励应更高。",
        ),
        formula="−log σ(r(x, y₁) − r(x, y₂) − m) + c·(r(x, y₁) + r(x, y₂))²",
        dials=Words(
            "One epoch is usual: a second one learns pairs by heart. center about 0.01 where rewards are used by reinforcement "
            "learning.",
            "通常只训练一轮：第二轮就会记住数据。奖励要用于强化学习时，center 取 0.01 左右。",
        ),
        watch=Words(
            "Held-out accuracy; calibration, which is how much more often it is right than it believes, should be near 0.",
            "留出数据上的 accuracy；calibration（实际正确率与自信程度之差）应接近 0。",
        ),
        when=Words("Before ppo or grpo, or to rank answers.", "在 ppo 或 grpo 之前，或用来给回答排序。"),
        paper="Bradley & Terry 1952; Ouyang et al. 2022, arXiv:2203.02155",
    )

    def __init__(self, config: Any, codec: ChatCodec) -> None:
        super().__init__(config, codec)
        self._tokens = words.first_tokens(codec.tokenizer, config.words, "objective.words")

    def fields(self, row: Row) -> Sample:
        """The bits of the fp32 margin."""
        return {_MARGIN: np.array([row.margin], np.float32).view(np.int32)}

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Also ``margin`` [B]; labels ask for each conversation's last state."""
        batch = super().collate(samples)
        margins_B = torch.from_numpy(
            np.concatenate([np.asarray(s[_MARGIN], np.int32) for s in samples]).view(np.float32)
        )
        labels_RT = words.at_last(batch[LENGTH], batch["input_ids"].shape[1])
        return {**batch, "labels": labels_RT, _MARGIN: margins_B.clone()}

    def conversations(self, ids: Sequence[list[int]]) -> Batch:
        """Whole conversations as one batch that asks for each one's last state."""
        lengths_B = torch.tensor([len(row) for row in ids])
        samples: list[Sample] = [
            {"input_ids": np.array(row, np.int32), "learned": np.zeros(len(row), np.uint8)} for row in ids
        ]
        batch = pad(samples, self.codec.pad_id)
        return {**batch, "labels": words.at_last(lengths_B, batch["input_ids"].shape[1]), LENGTH: lengths_B}

    def rewards(self, model: Any, batch: Batch) -> Tensor:
        """Of every row [R]."""
        logits_R2 = words.logits(model, batch, self._tokens)
        return logits_R2[:, 0] - logits_R2[:, 1]

    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Mean over the pairs."""
        chosen_B, rejected_B = self.rewards(model, batch).chunk(2)
        lead_B = chosen_B - rejected_B
        losses_B = -logsigmoid(lead_B - batch[_MARGIN]) + self.config.center * (chosen_B + rejected_B) ** 2
        chosen_B, rejected_B, lead_B = (x.detach() for x in (chosen_B, rejected_B, lead_B))
        sure_B = lead_B.abs().sigmoid()
        won_B = (lead_B > 0).float()
        return losses_B.mean(), {
            "accuracy": float(won_B.mean()), "calibration": float((won_B - sure_B).mean()), "margin": float(lead_B.mean()),
            "chosen": float(chosen_B.mean()), "rejected": float(rejected_B.mean()),
        }  # fmt: skip
