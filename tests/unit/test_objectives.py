"""Losses against transformers' own, padding without a mask, packing."""

import numpy as np
import pytest
import torch

from tunewright import objectives
from tunewright.core.errors import Problem
from tunewright.data.rows import Message, Row
from tunewright.data.template import ChatCodec
from tunewright.data.tokens import ORIGIN
from tunewright.recipes import plugin_config


def make(name, tokenizer, max_length=1024, **options):
    choice = {"name": name, **options}
    return objectives.create(
        choice, plugin_config("objectives", choice), ChatCodec(tokenizer, max_length=max_length)
    )


def talk(question, answer):
    return Row("", (Message("user", question), Message("assistant", answer)))


TALKS = [
    talk("Hi", "Hello."),
    talk("What falls from the sky?", "Rain falls, and sometimes snow."),
    talk("1", "2"),
]


def test_sft_loss_is_transformers_own_with_an_attention_mask(tokenizer, make_model):
    """We give no mask; under causal attention right padding cannot matter."""
    model, sft = make_model(), make("sft", tokenizer)
    samples = list(sft.encode(TALKS))
    batch = sft.collate(samples)
    ours, _ = sft.loss(model, batch)
    lengths = torch.tensor([len(s["input_ids"]) for s in samples])
    mask = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
    labels = batch["input_ids"].clone()
    for i, sample in enumerate(samples):
        learned = torch.zeros(labels.shape[1], dtype=torch.bool)
        learned[: len(sample["learned"])] = torch.from_numpy(sample["learned"] > 0)
        labels[i, ~learned] = -100
    theirs = model(input_ids=batch["input_ids"], attention_mask=mask, labels=labels).loss
    assert torch.allclose(ours, theirs, atol=1e-6, rtol=0)


def test_a_batch_is_the_weighted_mean_of_its_samples(tokenizer, make_model):
    model, sft = make_model(), make("sft", tokenizer)
    samples = list(sft.encode(TALKS))
    alone = [sft.collate([s]) for s in samples]
    weights = [sft.weight(b) for b in alone]
    with torch.no_grad():
        together = float(sft.loss(model, sft.collate(samples))[0])
        parts = [float(sft.loss(model, b)[0]) * w for b, w in zip(alone, weights, strict=True)]
    assert together == pytest.approx(sum(parts) / sum(weights), abs=1e-6)
    assert sft.weight(sft.collate(samples)) == sum(weights)


def test_sft_refuses_texts_and_answers_that_do_not_fit(tokenizer):
    rows = [Row("a:1", text="prose"), talk("long " * 50, "x"), talk("hi", "ok")]
    found = list(make("sft", tokenizer, max_length=16).encode(rows))
    assert [isinstance(f, Problem) for f in found] == [True, True, False]
    assert "sft learns conversations" in found[0].what
    assert "no assistant token is left within max_length 16" in found[1].what


def test_pretraining_packs_every_token_in_order(tokenizer):
    texts = [f"Text number {n} is here." for n in range(40)]
    blocks = list(make("pretrain", tokenizer, block=32).encode(Row("", text=t) for t in texts))
    end = [tokenizer.eos_token_id]
    expected = [i for t in texts for i in tokenizer(t, add_special_tokens=False)["input_ids"] + end]
    assert [len(b["input_ids"]) for b in blocks[:-1]] == [32] * (len(blocks) - 1)
    assert np.concatenate([b["input_ids"] for b in blocks]).tolist() == expected
    assert all(b["learned"].all() for b in blocks)


def test_pretraining_loss_is_transformers_own(tokenizer, make_model):
    model, pretrain = make_model(), make("pretrain", tokenizer, block=16)
    batch = pretrain.collate(list(pretrain.encode([Row("", text="One two three four five six. " * 8)]))[:3])
    ours, _ = pretrain.loss(model, batch)
    theirs = model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
    assert torch.allclose(ours, theirs, atol=1e-6, rtol=0)
    assert pretrain.weight(batch) == 3 * 15


def test_pretraining_on_conversations_uses_the_template(tokenizer):
    block = next(iter(make("pretrain", tokenizer, block=64).encode([TALKS[1]])))
    assert "<|assistant|>Rain falls" in tokenizer.decode(block["input_ids"])


# Where samples come from


@pytest.mark.parametrize(
    ("where", "line"), [("a.jsonl:3", 3), ("C:/x:12", 12), ("a.parquet", 0), ("", 0), ("a:b", 0), ("a:", 0)]
)
def test_the_line_of_a_place(where, line):
    assert objectives.line_of(where) == line


def test_an_sft_sample_knows_its_line(tokenizer):
    rows = [Row(f"my.jsonl:{line}", talk("Hi", "Hello.").messages) for line in (4, 9)]
    samples = list(make("sft", tokenizer).encode(rows))
    assert [sample[ORIGIN].tolist() for sample in samples] == [[4], [9]]


def test_a_packed_block_knows_its_first_and_last_line(tokenizer):
    rows = [Row(f"book.txt:{line}", text=f"Sentence {line} is here.") for line in range(10, 30)]
    blocks = list(make("pretrain", tokenizer, block=16).encode(rows))
    counts = [len(tokenizer(row.text, add_special_tokens=False)["input_ids"]) + 1 for row in rows]
    line_of_token = np.repeat(np.arange(10, 30), counts)
    starts = np.cumsum([0, *(len(block["input_ids"]) for block in blocks)])
    for block, start, end in zip(blocks, starts[:-1], starts[1:], strict=True):
        assert block[ORIGIN].tolist() == [line_of_token[start], line_of_token[end - 1]]
    assert blocks[0][ORIGIN].tolist()[0] == 10
    assert blocks[-1][ORIGIN].tolist()[1] == 29


@pytest.mark.parametrize("name", ["sft", "pretrain"])
def test_the_origin_is_no_part_of_a_batch(tokenizer, name):
    objective = make(name, tokenizer)
    rows = [Row("a:7", text="Some words.")] if name == "pretrain" else TALKS
    assert objective.collate(list(objective.encode(rows))).keys() == {"input_ids", "labels"}


# State


def test_an_objective_without_state_takes_none(tokenizer):
    sft = make("sft", tokenizer)
    assert sft.state() == {}
    sft.set_state({})
    with pytest.raises(ValueError, match="Sft declares no state, found baseline"):
        sft.set_state({"baseline": torch.zeros(1)})
