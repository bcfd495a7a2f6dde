"""Classification: a text's class, told by the first token of the class's name (Schick & Schütze 2021)."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from tunewright.core.config import Config as BaseConfig
from tunewright.core.errors import Problem, nearest
from tunewright.core.words import Words
from tunewright.data.rows import Message, Row
from tunewright.data.template import ChatCodec
from tunewright.data.tokens import LENGTH
from tunewright.objectives import Batch, Facts, Objective, Sample, origin
from tunewright.objectives import _words as words
from tunewright.objectives._causal import pad

_CLASS = "class"


class Config(BaseConfig):
    """The classes."""

    labels: tuple[str, ...] = Field(("0", "1"), min_length=2)
    """Names of the classes; rows say theirs in ``label``."""


class Classification(Objective):
    """Learns which class a text or conversation is of; no other word of the vocabulary takes part.

    The question is put to the model as a user's turn, and its answer begins with the class: so it can be asked in a chat.
    """

    wants = "labels"
    speaks = False
    facts = Facts(
        idea=Words(
            "Among the classes' names, the right one shall be the answer to the text.",
            "在各类别名称中，正确的那个应成为对文本的回答。",
        ),
        formula="−log softmax over classes of the logit of each name's first token, at the end of the question",
        dials=Words(
            "labels: names whose first tokens differ; words that say what they mean learn faster than numbers.",
            "labels：首词元互不相同的名称；有含义的词比数字学得更快。",
        ),
        watch=Words(
            "f1 (the classes' mean) where classes are of unequal size; accuracy else.",
            "类别大小不均时看 f1（各类平均），否则看 accuracy。",
        ),
        when=Words("Texts are to be sorted into few classes.", "把文本分到少数几个类别时。"),
        paper="Schick & Schütze 2021, arXiv:2001.07676",
    )

    def __init__(self, config: Any, codec: ChatCodec) -> None:
        super().__init__(config, codec)
        self._tokens = words.first_tokens(codec.tokenizer, config.labels, "objective.labels")

    def encode(self, rows: Iterable[Row]) -> Iterator[Sample | Problem]:
        """``input_ids`` int32 [T]: the question up to where the answer begins; ``class`` int64 [1]."""
        return map(self._sample, rows)

    def _sample(self, row: Row) -> Sample | Problem:
        label = row.label
        if label not in self.config.labels:
            what = f"the class {label[:60]!r}" if label else "no class"
            known = ", ".join(self.config.labels)
            return Problem(
                row.where,
                f"{what}, expected one of {known}",
                nearest(label, self.config.labels) or "add a label",
            )
        ids = self.codec.prompt(row.prompt or (Message("user", row.text),), row.tools)
        if len(ids) > self.codec.max_length:
            what = f"{len(ids)} tokens, and the answer comes after them; at most {self.codec.max_length} fit"
            return Problem(row.where, what, "raise data.max_length or shorten the row")
        which = self.config.labels.index(label)
        return {
            "input_ids": np.array(ids, np.int32),
            _CLASS: np.array([which], np.int64),
            **origin(row.where),
        }

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """``input_ids`` and ``labels`` [B, T], which ask for the last state; ``class`` [B]."""
        batch = pad(
            [{**s, "learned": np.zeros(len(s["input_ids"]), np.uint8)} for s in samples], self.codec.pad_id
        )
        lengths_B = torch.tensor([len(s["input_ids"]) for s in samples])
        classes_B = torch.tensor([int(s[_CLASS][0]) for s in samples])
        labels_BT = words.at_last(lengths_B, batch["input_ids"].shape[1])
        return {**batch, "labels": labels_BT, LENGTH: lengths_B, _CLASS: classes_B}

    def weight(self, batch: Batch) -> float:
        """Rows."""
        return float(len(batch[_CLASS]))

    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Mean cross-entropy over the classes; figures are shares of the rows."""
        logits_BC, classes_B = words.logits(model, batch, self._tokens), batch[_CLASS]
        said_B = logits_BC.argmax(1)
        shares = {"accuracy": said_B == classes_B}
        for which, name in enumerate(self.config.labels):
            shares |= {
                f"right.{name}": (said_B == which) & (classes_B == which), f"said.{name}": said_B == which,
                f"is.{name}": classes_B == which,
            }  # fmt: skip
        return cross_entropy(logits_BC, classes_B), {
            name: float(x.float().mean()) for name, x in shares.items()
        }

    def told(self, figures: dict[str, float]) -> dict[str, float]:
        """Accuracy; precision, recall and F1, the means of the classes that there are."""
        each = [
            self._of(figures, name)
            for name in self.config.labels
            if figures[f"is.{name}"] or figures[f"said.{name}"]
        ]
        means = np.mean(each, axis=0) if each else (0.0, 0.0, 0.0)
        named = zip(("precision", "recall", "f1"), map(float, means), strict=True)
        return {"loss": figures["loss"], "accuracy": figures["accuracy"], **dict(named)}

    def _of(self, figures: dict[str, float], name: str) -> tuple[float, float, float]:
        right, said, real = (figures[f"{kind}.{name}"] for kind in ("right", "said", "is"))
        return right / said if said else 0.0, right / real if real else 0.0, 2 * right / (said + real)
