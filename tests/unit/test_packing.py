"""Samples in one row: none sees another, each has the loss that it has alone, and what cannot be packed is not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from techniques import SHAPE, VOCABULARY, assert_near, batch, learn, watched, work
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from tunewright import methods
from tunewright.data.tokens import LENGTH
from tunewright.fast import _packed_attention as packed
from tunewright.fast.packing import Packing, in_one_row
from tunewright.models import likelihood
from tunewright.recipes import plugin_config

GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256,
        "initializer_range": 0.2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "bos_token_id": None,
        "eos_token_id": None}  # fmt: skip
CHUNKS = {"attention_chunk_size": 16, "head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 48}
MAKERS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=16)),
    "chunks": lambda: Llama4ForCausalLM(Llama4TextConfig(**SHAPE, **CHUNKS)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2, attn_pdrop=0.0)),
    "gpt2 with dropout": lambda: GPT2LMHeadModel(GPT2Config(**GPT2, attn_pdrop=0.5)),
}
every_kind = pytest.mark.parametrize("kind", MAKERS)
SHORT, LONG = (5, 9, 16, 12), (40, 17, 64, 3)


def make(kind: str) -> Any:
    torch.manual_seed(0)
    return MAKERS[kind]().train()


def by_sample(losses_N: Tensor, given: dict[str, Tensor]) -> list[Tensor]:
    counts_B = (given["labels"] != likelihood.IGNORED).sum(1)
    return list(losses_N.split(counts_B.tolist()))


def losses(model: Any, given: dict[str, Tensor], seed: int = 3) -> list[Tensor]:
    torch.manual_seed(seed)
    return by_sample(likelihood.token_losses(model, given).detach(), given)


def test_the_row() -> None:
    given = batch(5, 300, 2)
    row = in_one_row(given)
    assert {name: tuple(x.shape) for name, x in row.items()} == {
        "input_ids": (1, 320), "labels": (1, 320), "position_ids": (1, 320), "cu_seq_lens_q": (4,),
    }  # fmt: skip
    assert row["cu_seq_lens_q"].tolist() == [0, 5, 305, 307]
    assert row["position_ids"][0, :307].tolist() == [*range(5), *range(300), *range(2)]
    expected = torch.cat([given["input_ids"][0, :5], given["input_ids"][1], given["input_ids"][2, :2]])
    assert torch.equal(row["input_ids"][0, :307], expected)
    row_M, labels_BT = row["labels"][0], given["labels"]
    assert torch.equal(row_M[row_M != likelihood.IGNORED], labels_BT[labels_BT != likelihood.IGNORED])
    assert (row_M[307:] == likelihood.IGNORED).all()


@pytest.mark.parametrize(
    ("lengths", "whole"),
    [((1,), 16), ((16,), 16), ((9, 8), 32), ((100, 156), 256), ((256, 1), 288), ((512,), 512), ((500, 413), 960),
     ((1024,), 1024), ((1000, 900, 149), 2304)],
)  # fmt: skip
def test_a_row_is_filled_to_one_of_few_lengths(lengths: tuple[int, ...], whole: int) -> None:
    assert in_one_row(batch(*lengths))["input_ids"].shape == (1, whole)


def test_lengths_may_lie_elsewhere_than_tokens() -> None:
    """On the CPU, as a training's do, where tokens are on a GPU: no value of theirs is asked for."""
    given = {name: x if name == LENGTH else x.to("meta") for name, x in batch(5, 300, 2).items()}
    for row in in_one_row(given), in_one_row(given, [1, 1, 1], [3, 0, 1]):
        assert {x.device.type for x in row.values()} == {"meta"}
        assert row["input_ids"].shape[1] in (304, 320)


@every_kind
@pytest.mark.parametrize("lengths", [SHORT, LONG])
def test_no_sample_sees_another(kind: str, lengths: tuple[int, ...]) -> None:
    model, given, other = make(kind), batch(*lengths), batch(*lengths, seed=1)
    with Packing().on(work(model)):
        before = losses(model, given)
        for changed in range(len(lengths)):
            ids_BT = given["input_ids"].clone()
            ids_BT[changed] = other["input_ids"][changed]
            after = losses(model, {**given, "input_ids": ids_BT})
            moved = [i for i, pair in enumerate(zip(before, after, strict=True)) if not torch.allclose(*pair)]
            assert moved == [changed]


@pytest.mark.parametrize("kind", [kind for kind in MAKERS if "dropout" not in kind])
@pytest.mark.parametrize("lengths", [SHORT, LONG, (7,), (256,), (256, 8)])
def test_losses_and_gradients_are_those_of_the_padded_batch_in_its_order(
    kind: str, lengths: tuple[int, ...]
) -> None:
    """Also where samples are longer than a window, which the samples looked at before are not."""
    model, given = make(kind), batch(*lengths)
    assert Packing().why_not(work(model)) == ""
    plain = learn(model, given)
    with Packing().on(work(model)):
        assert_near(learn(model, given), plain)


@pytest.mark.parametrize(("longest", "packed"), [(16, True), (17, False)])
def test_samples_that_fill_a_window_are_packed_and_longer_ones_are_not(longest: int, packed: bool) -> None:
    model, given = make("mistral"), batch(longest, 4, 4)
    with Packing().on(work(model)), watched() as seen:
        learn(model, given)
    assert ("tunewright::packed_attention_backward" in seen.called) == packed


def test_dropout_of_attention_stays() -> None:
    model, given = make("gpt2 with dropout"), batch(*SHORT)
    assert Packing().why_not(work(model)) == ""
    with Packing().on(work(model)):
        first, again, other = (losses(model, given, seed) for seed in (1, 1, 2))
        measured = losses(model.eval(), given)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.allclose, first, other))
    for own, plain in zip(measured, losses(model, given), strict=True):
        torch.testing.assert_close(own, plain)


def test_dropout_keeps_the_scores_of_each_sample_and_not_of_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def noted(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        asked.append(query.shape[2])
        return plain(query, *args, **kwargs)

    model, given = make("gpt2 with dropout"), batch(*SHORT)
    assert Packing().why_not(work(model)) == ""
    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", noted)
    with Packing().on(work(model)):
        learn(model.train(), given)
    assert asked
    assert max(asked) <= -(-max(SHORT) // 32) * 32


@pytest.mark.parametrize("groups", [4, 2])
def test_dropping_nothing_is_plain_attention(groups: int) -> None:
    ends = torch.tensor([0, 5, 17, 20], dtype=torch.int32)
    q, k, v = (torch.randn(1, heads, 24, 8, requires_grad=True) for heads in (4, groups, groups))
    grad = torch.randn(1, 24, 4, 8)
    grad[:, 20:] = 0  # tokens of no sample
    ways = packed.attention(q, k, v, ends, 0.3), packed.dropping(q, k, v, ends, 0.0, 0.3)
    found = [[out, *torch.autograd.grad(out, (q, k, v), grad)] for out in ways]
    for own, expected in zip(*found, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)


def test_a_batch_that_does_not_tell_its_lengths_goes_the_padded_way() -> None:
    model = make("llama").eval()
    given = {name: x for name, x in batch(*SHORT).items() if name != LENGTH}
    with torch.no_grad():
        plain = likelihood.token_losses(model, given)
        with Packing().on(work(model)):
            assert torch.equal(likelihood.token_losses(model, given), plain)
    assert "apart" in Packing().why_not(work(model, given))


REFUSED = {
    "conditional_lora": (
        {"router": "rule", "adapters": ["a", "b"], "rules": {"b": ["sum"]}},
        "chosen for each sample",
    ),
    "prompt": ({}, "does not keep samples in one row apart"),
    "p_tuning_v2": ({}, "does not keep samples in one row apart"),
}


@pytest.mark.parametrize("lengths", [(9, 12), (9,), (16,)])
@pytest.mark.parametrize("name", REFUSED)
def test_methods_for_which_a_sample_is_more_than_its_tokens(name: str, lengths: tuple[int, ...]) -> None:
    options, reason = REFUSED[name]
    choice = {"name": name, **options}
    torch.manual_seed(0)
    model = methods.create(choice, plugin_config("methods", choice)).apply(make("llama"))
    assert reason in Packing().why_not(work(model, batch(*lengths)))


def test_a_model_whose_attention_cannot_be_exchanged_is_refused() -> None:
    model = make("llama")
    model.set_attn_implementation("eager")
    assert Packing().why_not(work(model)) == "the model's attention is eager"


def test_the_mask_of_a_row_is_each_samples_own_and_causal() -> None:
    seen = packed.mask(torch.tensor([0, 2, 5], dtype=torch.int32), 6)[0, 0].int().tolist()
    assert seen == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],  # what fills up the row
    ]
