"""PEFT's model with a prompt before it, made to work where PEFT's own does not.

PEFT's logits begin with the prompt's own positions; its answers to a batch depend on the padding, except with a
prefix; its prefixes do not work under gradient checkpointing; its forward pass begins anew with every cache.
Here a caller sees the tokens that it gave and nothing else. Shapes: B rows, P virtual tokens, T tokens, D width.
"""

import inspect
from typing import Any

import torch
from peft import PeftModelForCausalLM
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from tunewright.core.errors import ModelError, Problem
from tunewright.methods import _prefixes
from tunewright.models import anatomy


class Prefix(DynamicCache):  # type: ignore[misc]
    """Keys and values that stand before those of every layer. It keeps no others: a layer may be computed twice."""

    def __init__(self, filled: DynamicCache) -> None:
        super().__init__()
        self.layers = filled.layers

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [B, heads, P + T, D of a head]."""
        layer = self.layers[layer_idx]
        return _behind(layer.keys, key_states), _behind(layer.values, value_states)


def _behind(prefix: Tensor, states: Tensor) -> Tensor:
    return torch.cat([prefix.expand(len(states), -1, -1, -1), states], dim=-2)


class PromptModel(PeftModelForCausalLM):  # type: ignore[misc]
    """A causal language model with a prompt of trained numbers before every sequence."""

    def __init__(self, model: Any, config: Any) -> None:
        super().__init__(model, config, autocast_adapter_dtype=False)
        self.word_embeddings = model.get_input_embeddings()  # PEFT guesses by the size of the vocabulary
        self.prompt_encoder.to(model.dtype)
        self.virtual_tokens = int(config.num_virtual_tokens)
        self._window = _prefixes.window(model)
        self.is_prefix = str(config.peft_type.value) == "PREFIX_TUNING"
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._prefix: Prefix | None = None
        if self.is_prefix:
            for _, block in anatomy.blocks(model):
                self._let_prefix_through(block)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        """What the base gives for these T tokens [B, T] behind the prompt; logits [B, T, V].

        Mask and positions are of the caller's own tokens. A cache that has tokens has the prompt, too. ModelError
        for samples that are packed into one row.
        """
        given = inputs_embeds if input_ids is None else input_ids
        assert given is not None, "neither tokens nor embeddings"  # noqa: S101 our own bug
        _refuse_packed(attention_mask, position_ids)
        if attention_mask is not None:
            attention_mask = F.pad(attention_mask, (self.virtual_tokens, 0), value=1)
        if position_ids is not None:
            position_ids = position_ids + self.virtual_tokens
        if past_key_values is None or not past_key_values.get_seq_length():
            if self.is_prefix:
                past_key_values = self._before(len(given), kwargs)
            else:
                inputs_embeds, position_ids = self._joined(input_ids, inputs_embeds, position_ids)
                input_ids = None
                if isinstance(kwargs.get("logits_to_keep"), Tensor):
                    kwargs["logits_to_keep"] = kwargs["logits_to_keep"] + self.virtual_tokens
        if self._keeps_logits:
            kwargs.setdefault("logits_to_keep", given.shape[1])
        out = self._checkpointed(
            input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds,
            position_ids=position_ids, past_key_values=past_key_values, **kwargs,
        )  # fmt: skip
        return _without_prompt(out, given.shape[1])

    def _before(self, rows: int, kwargs: dict[str, Any]) -> DynamicCache:
        """The prefix as a cache: one that grows if the caller keeps it."""
        modules = self.base_model.modules()
        if self.training and any(getattr(m, "gradient_checkpointing", False) for m in modules):
            kwargs["use_cache"] = False
        cache = self.get_prompt(1)
        if kwargs.get("use_cache") is False:
            return Prefix(cache)
        cache.batch_repeat_interleave(rows)
        return cache

    def _joined(
        self, input_ids: Tensor | None, embeds_BTD: Tensor | None, position_ids: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Embeddings [B, P + T, D] and their positions, if any were given."""
        if embeds_BTD is None:
            embeds_BTD = self.word_embeddings(input_ids)
        prompt_BPD = self.get_prompt(1).to(embeds_BTD.dtype).expand(len(embeds_BTD), -1, -1)
        if position_ids is not None:
            first = torch.arange(self.virtual_tokens, device=position_ids.device)
            position_ids = torch.cat([first.expand(len(position_ids), -1), position_ids], dim=1)
        return torch.cat([prompt_BPD, embeds_BTD], dim=1), position_ids

    def _checkpointed(self, **inputs: Any) -> Any:
        """The base's forward pass, during which its layers can be given the prefix."""
        cache = inputs["past_key_values"]
        self._prefix = cache if isinstance(cache, Prefix) else None
        try:
            return self.base_model(**inputs)
        finally:
            self._prefix = None

    def _let_prefix_through(self, block: Any) -> None:
        """Checkpointed layers drop caches, since a second computation would fill them twice; GPT-2 gives none.

        A :class:`Prefix` may be read twice. The hook stands outside of what is computed again.
        """
        parameters = list(inspect.signature(block.forward).parameters)
        name = next(name for name in _prefixes.CACHES if name in parameters)
        place = parameters.index(name)

        def give(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._prefix is None:
                return None
            if place < len(args):
                return (*args[:place], self._prefix, *args[place + 1 :]), kwargs
            return args, {**kwargs, name: self._prefix}

        block._can_checkpoint_with_cache = True
        block.register_forward_pre_hook(give, with_kwargs=True)

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """As the base's own: the given tokens [B, T], then new ones. Padding stands at the left."""
        if self._adapters_disabled:
            return self.base_model.generate(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        mask_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if not self.is_prefix:
            return self._generate_behind_prompt(input_ids, mask_BT, **kwargs)
        reach = self.virtual_tokens + input_ids.shape[1] + kwargs.get("max_new_tokens", 1 << 30)
        if reach > self._window and not mask_BT.all():
            return self._generate_by_length(input_ids, mask_BT, **kwargs)
        return self._generate_behind_prefix(input_ids, mask_BT, **kwargs)

    def _generate_behind_prompt(self, input_ids: Tensor, mask_BT: Tensor, **kwargs: Any) -> Any:
        embeds, _ = self._joined(input_ids, None, None)
        mask = F.pad(mask_BT, (self.virtual_tokens, 0), value=1)
        # Padding goes before the prompt, so that each row is what it would be alone.
        order = mask.argsort(dim=1, stable=True)
        embeds = embeds.gather(1, order[..., None].expand_as(embeds))
        return self.base_model.generate(
            input_ids=input_ids, inputs_embeds=embeds, attention_mask=mask.gather(1, order), **kwargs
        )

    def _generate_behind_prefix(self, input_ids: Tensor, mask_BT: Tensor, **kwargs: Any) -> Any:
        cache = self._before(len(input_ids), {})
        # These stand for what the cache has, and are not read.
        cached = input_ids[:, -1:].expand(-1, self.virtual_tokens)
        kwargs["use_cache"] = True
        ids_BT = self.base_model.generate(
            input_ids=torch.cat([cached, input_ids], dim=1), past_key_values=cache,
            attention_mask=F.pad(mask_BT, (self.virtual_tokens, 0), value=1), **kwargs,
        )  # fmt: skip
        return ids_BT[:, self.virtual_tokens :]

    def _generate_by_length(self, input_ids: Tensor, mask_BT: Tensor, **kwargs: Any) -> Tensor:
        """Rows of one length at a time: padding would stand between a prefix and a window that looks back to it."""
        said: list[Tensor] = [input_ids[0]] * len(input_ids)
        for length in sorted(set(mask_BT.sum(1).tolist())):
            rows = (mask_BT.sum(1) == length).nonzero()[:, 0]
            ids, mask = input_ids[rows, -length:], mask_BT[rows, -length:]
            whole = self._generate_behind_prefix(ids, mask, **kwargs)
            for row, new in zip(rows.tolist(), whole[:, length:], strict=True):
                said[row] = new
        fill = kwargs.get("pad_token_id") or 0
        return torch.cat([input_ids, pad_sequence(said, batch_first=True, padding_value=fill)], dim=1)


def _refuse_packed(attention_mask: Tensor | None, position_ids: Tensor | None) -> None:
    """Samples packed into one row would have one prompt together, before the first of them."""
    restarts = attention_mask is None and position_ids is not None and bool((position_ids.diff() != 1).any())
    if restarts or (attention_mask is not None and attention_mask.ndim != 2):
        what = "samples packed into one row cannot each have the prompt before them"
        raise ModelError(Problem("method", what, "train without packing, or with another method"))


def _without_prompt(out: Any, tokens: int) -> Any:
    """Logits and hidden states of the last ``tokens`` positions alone."""
    out.logits = out.logits[:, -tokens:]
    if getattr(out, "hidden_states", None):
        out.hidden_states = tuple(states[:, -tokens:] for states in out.hidden_states)
    return out
