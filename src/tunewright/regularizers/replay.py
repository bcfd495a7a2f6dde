"""Replay: some of what is learned is old (Rolnick et al. 2019)."""

from pydantic import Field

from tunewright.core.config import Config as BaseConfig
from tunewright.core.words import Words
from tunewright.recipes.schema import DataFiles
from tunewright.regularizers import Facts, Regularizer


class Config(BaseConfig):
    """What is repeated, and how much of it."""

    data: DataFiles = ()
    """Old data: files as in ``data.train``, in the objective's own format."""
    ratio: float = Field(0.2, gt=0, lt=1)
    """The share of all samples that is old."""


class Replay(Regularizer):
    """Mixes old data in, so that they make up a share of the samples of every epoch."""

    facts = Facts(
        idea=Words("A share of what is learned is old data.", "训练样本中混入一定比例的旧数据。"),
        formula="L(new and old), old samples a share of all",
        when=Words(
            "Old data are at hand: the plainest and usually the best.",
            "手头有旧数据时：最简单，通常也最有效。",
        ),
        paper="Rolnick et al. 2019, arXiv:1811.11682",
    )

    wants_old = True

    @property
    def old(self) -> DataFiles:
        """As the recipe says."""
        files: DataFiles = self.config.data
        return files

    def share(self) -> float:
        """As the recipe says."""
        return float(self.config.ratio)
