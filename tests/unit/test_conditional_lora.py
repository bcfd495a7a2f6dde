"""C-LoRA: which prompt goes to which adapter, and that this is the same in training, generation and after loading."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from training import same, weights
from transformers.pytorch_utils import Conv1D

import tunewright as tw
from tunewright import methods
from tunewright.core.errors import ModelError, RecipeError
from tunewright.data.rows import Message, Row
from tunewright.data.template import ChatCodec
from tunewright.methods import Clock, Setting
from tunewright.methods._mixture import Group, MixedLinear, MixtureConfig, Router, one_each
from tunewright.methods.conditional_lora import ConditionalLora, extract
from tunewright.models.anatomy import Linear
from tunewright.models.announce import ROUTER, announced
from tunewright.models.generate import answer
from tunewright.objectives.sft import Config as SftConfig
from tunewright.objectives.sft import Sft
from tunewright.recipes import plugin_config

CLOCK = Clock(0, 1, 0)
RULES = {"sums": ["sum", "总和", "how many"], "chinese": ["script:han"]}
RULED = {"router": "rule", "adapters": ["plain", "chinese", "sums"], "rules": RULES, "rank": 4}
ASKED = {
    "What is two and two?": "plain",
    "你好，你是谁？": "chinese",
    "Give me the sum of 2 and 3.": "sums",
    "SUM: 4 and 5": "sums",
    "一加二的总和是多少？": "sums",
    "How many cats are there?": "sums",
    "Is it summer in China?": "plain",
    "Which word means 猫 in English, please?": "plain",
    "?": "plain",
}


def method(**options: Any) -> ConditionalLora:
    choice = {"name": "conditional_lora", **options}
    return ConditionalLora(plugin_config("methods", choice))


@pytest.fixture
def codec(tokenizer: Any) -> ChatCodec:
    return ChatCodec(tokenizer)


@pytest.fixture
def make(make_model: Callable[..., Any], codec: ChatCodec) -> Callable[..., Any]:
    """``make(**options)`` is the tiny model with random adapters, its rules compiled, and the method."""

    def adapted(**options: Any) -> tuple[Any, ConditionalLora]:
        made = method(**options)
        torch.manual_seed(1)
        model = made.apply(make_model())
        made.begin(model, Setting(codec, lambda: iter(()), CLOCK))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.3)
        return model.eval(), made

    return adapted


def prompts(codec: ChatCodec, *questions: str) -> tuple[Tensor, Tensor]:
    """Left-padded ids and their mask [B, T]."""
    rows = [codec.prompt((Message("user", question),)) for question in questions]
    longest = max(map(len, rows))
    ids_BT = torch.tensor([[codec.pad_id] * (longest - len(ids)) + ids for ids in rows])
    return ids_BT, torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in rows])


@torch.no_grad()
def logits(model: Any, ids_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    return model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits


def router(model: Any) -> Any:
    return model.get_submodule(ROUTER)


def chosen(model: Any, rows: int) -> list[str]:
    """The adapter of each row in the last forward pass."""
    names = [""] * rows
    for group in router(model).routes.groups:
        for row in range(rows) if group.rows is None else group.rows.tolist():
            names[row] += router(model).names[group.adapter]
    return names


def gates(model: Any) -> Tensor:
    """The weights [B, K] of the last forward pass."""
    return torch.stack([group.gates for group in router(model).routes.groups], dim=1)


def close(one: Tensor, other: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(one, other, atol=atol, rtol=0)


# The layer


class Fixed(Router):
    """Whatever it is told."""


@pytest.mark.parametrize("conv1d", [False, True])
def test_a_layer_adds_each_adapters_term_by_the_rows_own_weight(conv1d: bool) -> None:
    torch.manual_seed(0)
    base = Conv1D(5, 3) if conv1d else nn.Linear(3, 5)
    fixed = Fixed(("a", "b", "c"), MixtureConfig(rank=2, alpha=6))
    layer = MixedLinear(base, Linear("x", 3, 5, True, conv1d), base.weight.detach(), fixed)
    for B_OR in layer.lora_B:
        nn.init.normal_(B_OR)
    x_BTI, g_BK = torch.randn(4, 7, 3), torch.rand(4, 3)
    deltas = [
        6 / 2 * B_OR.double() @ A_RI.double() for A_RI, B_OR in zip(layer.lora_A, layer.lora_B, strict=True)
    ]
    expected = base(x_BTI).double()
    for k, delta_OI in enumerate(deltas):
        expected += g_BK[:, k, None, None] * (x_BTI.double() @ delta_OI.T)
    fixed.routes.rows = 4
    fixed.routes.groups = tuple(Group(k, None, g_BK[:, k]) for k in range(3))
    close(layer(x_BTI).double(), expected)
    close(layer(x_BTI.reshape(-1, 3)).double(), expected.reshape(-1, 5))  # positions in one row
    fixed.routes.groups = one_each(torch.tensor([2, 0, 2, 1]), 3)
    each = torch.stack([x.double() @ deltas[k].T for x, k in zip(x_BTI, [2, 0, 2, 1], strict=True)])
    close(layer(x_BTI).double(), base(x_BTI).double() + each)


def test_a_row_is_answered_the_same_in_a_mixed_batch_as_alone(make: Any, codec: ChatCodec) -> None:
    model, _ = make(**RULED)
    together = logits(model, *prompts(codec, *ASKED))
    assert chosen(model, len(ASKED)) == list(ASKED.values())
    for row, question in enumerate(ASKED):
        alone = logits(model, *prompts(codec, question))[0]
        close(together[row, -len(alone) :], alone)


def test_adapters_differ_and_an_untrained_one_changes_nothing(
    make: Any, make_model: Any, codec: ChatCodec
) -> None:
    ids, mask = prompts(codec, "What is two and two?", "Give me the sum.", "你好吗？")
    plain, (model, _) = logits(make_model().eval(), ids, mask), make(**RULED)
    assert (logits(model, ids, mask) - plain)[:, -1].abs().amax(-1).min() > 1e-3
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B.2"):
            nn.init.zeros_(parameter)
    close(logits(model, ids, mask)[1], plain[1], 0)


# Where a prompt goes


@pytest.mark.parametrize("options", [{}, {"mix": "top-1"}, RULED], ids=["soft", "top-1", "rule"])
def test_training_routes_a_conversation_as_its_first_question_alone(
    make: Any, codec: ChatCodec, options: dict[str, Any]
) -> None:
    """The answers, in which the words of rules stand, are not seen."""
    model, _ = make(**options)
    sft = Sft(SftConfig(), codec)
    talks = [
        (q, "The sum, 你好。", "How many?", "Five.") if n % 2 else (q, "It is 你.")
        for n, q in enumerate(ASKED)
    ]
    roles = ("user", "assistant") * 2
    rows = [Row("", tuple(map(Message, roles, talk))) for talk in talks]
    batch = sft.batch(list(sft.encode(rows)), torch.device("cpu"))
    with torch.no_grad(), announced(model, batch):
        sft.loss(model, batch)
    learned = gates(model) if options == {} else chosen(model, len(rows))
    logits(model, *prompts(codec, *ASKED))
    if options == {}:
        close(learned, gates(model), 1e-6)
        assert learned.std(0).min() > 1e-3
    else:
        assert learned == chosen(model, len(rows))
        assert len(set(learned)) > 1
    # The same at inference, where the later turns stand in the prompt.
    for talk, row in zip(talks, rows, strict=True):
        ids = torch.tensor([codec.prompt(row.messages[:-1])])
        logits(model, ids)
        n = talks.index(talk)
        if options == {}:
            close(gates(model)[0], learned[n], 1e-6)
        else:
            assert chosen(model, 1) == [learned[n]]


@pytest.mark.parametrize("options", [{}, RULED], ids=["soft", "rule"])
def test_labels_tell_where_a_prompt_ends_whatever_the_template(
    make: Any, codec: ChatCodec, options: dict[str, Any]
) -> None:
    model, _ = make(**options)
    sft = Sft(SftConfig(), codec)
    rows = [Row("", (Message("user", q), Message("assistant", "The sum, 你好" * 3))) for q in ASKED]
    batch = sft.batch(list(sft.encode(rows)), torch.device("cpu"))
    router(model).rules.opening = torch.empty(0, dtype=torch.int64)  # as if none had been found
    read = (lambda: gates(model)) if options == {} else (lambda: chosen(model, len(rows)))
    with torch.no_grad(), announced(model, batch):
        sft.loss(model, batch)
    learned = read()
    logits(model, batch["input_ids"])
    with_answers = read()
    logits(model, *prompts(codec, *ASKED))
    if options == {}:
        close(learned, read(), 1e-6)
        assert (with_answers - learned).abs().max() > 1e-3
    else:
        assert learned == read() == list(ASKED.values()) != with_answers


def test_a_batch_is_forgotten_after_its_passes(make: Any) -> None:
    model, _ = make(**RULED)
    with announced(model, {"labels": torch.zeros(1, 3)}):
        assert router(model).batch
    assert not router(model).batch


def test_a_cache_keeps_the_choice_that_was_made_for_its_prompt(make: Any, codec: ChatCodec) -> None:
    """Two conversations take turns; the words of other adapters come up in the answers."""
    model, _ = make(**RULED)
    questions = [
        ("What is two and two?", "你好 sum"),
        ("你好，你是谁？", "The sum is"),
        ("The sum?", "Five 五"),
    ]
    caches = []
    for question, _ in questions:
        ids, _ = prompts(codec, question)
        with torch.no_grad():
            caches.append(model(input_ids=ids, use_cache=True).past_key_values)
    said = [codec.tokenizer(words, add_special_tokens=False)["input_ids"] for _, words in questions]
    for at in range(3):
        for (question, _), cache, ids in zip(questions, caches, said, strict=True):
            with torch.no_grad():
                step = model(input_ids=torch.tensor([[ids[at]]]), past_key_values=cache).logits[0, -1]
            assert chosen(model, 1) == [ASKED.get(question, "sums")]
            whole = torch.tensor([codec.prompt((Message("user", question),)) + ids[: at + 1]])
            close(step, logits(model, whole)[0, -1])


@pytest.mark.parametrize("options", [{}, {"mix": "top-1"}, RULED], ids=["soft", "top-1", "rule"])
def test_answers_are_the_same_in_a_batch_as_alone(make: Any, codec: ChatCodec, options: Any) -> None:
    model, _ = make(**options)
    asked = [(Message("user", question),) for question in ASKED]
    together = answer(model, codec, asked, 8)
    assert together == [answer(model, codec, [one], 8)[0] for one in asked]
    assert len(set(together)) > 3


def test_without_ids_there_is_nothing_to_go_by(make: Any) -> None:
    model, _ = make()
    with pytest.raises(ValueError, match="goes by input_ids"):
        model(inputs_embeds=torch.zeros(1, 2, 32))


# Rules


def test_the_first_rule_that_applies_counts_else_the_default(make: Any, codec: ChatCodec) -> None:
    rules = {"b": ["cat"], "c": ["cat", "dog"]}
    model, _ = make(router="rule", adapters=["a", "b", "c"], rules=rules, default="c")
    logits(model, *prompts(codec, "A cat and a dog", "a dog", "the Cat", "a bird"))
    assert chosen(model, 4) == ["b", "c", "b", "c"]


def test_a_script_is_that_of_most_tokens_the_templates_own_not_counted(make: Any, codec: ChatCodec) -> None:
    rules = {"zh": ["script:han"], "en": ["script:latin"]}
    model, _ = make(router="rule", adapters=["other", "zh", "en"], rules=rules)
    logits(model, *prompts(codec, "说", "Translate this word: 猫", "1 + 2 = ?", "用中文回答 OK"))
    assert chosen(model, 4) == ["zh", "en", "other", "zh"]


def test_a_rule_longer_than_the_prompt_does_not_apply(make: Any) -> None:
    model, _ = make(**RULED)
    logits(model, torch.tensor([[5], [6]]))
    assert chosen(model, 2) == ["plain", "plain"]


@pytest.mark.parametrize(
    ("word", "told"), [("assistant", "every prompt"), ("user", "every prompt"), ("sum", None)]
)
def test_a_word_of_the_template_is_refused(
    make_model: Any, codec: ChatCodec, word: str, told: str | None
) -> None:
    codec.tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    made = method(router="rule", adapters=["a", "b"], rules={"b": [word]})
    model = made.apply(make_model())
    setting = Setting(codec, lambda: iter(()), CLOCK)
    if told is None:
        made.begin(model, setting)
        return
    with pytest.raises(RecipeError, match=rf"method.rules.b: the chat template puts '{word}' into {told}"):
        made.begin(model, setting)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"router": "rule"}, "rules are for router: rule, and it needs some"),
        ({"rules": {"a1": ["x"]}}, "rules are for router: rule"),
        ({"router": "rule", "rules": {"b": ["x"]}}, "there is no adapter 'b'; one of a1, a2"),
        ({"default": "a3"}, "there is no adapter 'a3'"),
        ({"router": "rule", "rules": {"a1": ["script:hen"]}}, "did you mean 'script:han'"),
        ({"adapters": ["a", "a"]}, "expected names that differ"),
        ({"adapters": []}, "at least one"),
        ({"adapters": ["../x"]}, "string should match pattern"),
        ({"adapters": 0}, "greater than or equal to 1"),
    ],
)
def test_what_does_not_fit_together_is_told(options: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        method(**options)


def test_layers_that_the_model_lacks_are_refused(make_model: Any) -> None:
    with pytest.raises(ModelError, match="no layer of the model has such a name"):
        method(target_modules=["query"]).apply(make_model())


# The learned router


def test_a_learned_router_is_a_softmax_of_the_centred_mean_embedding(make: Any, codec: ChatCodec) -> None:
    model, made = make(adapters=3)
    sft = Sft(SftConfig(), codec)
    rows = [Row("", (Message("user", q), Message("assistant", "Yes."))) for q in ASKED]
    samples = list(sft.encode(rows))
    batches = [sft.batch(samples[:4], torch.device("cpu")), sft.batch(samples[4:], torch.device("cpu"))]
    made.begin(model, Setting(codec, lambda: iter(batches), CLOCK))
    table_VD = model.get_input_embeddings().weight.detach().double()
    means_BD = torch.stack([table_VD[codec.prompt(row.messages[:1])].mean(0) for row in rows])
    x_BD = means_BD - means_BD.mean(0)
    x_BD = (x_BD - x_BD.mean(1, keepdim=True)) / (x_BD.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    own = router(model)
    expected = (x_BD @ own.weight.double().T + own.bias.double()).softmax(1)
    logits(model, *prompts(codec, *ASKED))
    close(gates(model).double(), expected)


def test_top_1_counts_whole_in_training_and_its_gradient_is_that_of_the_probabilities(
    make: Any, codec: ChatCodec
) -> None:
    model, made = make(mix="top-1")
    ids, mask = prompts(codec, *ASKED)
    asked = logits(model, ids, mask)
    model.train()
    made.before_step(model, CLOCK)
    out = model(input_ids=ids, attention_mask=mask).logits
    assert set(gates(model).detach().unique().tolist()) == {0.0, 1.0}
    close(out.detach(), asked)
    out[:, -1].square().mean().backward()
    assert router(model).weight.grad.abs().max() > 0


def test_the_penalty_is_the_switch_transformers(make: Any, codec: ChatCodec) -> None:
    """alpha·N·Σ f_i·P_i over all rows of the step, however they are cut into parts."""
    model, made = make(adapters=3, balance=0.5)
    model.train()
    made.before_step(model, CLOCK)
    assert made.penalty(model, CLOCK) is None  # nothing was seen yet
    questions, p = list(ASKED), []
    for part in (questions[:2], questions[2:]):
        model(input_ids=prompts(codec, *part)[0], attention_mask=prompts(codec, *part)[1])
        p.append(gates(model).detach().double())
    p_NK = torch.cat(p)
    share_K = torch.bincount(p_NK.argmax(1), minlength=3) / len(p_NK)
    expected = 0.5 * 3 * float((share_K * p_NK.mean(0)).sum())
    penalty = made.penalty(model, CLOCK)
    assert float(penalty.detach()) == pytest.approx(expected, abs=1e-6)
    penalty.backward()
    assert router(model).bias.grad.abs().max() > 0
    logits(model.eval(), *prompts(codec, *ASKED))  # measuring is no part of the step
    assert len(router(model).seen) == 2


def test_no_penalty_without_weight_or_router(make: Any, codec: ChatCodec) -> None:
    for options in ({"balance": 0}, RULED):
        model, made = make(**options)
        model.train()(input_ids=prompts(codec, "Hi")[0])
        assert made.penalty(model, CLOCK) is None


# In a run


@pytest.mark.parametrize("options", [{}, {"mix": "top-1"}, RULED], ids=["soft", "top-1", "rule"])
def test_the_shares_are_those_of_the_rows_also_after_a_stop(make_trainer: Any, options: Any) -> None:
    choice = {"name": "conditional_lora", **options}
    whole = make_trainer(method=choice, max_steps=6, lr=0.01, folder="whole")
    whole.run()
    make_trainer(method=choice, max_steps=6, lr=0.01, folder="cut", save_every=2).run()
    shares = whole.method.report(whole.model)["chosen"]
    assert sum(shares.values()) == pytest.approx(1)
    cut = make_trainer(method=choice, max_steps=6, lr=0.01, folder="cut", save_every=2)
    shutil.rmtree(cut.folder / "checkpoints" / "step-00000006")
    cut.run()
    assert cut.method.report(cut.model)["chosen"] == shares
    assert same(weights(cut), weights(whole))


def test_a_state_that_was_not_declared_is_refused(make: Any) -> None:
    _, made = make()
    with pytest.raises(ValueError, match="declares the state chosen, found other"):
        made.set_state({"other": torch.zeros(1)})


# On disk


@pytest.mark.parametrize("options", [{}, {"mix": "top-1", "adapters": ["x", "y", "z"]}, RULED])
def test_what_is_loaded_routes_the_same_without_a_tokenizer(
    make: Any, make_model: Any, codec: ChatCodec, tmp_path: Path, options: Any
) -> None:
    model, made = make(**options)
    made.export(model, tmp_path)
    again = ConditionalLora.load(make_model(), tmp_path).eval()
    close(logits(again, *prompts(codec, *ASKED)), logits(model, *prompts(codec, *ASKED)), 1e-6)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.pop(f"{ROUTER}.rules.opening"), "holds the rules"),
        (
            lambda t: t.update({f"{ROUTER}.rules.script": torch.zeros(9, dtype=torch.uint8)}),
            "script is not shaped",
        ),
        (lambda t: t.update({f"{ROUTER}.rules.opening": torch.zeros(1)}), "opening is not shaped"),
        (
            lambda t: t.update({f"{ROUTER}.rules.several_sums": torch.zeros(3, dtype=torch.int64)}),
            "several_sums",
        ),
        (lambda t: t.popitem(), "holds .* numbers, expected"),
    ],
)
def test_damaged_rules_are_told(make: Any, make_model: Any, tmp_path: Path, change: Any, told: str) -> None:
    model, made = make(**RULED)
    made.export(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = dict(sorted(load_file(path).items(), key=lambda item: item[0].startswith(f"{ROUTER}.")))
    tensors = dict(reversed(tensors.items()))  # what is popped last is an adapter's
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=told):
        ConditionalLora.load(make_model(), tmp_path)


@pytest.mark.parametrize("name", ["plain", "chinese", "sums"])
def test_one_adapter_alone_is_an_ordinary_lora(
    make: Any, make_model: Any, codec: ChatCodec, tmp_path: Path, name: str
) -> None:
    model, _ = make(**RULED)
    extract(model, name, tmp_path)
    alone = PeftModel.from_pretrained(make_model(), tmp_path).eval()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 16)
    ids, mask = prompts(codec, *(question for question, to in ASKED.items() if to == name))
    expected = logits(model, ids, mask)
    close(logits(alone, ids, mask)[mask > 0], expected[mask > 0])
    reloaded, _ = methods.load_adapter(tmp_path, methods.foreign_manifest(tmp_path), "fp32")
    close(logits(reloaded, ids, mask)[mask > 0], expected[mask > 0])


def test_an_adapter_that_is_not_there_cannot_be_extracted(make: Any, tmp_path: Path) -> None:
    model, _ = make(**RULED)
    with pytest.raises(ModelError, match="there is no adapter 'sum'; fix: did you mean 'sums'"):
        extract(model, "sum", tmp_path)


def test_a_run_from_recipe_to_answer(tiny_model_folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"Say {n}.", "completion": f"{n} it is"} for n in range(20)]
    rows += [{"prompt": f"请说{n}。", "completion": f"是{n}"} for n in range(20)]
    data = tmp_path / "my.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    choice = {
        "name": "conditional_lora",
        "adapters": ["en", "zh"],
        "router": "rule",
        "rules": {"zh": ["script:han"]},
    }
    run = tw.run(
        {
            "model": str(tiny_model_folder), "data": {"train": str(data), "valid_share": 0.2}, "method": choice,
            "precision": "fp32", "train": {"max_steps": 6, "lr": 1e-2, "tokens_per_batch": 256},
            "evaluate": {"max_new_tokens": 4}, "output": str(tmp_path / "run"),
        },
        quiet=True,
    )  # fmt: skip
    (stage,) = run.results["stages"]
    assert stage["after"]["loss"] < stage["before"]["loss"]
    shares = stage["method_report"]["chosen"]
    assert shares["en"] + shares["zh"] == pytest.approx(1)
    assert min(shares.values()) > 0.2
    run.generate("请说3。", 2)
    assert chosen(run.speaker.model, 1) == ["zh"]
    run.generate("Say 3.", 2)
    assert chosen(run.speaker.model, 1) == ["en"]
    with pytest.raises(ModelError, match="which adapter counts depends on the prompt"):
        ConditionalLora.merge(run.speaker.model)
