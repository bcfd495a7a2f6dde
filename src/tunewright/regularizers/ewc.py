"""EWC: weights that mattered for old data are held, others may move (Kirkpatrick et al. 2017)."""

from itertools import islice
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from tunewright.core.config import Config as BaseConfig
from tunewright.core.words import Words
from tunewright.recipes.schema import DataFiles
from tunewright.regularizers import Facts, Old, Regularizer, Start


class Config(BaseConfig):
    """Which data must stay known, and how strongly."""

    data: DataFiles = ()
    """Old data: files as in ``data.train``."""
    weight: float = Field(1000.0, gt=0)
    """Of half the squared distance, each weight's by its Fisher information."""
    samples: int = Field(64, ge=1)
    """So many samples tell the Fisher information."""


class Ewc(Regularizer):
    """Adds the squared distance from the start, weighed by the diagonal of the empirical Fisher information."""

    facts = Facts(
        idea=Words(
            "Weights that old data depend on are held, others may move.",
            "固定旧数据所依赖的权重，其余可以移动。",
        ),
        formula="λ/2 · Σ F·(θ − θ₀)², F = mean over old samples of (∇ loss)²",
        when=Words(
            "A sample of the old data is at hand and may not be trained on.", "有旧数据样本但不便用于训练时。"
        ),
        paper="Kirkpatrick et al. 2017, arXiv:1612.00796",
    )

    wants_old = True

    @property
    def old(self) -> DataFiles:
        """As the recipe says."""
        files: DataFiles = self.config.data
        return files

    def begin(self, start: Start, old: Old | None) -> None:
        """Measure the Fisher information of every trained weight, one old sample at a time."""
        self._start, model = start, start.model
        self._fisher = {name: torch.zeros_like(w, dtype=torch.float32) for name, w in start.weights.items()}
        own, seen, learning = dict(model.named_parameters()), 0, model.training
        model.eval()
        for batch in islice(old.batches() if old else (), self.config.samples):
            assert old  # noqa: S101 our own bug
            old.loss(model, batch).backward()  # type: ignore[no-untyped-call]
            seen += 1
            for name, fisher in self._fisher.items():
                gradient, own[name].grad = own[name].grad, None
                if gradient is not None:
                    fisher.add_(gradient.float().square())
        model.train(learning)
        for fisher in self._fisher.values():
            fisher.div_(max(1, seen))

    def penalty(self, model: Any) -> Tensor | None:
        """Over all trained parameters."""
        distances = [(self._fisher[name] * moved.square()).sum() for name, moved in self._start.moved(model)]
        found: Tensor = 0.5 * self.config.weight * torch.stack(distances).sum()
        return found
