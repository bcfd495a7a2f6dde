"""Greedy answers: the same in a batch as alone, up to the end token, within the context."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

from tunewright.data.rows import Message
from tunewright.data.template import ChatCodec
from tunewright.models.generate import answer, context_length

QUESTIONS = [
    "Hi", "What is two and two?", "Name a colour.", "And then? " * 12, "?",
    "Where does the cat sleep at night?", "One, two, three, four, five.", "说中文。",
]  # fmt: skip


def asked(*questions: str) -> list[tuple[Message, ...]]:
    return [(Message("user", question),) for question in questions]


@torch.no_grad()
def greedy(model: Any, codec: ChatCodec, ids: list[int], count: int) -> str:
    """The reference: one row, one token at a time, no cache, no padding."""
    said: list[int] = []
    while len(said) < count:
        token = int(model(input_ids=torch.tensor([ids + said]), use_cache=False).logits[0, -1].argmax())
        if token in codec.stop_ids:
            break
        said.append(token)
    return str(codec.tokenizer.decode(said, skip_special_tokens=True)).strip()


@pytest.fixture
def codec(tokenizer: Any) -> ChatCodec:
    return ChatCodec(tokenizer)


@pytest.fixture
def model(make_model: Callable[..., Any]) -> Any:
    return make_model()


@pytest.fixture
def parrot(make_trainer: Any) -> Any:
    """A model that has learned two answers by heart."""
    trainer = make_trainer(
        [("What is two and two?", "Four."), ("Name a colour.", "Blue is a colour.")],
        lr=0.02, max_steps=60, schedule="linear",
    )  # fmt: skip
    trainer.run()
    return trainer.model


def test_answers_in_a_batch_are_the_answers_alone(model: Any, codec: ChatCodec) -> None:
    together = answer(model, codec, asked(*QUESTIONS), max_new_tokens=12)
    alone = [answer(model, codec, [messages], max_new_tokens=12)[0] for messages in asked(*QUESTIONS)]
    assert together == alone
    assert len(set(together)) > 4


def test_answers_are_the_greedy_ones(model: Any, codec: ChatCodec) -> None:
    expected = [greedy(model, codec, codec.prompt(messages), 12) for messages in asked(*QUESTIONS)]
    for batch_size in (3, 64):
        assert answer(model, codec, asked(*QUESTIONS), 12, batch_size=batch_size) == expected


def test_an_answer_ends_at_the_end_token(parrot: Any, codec: ChatCodec) -> None:
    prompts = asked("What is two and two?", "Name a colour.")
    assert answer(parrot, codec, prompts, max_new_tokens=40) == ["Four.", "Blue is a colour."]


def test_an_answer_is_at_most_as_long_as_asked(parrot: Any, codec: ChatCodec) -> None:
    (short,) = answer(parrot, codec, asked("Name a colour."), max_new_tokens=2)
    assert "Blue is a colour.".startswith(short)
    assert 0 < len(short) < len("Blue is a colour.")


def test_a_long_prompt_is_cut_at_its_beginning(model: Any, codec: ChatCodec) -> None:
    (messages,) = asked("And what then happened to all of them? " * 60)
    ids = codec.prompt(messages)
    assert len(ids) > context_length(model) == 256
    assert answer(model, codec, [messages], max_new_tokens=8) == [greedy(model, codec, ids[-248:], 8)]


def test_answers_longer_than_the_context_leave_room_for_one_token(model: Any, codec: ChatCodec) -> None:
    model.config.max_position_embeddings = 8
    assert len(answer(model, codec, asked("Hi"), max_new_tokens=8)) == 1


def test_progress_is_told_after_every_batch(model: Any, codec: ChatCodec) -> None:
    told: list[int] = []
    answer(model, codec, asked(*QUESTIONS), max_new_tokens=1, batch_size=3, progress=told.append)
    assert told == [3, 6, 8]


def test_no_questions_have_no_answers(model: Any, codec: ChatCodec) -> None:
    assert answer(model, codec, []) == []


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(model: Any, codec: ChatCodec, training: bool) -> None:
    model.train(training)
    answer(model, codec, asked("Hi"), max_new_tokens=1)
    assert model.training == training


def test_a_model_without_a_limit_attends_to_anything() -> None:
    bloom = BloomForCausalLM(BloomConfig(vocab_size=8, hidden_size=8, n_layer=1, n_head=1))
    assert context_length(bloom) == 2**30
