"""Causal attention: the fastest exact implementation for the machine and the heads at hand.

Where a processor has instructions for bf16 and there is a compiler, code made for them. Elsewhere PyTorch's kernel
forwards, which is fast, and plain matrix products backwards: its own backward kernel works on tiles so small that it
takes four times as long (10 sequences of 200 tokens, 9 heads of 64) as forming the scores anew, whole, by batched
products. Long sequences are worked on in bands of queries, so that memory grows with length and not with its square. The
softmax's gradient is that of FlashAttention (Dao et al. 2022, arXiv:2205.14135, section 3.1).

On a GPU PyTorch's own kernels compute it: samples in one row have the one for lengths that vary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from tunewright.core.words import Words
from tunewright.fast import Technique, Work, _bf16_attention, _causal, _flash_attention, _shared_attention
from tunewright.fast import _packed_attention as packed

_NAME = "tunewright_causal"
_PLAIN = "sdpa"
_in_one_row: ContextVar[bool] = ContextVar("in_one_row", default=False)
"""Whether what goes through the model says where samples end: then it needs no mask, whose numbers are the square of
its tokens.
"""


class Attention(Technique):
    """Another implementation of the same sums, by transformers' own switch for implementations."""

    idea = Words(
        "Attention has code for bf16 of its own, its backward pass included; each sample takes what its length does.",
        "注意力（含反向传播）用专为 bf16 编写的代码计算，每条样本只按自身长度计算。",
    )

    def why_not(self, work: Work) -> str:
        """It is for models whose attention can be exchanged, on a device that there is code for."""
        if work.autocast:
            return "numbers are cast in each layer"
        if not _on_cpu(work) and (reason := _flash_attention.why_not(work.device, work.model.dtype)):
            return reason
        found = getattr(base_model(work.model).config, "_attn_implementation", None)
        return "" if found == _PLAIN else f"the model's attention is {found}"

    @contextmanager
    def on(self, work: Work) -> Iterator[None]:
        """The model's attention is ours, and its own again afterwards."""
        register()
        if _on_cpu(work):
            _bf16_attention.prepare()
        own = base_model(work.model)
        own.set_attn_implementation(_NAME)
        hooks = [
            own.register_forward_pre_hook(_begins, with_kwargs=True),
            own.register_forward_hook(_ends, always_call=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            own.set_attn_implementation(_PLAIN)


def _on_cpu(what: Work | Tensor) -> bool:
    return what.device.type == "cpu"


def _begins(_: Any, __: Any, given: dict[str, Any]) -> None:
    _in_one_row.set(given.get("cu_seq_lens_q") is not None)


def _ends(*_: Any) -> None:
    _in_one_row.set(False)


def base_model(model: Any) -> Any:
    """The transformers model inside adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def register() -> None:
    """Make it known to transformers under its name."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(_NAME, attention)
    plain = ALL_MASK_ATTENTION_FUNCTIONS[_PLAIN]

    def mask(*args: Any, **kwargs: Any) -> Tensor | None:
        return None if _in_one_row.get() else plain(*args, **kwargs)

    ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, mask)


class _Asked(NamedTuple):
    """What a layer asks for beside queries, keys and values."""

    scale: float
    dropout: float
    odd: bool
    """Something that only the plain implementation knows."""
    ends: Tensor | None
    """Where samples in one row begin, and the last ends."""
    prefixes: Tensor | None
    """What each of them shares of another."""

    @classmethod
    def by(cls, query: Tensor, dropout: float, scaling: float | None, others: dict[str, Any]) -> Self:
        """As transformers hands it over."""
        odd = any(others.get(name) is not None for name in ("position_bias", "softcap"))
        ends, prefixes = others.get("cu_seq_lens_q"), others.get("prefixes")
        return cls(scaling or query.shape[3] ** -0.5, dropout, odd, ends, prefixes)


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface: query [B, H, T, D], key and value [B, G, T, D] -> [B, T, H, D].

    Samples that follow one another in one row have their ends in ``cu_seq_lens_q``, and what they share of others in
    ``prefixes``. What is not plain causal attention in training goes to the plain implementation, with a mask that keeps
    such samples apart.

    Raises:
        ValueError: samples share tokens, and attention is not plain: no mask of the plain implementation says that.
    """
    asked, made = _Asked.by(query, dropout, scaling, others), None
    if asked.ends is not None:
        made = _in_a_row(query, key, value, asked)
        if made is None and attention_mask is None:
            attention_mask = packed.mask(asked.ends, query.shape[2])
    elif attention_mask is None and (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        made = _in_a_batch(query, key, value, asked)
    if made is not None:
        return made, None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    plain: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **others
    )
    return plain


def _in_a_row(query: Tensor, key: Tensor, value: Tensor, asked: _Asked) -> Tensor | None:
    """By the implementation for what samples in one row need; nothing if there is none."""
    ends, scale = asked.ends, asked.scale
    assert ends is not None  # noqa: S101 or they would be no row
    if asked.prefixes is not None and (asked.odd or asked.dropout or not _on_cpu(query)):
        raise ValueError("samples share what they begin with only where attention is plain, and on a CPU")
    if asked.odd:
        return None
    if not _on_cpu(query):
        fits = _flash_attention.fits(query, value) and not asked.dropout
        return _flash_attention.attention(query, key, value, ends, scale) if fits else None
    if asked.dropout:
        return packed.dropping(query, key, value, ends, asked.dropout, scale)
    if _bf16_attention.fits(query):
        return _bf16_attention.in_a_row(query, key, value, ends, scale, asked.prefixes)
    if asked.prefixes is not None:
        return _shared_attention.attention(query, key, value, ends, asked.prefixes, scale)
    return packed.attention(query, key, value, ends, scale)


def _in_a_batch(query: Tensor, key: Tensor, value: Tensor, asked: _Asked) -> Tensor | None:
    """Causal attention by code of ours; nothing if there is none, or nothing to learn from what it gives."""
    alike = query.shape[2] == key.shape[2] > 1 and query.shape[3] == value.shape[3]
    learning = torch.is_grad_enabled() and query.requires_grad
    if not (_on_cpu(query) and alike and learning) or asked.dropout or asked.odd:
        return None
    if _bf16_attention.fits(query):
        return _bf16_attention.in_a_batch(query, key, value, asked.scale)
    out_BHTD: Tensor = _attend(query, key, value, asked.scale)[0]
    return out_BHTD.transpose(1, 2)


@torch.library.custom_op("tunewright::causal_attention", mutates_args=())
def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return _causal.forward(query, key, value, scale)


_attend.register_fake(_causal.forward)


@torch.library.custom_op("tunewright::causal_attention_backward", mutates_args=())
def _backward(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _causal.backward(query, key, value, grad, scale)


@_backward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, grad: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(t.new_empty(t.shape) for t in (query, key, value))  # type: ignore[return-value]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return *_backward(*ctx.saved_tensors, grad, ctx.scale), None


_attend.register_autograd(_differentiate, setup_context=_keep)
