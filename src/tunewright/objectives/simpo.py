"""SimPO: preferences without a reference model, by the mean log-probability of a token (Meng et al. 2024)."""

from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from tunewright.core.config import Config as BaseConfig
from tunewright.core.words import Words
from tunewright.objectives import Batch, Facts
from tunewright.objectives._pairs import Answers, Preference


class Config(BaseConfig):
    """How much the chosen answer shall lead."""

    beta: float = Field(2.0, gt=0)
    """What a nat a token is worth."""
    gamma: float = Field(0.5, ge=0)
    """The lead that is aimed for."""


class Simpo(Preference):
    """Raises the chosen answer's mean log-probability over the rejected one's by a margin (eq. 6)."""

    facts = Facts(
        idea=Words(
            "The chosen answer's mean log-probability shall lead by a margin; no reference model is asked.",
            "被选回答的平均对数概率要领先一个间隔；不需要参考模型。",
        ),
        formula="−log σ(β·(log π(y₁|x)/|y₁| − log π(y₂|x)/|y₂|) − γ)",
        dials=Words(
            "gamma over beta is the lead aimed for, in nats a token; beta 2 to 10. lr decides most: too high and the text falls apart.",
            "gamma 与 beta 之比是期望的领先幅度（每词元 nat）；beta 取 2 到 10。学习率最关键：过高会使文本变坏。",
        ),
        watch=Words(
            "accuracy and margin; with too high a rate answers degrade while both still rise.",
            "accuracy 与 margin；学习率过高时二者仍会上升，回答却变差。",
        ),
        when=Words(
            "Pairs whose longer answer must not win by its length, and no memory or time for a reference.",
            "成对数据，且不希望长回答因长度取胜，也不想计算参考模型时。",
        ),
        paper="Meng, Xia & Chen 2024, arXiv:2405.14734",
    )

    def losses(self, found: Answers, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """-log sigmoid(beta (mean chosen - mean rejected) - gamma)."""
        chosen_B, rejected_B = (self.config.beta * x for x in found.per_token())
        return -logsigmoid(chosen_B - rejected_B - self.config.gamma), chosen_B.detach(), rejected_B.detach()
