"""Conversations to tokens: what is learned is exactly what the assistant said, its end token included."""

from pathlib import Path
from typing import Any

import pytest

from tunewright.core.errors import ModelError, UserError
from tunewright.data.rows import Message, Row
from tunewright.data.template import ChatCodec, template_names
from tunewright.objectives.pretrain import Config, Pretrain

SAID = ("system: Be kind.", "user: Hi", "assistant: Hello there.", "user: And 2?", "assistant: Two")
MARKS = ("{% generation %}", "{% endgeneration %}")


def talk(*turns: str, tools: str = "") -> Row:
    """A conversation from turns such as ``"user: hi"``."""
    pairs = (turn.split(": ", 1) for turn in turns)
    return Row("d.jsonl:1", tuple(Message(role, content) for role, content in pairs), tools=tools)


def learned(codec: ChatCodec, row: Row) -> str:
    """The text of the tokens that are learned."""
    ids, said = codec.encode(row)
    assert len(ids) == len(said)
    return str(codec.tokenizer.decode([token for token, yes in zip(ids, said, strict=True) if yes]))


def with_template(tokenizer: Any, template: str | None) -> ChatCodec:
    tokenizer.chat_template = template
    return ChatCodec(tokenizer)


@pytest.fixture(scope="module", params=["qwen-151k", "gpt2", "llama2-32k"])
def real_tokenizer(request: pytest.FixtureRequest, shared_fixtures: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shared_fixtures / "tokenizers" / request.param)


@pytest.fixture(scope="module")
def qwen_and_template(shared_fixtures: Path) -> tuple[Any, str]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_fixtures / "tokenizers" / "qwen-151k")
    return tokenizer, tokenizer.chat_template


@pytest.fixture
def qwen(qwen_and_template: tuple[Any, str]) -> Any:
    """A real tokenizer with its own template."""
    tokenizer, tokenizer.chat_template = qwen_and_template
    return tokenizer


# The templates we ship


TURNS = {"vicuna": " {}", "llama2": " {} "}
"""How an assistant's words stand in templates that put spaces around them."""


def test_the_templates_that_are_shipped() -> None:
    assert {"alpaca", "chatml", "llama2", "llama3", "plain", "vicuna"} <= set(template_names())


def words(template: str, end: str) -> str:
    """What must be learned of SAID."""
    turn = TURNS.get(template, "{}")
    return "".join(turn.format(said) + end for said in ("Hello there.", "Two"))


@pytest.mark.parametrize("template", template_names())
@pytest.mark.parametrize("turns", [SAID, SAID[1:]], ids=["system", "no system"])
def test_the_assistants_words_and_end_token_are_learned(
    tokenizer: Any, template: str, turns: tuple[str, ...]
) -> None:
    assert learned(ChatCodec(tokenizer, template), talk(*turns)) == words(template, "<|end|>")


@pytest.mark.parametrize("template", template_names())
def test_so_with_real_tokenizers(real_tokenizer: Any, template: str) -> None:
    end = real_tokenizer.eos_token
    said = learned(ChatCodec(real_tokenizer, template), talk(*SAID)).split(end)
    assert [turn.strip() for turn in said] == ["Hello there.", "Two", ""]


@pytest.mark.parametrize("template", template_names())
def test_the_whole_conversation_is_in_the_text(tokenizer: Any, template: str) -> None:
    text = ChatCodec(tokenizer, template).render(talk(*SAID).messages)
    places = [text.index(words) for words in ("Be kind.", "Hi", "Hello there.", "And 2?", "Two")]
    assert places == sorted(places)


@pytest.mark.parametrize("template", ["auto", *template_names()])
@pytest.mark.parametrize(
    "turns", [("user: Hi", "assistant: Hello there."), ("user: Hel", "assistant: lo there")]
)
def test_training_begins_with_the_very_tokens_that_a_prompt_has(
    tokenizer: Any, template: str, turns: tuple[str, ...]
) -> None:
    codec, row = ChatCodec(tokenizer, template), talk(*turns)
    prompt = codec.prompt(row.messages[:-1])
    ids, said = codec.encode(row)
    assert ids[: len(prompt)] == prompt
    assert said[: len(prompt) + 1] == [0] * len(prompt) + [1]


def test_chatml_is_the_one_that_qwen_has(qwen: Any) -> None:
    messages = talk(*SAID).messages
    own, ours = (
        (codec.render(messages), codec.prompt(messages[:-1]))
        for codec in (ChatCodec(qwen, name) for name in ("auto", "chatml"))
    )
    assert ours == own


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (
            "alpaca",
            "### Instruction:\nHi\n\n### Response:\nYes<|end|>\n\n### Instruction:\nAnd?\n\n### Response:\n",
        ),
        ("vicuna", " USER: Hi ASSISTANT: Yes<|end|> USER: And? ASSISTANT:"),
        ("plain", "Hi"),
    ],
)
def test_turns_are_kept_apart_as_the_template_says(tokenizer: Any, template: str, text: str) -> None:
    row = talk("user: Hi", "assistant: Yes", "user: And?")
    assert text in ChatCodec(tokenizer, template).render(row.messages, prompt=True)


@pytest.mark.parametrize(
    ("template", "preamble"),
    [
        ("alpaca", "Below is an instruction that describes a task."),
        ("vicuna", "A chat between a curious user"),
    ],
)
def test_a_system_turn_stands_for_the_templates_own(tokenizer: Any, template: str, preamble: str) -> None:
    codec = ChatCodec(tokenizer, template)
    assert codec.render(talk("user: Hi").messages).startswith(preamble)
    assert codec.render(talk("system: Be kind.", "user: Hi").messages).startswith("Be kind.")


# The tokenizer's own template


def test_auto_believes_the_generation_marks(tokenizer: Any) -> None:
    codec = ChatCodec(tokenizer)
    assert learned(codec, talk(*SAID)) == "Hello there.<|end|>Two<|end|>"
    marked = with_template(
        tokenizer,
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}({% generation %}"
        "{{ m.content }}{% endgeneration %}){% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}",
    )
    assert learned(marked, talk(*SAID)) == "Hello there.Two"


@pytest.mark.parametrize(
    "turns", [SAID, SAID[1:], SAID[:3], ("user: Two", "assistant: Two", "user: b", "assistant: b")]
)
def test_without_marks_the_same_tokens_are_found(tokenizer: Any, turns: tuple[str, ...]) -> None:
    row, marked = talk(*turns), ChatCodec(tokenizer, "chatml")
    expected = marked.encode(row)
    bare = tokenizer.chat_template
    for mark in MARKS:
        assert mark in bare
        bare = bare.replace(mark, "")
    assert with_template(tokenizer, bare).encode(row) == expected


def test_without_marks_on_a_real_tokenizer(qwen: Any) -> None:
    codec = ChatCodec(qwen)
    assert learned(codec, talk(*SAID)) == "Hello there.<|im_end|>Two<|im_end|>"
    assert codec.stop_ids == [codec.tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_white_space_after_the_last_word_is_learned_where_no_end_token_follows(tokenizer: Any) -> None:
    codec = with_template(tokenizer, "{% for m in messages %}({{ m.role }}){{ m.content }}\n{% endfor %}"
                                     "{% if add_generation_prompt %}(assistant){% endif %}")  # fmt: skip
    assert learned(codec, talk("user: Hi", "assistant: Hello", "user: b", "assistant: c")) == "Hello\nc\n"


def test_tools_reach_the_template(tokenizer: Any) -> None:
    codec = with_template(
        tokenizer, "{% if tools %}[{{ tools[0].name }}]{% endif %}" + tokenizer.chat_template
    )
    row = talk("user: Hi", "assistant: Hello", tools='[{"name": "clock"}]')
    assert codec.render(row.messages, row.tools).startswith("[clock]<|user|>Hi")
    assert learned(codec, row) == "Hello<|end|>"


# Templates that rewrite earlier turns

LAST_IS_MARKED = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and loop.last %}(last) {% endif %}"
    "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
REASONING_IS_DROPPED = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and not loop.last %}"
    "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_the_words_are_found_where_earlier_turns_are_rewritten(tokenizer: Any) -> None:
    assert (
        learned(with_template(tokenizer, LAST_IS_MARKED), talk(*SAID))
        == "Hello there.<|end|>(last) Two<|end|>"
    )


def test_a_user_who_says_the_same_is_not_learned(tokenizer: Any) -> None:
    codec, row = (
        with_template(tokenizer, LAST_IS_MARKED),
        talk("user: yes", "assistant: yes", "user: b", "assistant: c"),
    )
    ids, said = codec.encode(row)
    assert said[: len(codec.prompt(row.messages[:1]))] == [0] * len(codec.prompt(row.messages[:1]))
    assert learned(codec, row) == "yes<|end|>(last) c<|end|>"
    assert len(ids) == len(said)


def test_reasoning_that_a_template_drops_is_not_looked_for(tokenizer: Any) -> None:
    codec = with_template(tokenizer, REASONING_IS_DROPPED)
    row = talk("user: a", "assistant: <think>hm</think>yes", "user: b", "assistant: <think>so</think>no")
    assert learned(codec, row) == "yes<|end|><think>so</think>no<|end|>"


def test_a_template_that_refuses_a_row_is_told_as_the_users_to_mend(tokenizer: Any) -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    codec = with_template(tokenizer, refusing + tokenizer.chat_template)
    with pytest.raises(UserError, match="no system role"):
        codec.encode(talk(*SAID))


# Lengths and ends


def test_what_is_longer_than_max_length_is_cut_at_the_end(tokenizer: Any) -> None:
    whole = ChatCodec(tokenizer).encode(talk(*SAID))
    for length in (8, 12, len(whole.ids), 1000):
        ids, said = ChatCodec(tokenizer, max_length=length).encode(talk(*SAID))
        assert ids == whole.ids[:length]
        assert said == whole.learned[:length]


def test_many_rows_give_what_each_gives_alone(tokenizer: Any) -> None:
    codec = ChatCodec(tokenizer)
    rows = [talk(*SAID), talk("user: x", "assistant: yz"), talk(*SAID[1:3])]
    assert codec.encode_many(rows) == [codec.encode(row) for row in rows]
    assert codec.encode_many([]) == []


def test_an_answer_stops_at_the_end_token_and_at_the_templates_own(tokenizer: Any) -> None:
    assert ChatCodec(tokenizer).stop_ids == [tokenizer.eos_token_id]
    ends_otherwise = tokenizer.chat_template.replace("<|end|>", "<|user|>")
    both = sorted([tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|user|>")])
    assert with_template(tokenizer, ends_otherwise).stop_ids == both


def test_ordinary_words_do_not_stop_an_answer(tokenizer: Any) -> None:
    endless = tokenizer.chat_template.replace("<|end|>", " over")
    assert with_template(tokenizer, endless).stop_ids == [tokenizer.eos_token_id]


def test_without_a_template_an_answer_stops_at_the_end_token(tokenizer: Any) -> None:
    assert with_template(tokenizer, None).stop_ids == [tokenizer.eos_token_id]


def test_the_stop_tokens_do_not_depend_on_max_length(tokenizer: Any) -> None:
    assert ChatCodec(tokenizer, "alpaca", max_length=16).stop_ids == [tokenizer.eos_token_id]


def test_a_tokenizer_without_padding_pads_with_its_end_token(tokenizer: Any) -> None:
    assert ChatCodec(tokenizer).pad_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    tokenizer.pad_token = None
    assert ChatCodec(tokenizer).pad_id == tokenizer.eos_token_id


# Names and absence


def test_an_unknown_template_is_told_the_nearest(tokenizer: Any) -> None:
    with pytest.raises(ModelError) as caught:
        ChatCodec(tokenizer, "chatlm")
    assert str(caught.value) == "data.template: there is no template 'chatlm'; fix: did you mean 'chatml'?"


def test_a_named_template_becomes_the_tokenizers_own(tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    codec = ChatCodec(tokenizer, "chatml")
    codec.tokenizer.save_pretrained(tmp_path)
    again = ChatCodec(AutoTokenizer.from_pretrained(tmp_path))
    assert again.encode(talk(*SAID)) == codec.encode(talk(*SAID))


@pytest.mark.parametrize("nothing", [None, ""])
def test_a_missing_template_names_those_there_are(tokenizer: Any, nothing: str | None) -> None:
    codec = with_template(tokenizer, nothing)
    assert not codec.has_template
    with pytest.raises(ModelError) as caught:
        codec.require_template()
    assert str(caught.value) == (
        "data.template: the model's tokenizer has no chat template; "
        f"fix: name one: {', '.join(template_names())}"
    )
    ChatCodec(tokenizer, "plain").require_template()


@pytest.mark.parametrize("nothing", [None, ""])
def test_pretraining_on_conversations_needs_a_template_too(tokenizer: Any, nothing: str | None) -> None:
    objective = Pretrain(Config(), with_template(tokenizer, nothing))
    with pytest.raises(ModelError, match="no chat template"):
        list(objective.encode([talk(*SAID)]))
