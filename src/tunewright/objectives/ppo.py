"""PPO: answers are judged token by token, against what was to be expected (Schulman et al. 2017; Ouyang et al. 2022)."""

from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from tunewright.core.words import Words
from tunewright.data.template import ChatCodec
from tunewright.models import likelihood
from tunewright.models.likelihood import IGNORED, token_losses
from tunewright.objectives import Batch, Facts, Sample, Turn
from tunewright.objectives._policy import DrawConfig, Policy, bits, numbers

_ADVANTAGES, _RETURNS, _VALUES = "advantages", "returns", "values"
_PER_TOKEN = (_ADVANTAGES, _RETURNS, _VALUES)
_HEAD = "tunewright_value"
_STRENGTH = "divergence.weight"


class Config(DrawConfig):
    """How answers are judged, and how far one step may go."""

    group: int = Field(1, ge=1)
    """Answers drawn for each question."""
    steps_per_draw: int = Field(4, ge=1)
    """Optimizer steps that learn from the same answers."""
    kl: float = Field(0.05, ge=0)
    """What a nat of divergence from the model before training costs, a token; at first, if kl_target is given."""
    kl_target: float = Field(0.0, ge=0)
    """Divergence of an answer, in nats, that the cost is adapted to (Ziegler et al. 2019); 0 leaves it as it is."""
    kl_stop: float = Field(0.0, ge=0)
    """Answers are drawn anew once a token's likelihood has moved so far from when they were drawn; 0 is never."""
    gamma: float = Field(1.0, gt=0, le=1)
    """What a later token's reward is worth at the one before it."""
    trace: float = Field(0.95, ge=0, le=1)
    """GAE's lambda: 0 trusts the values, 1 what came of it."""
    clip: float = Field(0.2, gt=0, lt=1)
    """How far from 1 a token's ratio may go and still be learned from."""
    value_clip: float = Field(0.2, gt=0)
    """How far a value may move from what it was."""
    value_weight: float = Field(0.1, ge=0)
    """Of the values' squared error beside the policy's loss."""


class Ppo(Policy):
    """A value head says what an answer will be worth; tokens after which it is worth more become likelier.

    The head reads the last hidden states and is trained with the model, but is no part of what is saved.
    """

    needs_start = True
    facts = Facts(
        idea=Words(
            "The model answers, a value head foretells what each answer will be worth, and tokens that made it better than "
            "foretold become likelier, as long as the model stays near where it began.",
            "模型作答，价值头预测回答的价值；使结果好于预测的词元变得更可能，同时模型不能远离初始状态。",
        ),
        formula="−min(ρ·A, clip(ρ, 1 − ε, 1 + ε)·A) + c·max((V − R)², (clip(V) − R)²)/2, A by GAE(γ, λ) of r − β·log π/π₀",
        dials=Words(
            "kl first: too low and answers turn to gibberish that the reward likes, too high and nothing is learned; lr a tenth of "
            "sft's; steps_per_draw 2 to 4.",
            "首先是 kl：过低会生成奖励喜欢的胡言乱语，过高则学不到东西；学习率取 sft 的十分之一；steps_per_draw 取 2 到 4。",
        ),
        watch=Words(
            "reward rises; divergence a few nats; value_error falls; ended near 1.",
            "reward 上升；divergence 为几个 nat；value_error 下降；ended 接近 1。",
        ),
        when=Words(
            "A reward model, or a reward that comes late in long answers.",
            "使用奖励模型，或长回答末尾才有奖励时。",
        ),
        paper="Schulman et al. 2017, arXiv:1707.06347; Schulman et al. 2016, arXiv:1506.02438; Ouyang et al. 2022, arXiv:2203.02155",
    )

    def __init__(self, config: Any, codec: ChatCodec) -> None:
        super().__init__(config, codec)
        self._strength: float = config.kl

    def attach(self, model: Any) -> None:
        """A value head at zero."""
        weight = next(model.parameters())
        head = nn.Linear(
            model.config.get_text_config().hidden_size, 1, device=weight.device, dtype=weight.dtype
        )
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        setattr(model, _HEAD, head)

    def release(self, model: Any) -> None:
        """The model is a language model again."""
        delattr(model, _HEAD)

    def explore(self, model: Any, samples: list[Sample], turn: Turn) -> list[Sample]:
        """Drawn anew also where the model has moved too far from when they were."""
        again = bool(self.config.kl_stop and self._drawn and turn.step % self.reuse)
        if again and self._moved(model) > self.config.kl_stop:
            self._drawn = []
        return super().explore(model, samples, turn)

    def _moved(self, model: Any) -> float:
        """How far a token's log-probability has fallen since the answers were drawn, in the mean of them all."""
        now = self.looked_at(
            model, lambda: self.per_token(model, self._drawn, lambda b: -token_losses(model, b))
        )
        before = [numbers(sample["before"]) for sample in self._drawn]
        return float(np.concatenate(before).mean() - np.concatenate(now).mean())

    def advantages(self, rewards_PG: np.ndarray) -> np.ndarray:
        """An answer's reward; what its tokens gained is worked out from it."""
        return rewards_PG

    def remembered(self, model: Any, found: list[Sample]) -> list[Sample]:
        """With what each token gained, and what was foretold."""
        before = self.per_token(model, found, lambda batch: -token_losses(model, batch))
        values = self.per_token(model, found, lambda batch: self._foretold(model, batch))
        with self.start.standing_in(model):
            reference = self.per_token(model, found, lambda batch: -token_losses(model, batch))
        judged = []
        for sample, before_A, values_A, reference_A in zip(found, before, values, reference, strict=True):
            gained_A, returns_A = self._gained(
                before_A - reference_A, float(numbers(sample["reward"])[0]), values_A
            )
            judged.append({
                **sample, "before": bits(before_A), _VALUES: bits(values_A), _RETURNS: bits(returns_A),
                _ADVANTAGES: bits(gained_A),
            })  # fmt: skip
        apart = [float((now - then).sum()) for now, then in zip(before, reference, strict=True)]
        divergence = sum(apart) / len(apart)
        self._figures |= {"divergence": divergence, "kl_weight": self._strength}
        self._adapt(divergence)
        return _whitened(judged)

    def _foretold(self, model: Any, batch: Batch) -> Tensor:
        values_N1: Tensor = getattr(model, _HEAD)(likelihood.states(model, batch))
        return values_N1[:, 0].float()

    def _gained(
        self, apart_A: np.ndarray, reward: float, values_A: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Generalised advantages [A] and returns [A] of one answer."""
        rewards_A = -self._strength * apart_A
        rewards_A[-1] += reward
        later, found = 0.0, np.zeros_like(values_A)
        following = np.append(values_A[1:], 0.0)
        for t in reversed(range(len(values_A))):
            surprise = rewards_A[t] + self.config.gamma * following[t] - values_A[t]
            later = surprise + self.config.gamma * self.config.trace * later
            found[t] = later
        return found, found + values_A

    def _adapt(self, divergence: float) -> None:
        """By half of how far it is off, at most a tenth a draw."""
        if self.config.kl_target:
            error = np.clip(divergence / self.config.kl_target - 1, -0.2, 0.2)
            self._strength *= float(1 + 0.5 * error)

    def collate(self, samples: list[Sample]) -> Batch:  # type: ignore[override]
        """Also ``advantages``, ``returns`` and ``values`` [N], a number for each token of the answers."""
        more = {
            name: torch.from_numpy(np.concatenate([numbers(sample[name]) for sample in samples]))
            for name in _PER_TOKEN if name in samples[0]
        }  # fmt: skip
        return {**super().collate(samples), **more}

    def weight(self, batch: Batch) -> float:
        """Tokens of answers."""
        return float((batch["labels"] != IGNORED).sum())

    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """A token's mean of both."""
        now_N, values_N = -token_losses(model, batch), self._foretold(model, batch)
        gained_N, returns_N, foretold_N = (batch[name] for name in _PER_TOKEN)
        ratio_N, bound = (now_N - batch["before"]).exp(), self.config.clip
        policy_N = -torch.minimum(ratio_N * gained_N, ratio_N.clamp(1 - bound, 1 + bound) * gained_N)
        near_N = foretold_N + (values_N - foretold_N).clamp(-self.config.value_clip, self.config.value_clip)
        error_N = torch.maximum((values_N - returns_N).square(), (near_N - returns_N).square())
        moved = float((batch["before"] - now_N.detach()).mean())
        clipped_N = ((ratio_N - 1).abs() > bound).float()
        return (policy_N + 0.5 * self.config.value_weight * error_N).mean(), {
            **self._figures, "moved": moved, "value_error": float(error_N.detach().mean()), "clipped": float(clipped_N.mean()),
        }  # fmt: skip

    def state(self) -> dict[str, Tensor]:
        """The drawn answers with all that was found of them, and what divergence costs by now."""
        return {**super().state(), _STRENGTH: torch.tensor(self._strength, dtype=torch.float64)}

    def set_state(self, state: dict[str, Tensor]) -> None:
        """Take it back."""
        super().set_state({name: x for name, x in state.items() if name != _STRENGTH})
        self._strength = float(state.get(_STRENGTH, self.config.kl))


def _whitened(samples: list[Sample]) -> list[Sample]:
    """Advantages of all tokens with mean 0 and deviation 1."""
    gained_N = np.concatenate([numbers(sample[_ADVANTAGES]) for sample in samples]).astype(np.float64)
    mean, spread = gained_N.mean(), gained_N.std() + 1e-8
    return [{**s, _ADVANTAGES: bits((numbers(s[_ADVANTAGES]) - mean) / spread)} for s in samples]
