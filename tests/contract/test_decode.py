"""Answers decoded here are those of transformers' own generate, on every architecture, and cost no more than they must."""

from types import SimpleNamespace
from typing import Any

import architectures
import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

from tunewright import methods
from tunewright.models import decode
from tunewright.models.generate import Draw, draw
from tunewright.recipes import plugin_config

CODEC = SimpleNamespace(pad_id=0, stop_ids=[7, 11])
LENGTHS = (5, 12, 9, 1)


def make(architecture: str) -> Any:
    torch.manual_seed(0)
    return architectures.ARCHITECTURES[architecture](vocab_size=60, initializer_range=0.15).eval()


def prompts() -> list[list[int]]:
    torch.manual_seed(1)
    return [torch.randint(12, 60, (length,)).tolist() for length in LENGTHS]


def theirs(model: Any, ids: list[int], longest: int) -> list[int]:
    """One prompt, no padding."""
    given = torch.tensor([ids])
    out = model.generate(
        input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=longest, do_sample=False,
        eos_token_id=CODEC.stop_ids, pad_token_id=0,
    )  # fmt: skip
    return list(out[0, len(ids) :].tolist())


@pytest.mark.parametrize("architecture", architectures.ARCHITECTURES)
def test_greedy_answers_are_those_of_generate(architecture: str) -> None:
    model = make(architecture)
    assert decode.can(model)
    expected = [theirs(model, ids, 14) for ids in prompts()]
    found = draw(model, CODEC, prompts(), Draw(1, 14, temperature=0.0))  # type: ignore[arg-type]
    assert found == expected
    thrice = draw(model, CODEC, prompts(), Draw(3, 14, temperature=0.0), batch_size=6)  # type: ignore[arg-type]
    assert thrice == [answer for answer in expected for _ in range(3)]


def test_rows_that_have_ended_leave() -> None:
    """Tokens in turn end one row after another."""
    model, seen = make("llama"), list[int]()
    model.model.register_forward_hook(lambda m, args, out: seen.append(len(out[0])))
    script = iter([[7, 20, 20, 20], [20, 20, 11], [20, 7], [7]])

    def choose(logits_NV: torch.Tensor) -> torch.Tensor:
        return torch.tensor(next(script))

    ids_BT = torch.tensor([ids[:1] * 5 for ids in prompts()])
    found = decode.decode(model, ids_BT, torch.ones_like(ids_BT), 1, 9, CODEC.stop_ids, choose)
    assert found == [[7], [20, 20, 20, 7], [20, 20, 7], [20, 11]]
    assert seen == [4, 4, 3, 2, 1]  # the prompts, then a token at a time


def test_a_prompt_is_read_once_for_all_its_answers() -> None:
    model, seen = make("llama"), list[tuple[int, ...]]()
    model.model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    ids = [ids * 3 for ids in prompts()[:2]]
    draw(model, CODEC, ids, Draw(5, 3))  # type: ignore[arg-type]
    assert seen == [(2, 35), (10, 1), (10, 1), (10, 1)]


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_tokens_are_drawn_as_often_as_they_are_likely(top_p: float) -> None:
    torch.manual_seed(0)
    logits_V = torch.randn(40) * 2
    exact_V = (logits_V / 0.7).softmax(-1)
    order = exact_V.argsort(descending=True)
    kept = order[: int((exact_V[order].cumsum(0) < top_p).sum()) + 1]
    expected_V = torch.zeros(40).index_copy(0, kept, exact_V[kept])
    expected_V = expected_V / expected_V.sum()
    count = 200_000
    found = torch.cat([decode.at_random(0.7, top_p)(logits_V.expand(20_000, 40)) for _ in range(10)])
    counts_V = torch.bincount(found, minlength=40)
    assert not counts_V[expected_V == 0].any()
    assert ((counts_V - count * expected_V).abs() <= 4.5 * (count * expected_V).sqrt() + 1).all()


def test_words_without_a_chance_are_never_drawn() -> None:
    logits_NV = torch.full((10_000, 5), -torch.inf)
    logits_NV[:, 2] = 0.0
    assert (decode.at_random(1.0, 1.0)(logits_NV) == 2).all()


def test_weights_are_looked_at_once_a_stretch(monkeypatch: pytest.MonkeyPatch) -> None:
    """LoRA's matrices beside the weights are made anew for each pass of training, and once for all of an answer."""
    from pathlib import Path

    from tunewright import fast
    from tunewright.fast import lora_linear

    choice = {"name": "lora", "rank": 4}
    model = methods.create(choice, plugin_config("methods", choice)).apply(make("llama"))
    batch = {"input_ids": torch.tensor([prompts()[0]])}
    portion = fast.Portion(64, 64, lambda tokens: 0.0, lambda tokens: None)
    work = fast.Work(model, 10, 100, 1.0, lambda: iter([batch]), Path("unused"), portion)
    looked: list[int] = []
    plain = lora_linear._refresh
    monkeypatch.setattr(lora_linear, "_refresh", lambda groups: (looked.append(1), plain(groups)))
    with lora_linear.LoraLinear().on(work):
        first = draw(model, CODEC, prompts(), Draw(1, 8, temperature=0.0))  # type: ignore[arg-type]
        assert len(looked) == 1
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.5)
        second = draw(model, CODEC, prompts(), Draw(1, 8, temperature=0.0))  # type: ignore[arg-type]
        assert len(looked) == 2
        model(input_ids=batch["input_ids"])
        model(input_ids=batch["input_ids"])
        assert len(looked) == 4
    assert first != second
    assert second == draw(model, CODEC, prompts(), Draw(1, 8, temperature=0.0))  # type: ignore[arg-type]


def test_a_model_that_takes_no_positions_is_left_to_transformers() -> None:
    config = {
        "vocab_size": 60,
        "hidden_size": 32,
        "n_layer": 2,
        "n_head": 4,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(**config)).eval()
    assert not decode.can(model)
    found = draw(model, CODEC, prompts(), Draw(2, 6, temperature=0.0))  # type: ignore[arg-type]
    assert found == [theirs(model, ids, 6) for ids in prompts() for _ in range(2)]
