"""Losses against transformers' own, padding without a mask, packing."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tunewright import objectives
from tunewright.core import plugins
from tunewright.core.errors import Problem
from tunewright.data import formats, lint
from tunewright.data.rows import Message, Row, Source
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
    blocks = list(make("pretrain", tokenizer, block=32, across=True).encode(Row("", text=t) for t in texts))
    end = [tokenizer.eos_token_id]
    expected = [i for t in texts for i in tokenizer(t, add_special_tokens=False)["input_ids"] + end]
    assert [len(b["input_ids"]) for b in blocks[:-1]] == [32] * (len(blocks) - 1)
    assert np.concatenate([b["input_ids"] for b in blocks]).tolist() == expected
    assert all(b["learned"].all() for b in blocks)


def test_texts_share_no_block_but_the_paragraphs_of_one_file_do(tokenizer):
    texts = [f"Text number {n} is here." for n in range(6)]
    counts = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in texts]
    pretrain = make("pretrain", tokenizer, block=64)
    apart = list(pretrain.encode(Row(f"a.jsonl:{n}", text=t) for n, t in enumerate(texts, 1)))
    assert [len(sample["input_ids"]) for sample in apart] == counts
    assert [sample[ORIGIN].tolist() for sample in apart] == [[n, n] for n in range(1, 7)]
    book = [Row(f"{'ab'[n > 3]}.txt:{n}", text=t, prose=True) for n, t in enumerate(texts, 1)]
    assert [len(sample["input_ids"]) for sample in pretrain.encode(book)] == [
        sum(counts[:3]),
        sum(counts[3:]),
    ]


def test_a_long_text_goes_on_in_the_next_block(tokenizer):
    text = "One two three four five six. " * 8
    samples = list(make("pretrain", tokenizer, block=16).encode([Row("", text=text), Row("", text="Seven.")]))
    expected = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert (
        np.concatenate([sample["input_ids"] for sample in samples[:-1]]).tolist()[: len(expected)] == expected
    )
    assert tokenizer.decode(samples[-1]["input_ids"][:-1]) == "Seven."


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
    blocks = list(make("pretrain", tokenizer, block=16, across=True).encode(rows))
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


# Noise, and what counts


def test_noise_is_as_transformers_has_it(tokenizer, make_model):
    from transformers.integrations.neftune import neftune_post_forward_hook

    sft, model = make("sft", tokenizer, neftune=5.0), make_model().train()
    batch = sft.collate(list(sft.encode(TALKS[:1] * 3)))
    batch["length"] = torch.full((3,), batch["input_ids"].shape[1])
    torch.manual_seed(1)
    ours, _ = sft.loss(model, batch)
    embeddings = model.get_input_embeddings()
    embeddings.neftune_noise_alpha = 5.0
    hook = embeddings.register_forward_hook(neftune_post_forward_hook)
    torch.manual_seed(1)
    theirs, _ = make("sft", tokenizer).loss(model, batch)
    hook.remove()
    plain, _ = make("sft", tokenizer).loss(model, batch)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    assert abs(ours.item() - plain.item()) > 1e-5


def test_a_sample_has_the_noise_of_its_own_length(tokenizer, make_model):
    """Not of the row that it is padded or packed into."""
    sft, model = make("sft", tokenizer, neftune=5.0), make_model().train()
    samples = list(sft.encode(TALKS))
    lengths_B = torch.tensor([len(s["input_ids"]) for s in samples])
    batch = {**sft.collate(samples), "length": lengths_B}
    seen = []
    hook = model.model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args or tuple(kwargs.values()))[0].detach()), with_kwargs=True
    )
    from tunewright.fast.packing import in_one_row
    from tunewright.objectives._noise import on_embeddings

    for given in (batch, in_one_row(batch)):
        rows = {name: given[name] for name in ("input_ids", "position_ids") if name in given}
        model(**rows)
        with on_embeddings(model, 5.0, batch):
            model(**rows)
    hook.remove()
    moved_BTD, moved_1MD = seen[1] - seen[0], seen[3] - seen[2]
    width, start = moved_BTD.shape[2], 0
    for b, length in enumerate(lengths_B.tolist()):
        reach = 5.0 / (length * width) ** 0.5
        for part in (moved_BTD[b, :length], moved_1MD[0, start : start + length]):
            assert 0.95 * reach < float(part.abs().max()) <= reach * 1.001
        start += length
    assert not moved_1MD[0, start:].any()


def test_there_is_no_noise_outside_of_training(tokenizer, make_model):
    model = make_model().eval()
    batch = (sft := make("sft", tokenizer, neftune=5.0)).collate(list(sft.encode(TALKS)))
    assert sft.loss(model, batch)[0].item() == make("sft", tokenizer).loss(model, batch)[0].item()


def test_surprising_tokens_count_less_under_dft(tokenizer, make_model):
    model = make_model().train()
    batch = (sft := make("sft", tokenizer, dft=True)).collate(list(sft.encode(TALKS)))
    logits_BTV = model(input_ids=batch["input_ids"]).logits.double()
    kept = batch["labels"] != -100
    logs_N = logits_BTV[kept].log_softmax(-1).gather(1, batch["labels"][kept][:, None])[:, 0]
    assert sft.loss(model, batch)[0].item() == pytest.approx(-(logs_N.exp() * logs_N).mean().item(), rel=1e-5)
    model.eval()
    assert sft.loss(model, batch)[0].item() == pytest.approx(-logs_N.mean().item(), rel=1e-5)


# The page

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("objectives_page", ROOT / "scripts/objectives_page.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.mark.parametrize(("language", "name"), [("en", "objectives.md"), ("zh", "objectives.zh-CN.md")])
def test_the_page_of_objectives_is_what_its_script_writes(script, language, name):
    expected = script.page(language)
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == expected, "run scripts/objectives_page.py"
    assert set(script.ROWS) == {objectives.kind(name).wants for name in plugins.names("objectives")}


@pytest.mark.parametrize("wants", ["texts", "conversations", "pairs", "verdicts", "labels"])
def test_the_rows_that_the_page_shows_are_read(script, tokenizer, tmp_path, wants):
    path = tmp_path / "shown.json"
    path.write_text(json.dumps([script.ROWS[wants]]))
    for name in plugins.names("objectives"):
        if objectives.kind(name).wants == wants:
            options = {"labels": ("complaint", "praise")} if wants == "labels" else {}
            options = {"teacher": "model:x"} if name == "distill" else options
            (sample,) = make(name, tokenizer, **options).encode(lint.check(formats.read(Source(path))))
            assert not isinstance(sample, Problem), (name, sample)
