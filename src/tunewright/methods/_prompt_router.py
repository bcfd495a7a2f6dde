"""The router of C-LoRA: by compiled rules, or by a linear layer on what a prompt says.

Shapes: B rows, T positions, V words of the vocabulary, D numbers of an embedding, K adapters.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tunewright.methods._mixture import Group, Groups, Router, one_each
from tunewright.methods._rules import Rules
from tunewright.models.announce import announced


class PromptRouter(Router):
    """Sees the first question of a conversation and nothing of an answer, in training as at inference."""

    def __init__(self, config: Any, embeddings_VD: Tensor) -> None:
        super().__init__(config.names, config)
        self.rules = Rules(config.rules, embeddings_VD)
        self.tally_K = torch.zeros(len(config.names), dtype=torch.float64)
        self.seen: list[Tensor] = []
        """What the router saw of the rows of this step, [B, D] each: the penalty is on all of them together."""
        if config.router == "learned":
            sides = (len(config.names), embeddings_VD.shape[1])
            std = sides[1] ** -0.5  # logits of unit variance
            self.weight = nn.Parameter(embeddings_VD.new_empty(sides).normal_(std=std))
            self.bias = nn.Parameter(embeddings_VD.new_zeros(sides[0]))
            self.register_buffer("centre", embeddings_VD.new_zeros(sides[1], dtype=torch.float32))

    def groups(self, model: Any, ids_BT: Tensor, real_BT: Tensor) -> Groups:
        """By the rules, or by the learned probabilities."""
        prompt_BT, learning = self._prompt(ids_BT, real_BT), model.training and torch.is_grad_enabled()
        if self.config.router == "rule":
            choice_B = self._by_rule(ids_BT, prompt_BT)
            groups, used_BK = one_each(choice_B, len(self.names)), self._ones(choice_B)
        else:
            groups, used_BK = self._learned(self._seen(model, ids_BT, prompt_BT), learning)
        if learning:
            self.tally_K += used_BK.detach().double().sum(0).to(self.tally_K.device)
        return groups

    def _learned(self, seen_BD: Tensor, learning: bool) -> tuple[Groups, Tensor]:
        """The groups, and how much each row uses each adapter [B, K]."""
        if learning:
            self.seen.append(seen_BD)
        p_BK = self.probabilities(seen_BD)
        if self.config.mix == "soft":
            return _weighted(p_BK), p_BK
        choice_B = p_BK.argmax(1)
        ones_BK = self._ones(choice_B)
        if not learning:
            return one_each(choice_B, len(self.names)), ones_BK
        # Straight through: the chosen one counts whole, the gradient is that of the probabilities.
        return _weighted(ones_BK + (p_BK - p_BK.detach())), ones_BK

    def _ones(self, choice_B: Tensor) -> Tensor:
        return F.one_hot(choice_B, len(self.names)).float()

    def _prompt(self, ids_BT: Tensor, real_BT: Tensor) -> Tensor:
        """True [B, T] for what was there before the first token that is learned; else for the first question."""
        labels_BT = self.batch.get("labels")
        if labels_BT is None or labels_BT.shape != ids_BT.shape:
            return self.rules.first_question(ids_BT, real_BT)
        # Label t is token t + 1, so that the first one learned comes after t.
        learned_BT = labels_BT.to(ids_BT.device) >= 0
        return real_BT & (learned_BT.cumsum(1) - learned_BT.long() == 0)

    def _by_rule(self, ids_BT: Tensor, prompt_BT: Tensor) -> Tensor:
        """The number [B] of the first adapter whose rule applies."""
        default = self.names.index(self.config.default or self.names[0])
        choice_B = torch.full_like(ids_BT[:, 0], default)
        for name in reversed(self.config.rules):  # the first is written last
            choice_B[self.rules.match(name, ids_BT, prompt_BT)] = self.names.index(name)
        return choice_B

    @torch.no_grad()
    def look(self, model: Any, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """What prompts have in common, the template's tokens above all, tells nothing apart: it is taken off."""
        means = []
        for batch in batches:
            if (ids_BT := batch.get("input_ids")) is not None:
                with announced(model, batch):
                    prompt_BT = self._prompt(ids_BT, torch.ones_like(ids_BT, dtype=torch.bool))
                means.append(_mean(model, ids_BT, prompt_BT))
        if means:
            self.centre = torch.cat(means).mean(0)

    def _seen(self, model: Any, ids_BT: Tensor, prompt_BT: Tensor) -> Tensor:
        """What the learned router sees of each row [B, D]: centred, and of unit variance."""
        seen_BD = _mean(model, ids_BT, prompt_BT) - self.centre
        return F.layer_norm(seen_BD, seen_BD.shape[1:])

    def probabilities(self, seen_BD: Tensor) -> Tensor:
        """The learned router's p [B, K]."""
        return F.linear(seen_BD, self.weight.float(), self.bias.float()).float().softmax(1)


@torch.no_grad()
def _mean(model: Any, ids_BT: Tensor, prompt_BT: Tensor) -> Tensor:
    """The prompt's mean embedding [B, D] in fp32."""
    e_BTD = model.get_input_embeddings()(ids_BT).float()
    counted_BT1 = prompt_BT[..., None].float()
    mean_BD: Tensor = (e_BTD * counted_BT1).sum(1) / counted_BT1.sum(1).clamp(min=1)
    return mean_BD


def _weighted(gates_BK: Tensor) -> Groups:
    """All rows use all adapters, by their weights."""
    return tuple(Group(k, None, gates_B) for k, gates_B in enumerate(gates_BK.unbind(1)))
