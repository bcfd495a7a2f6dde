"""Prompts and prefixes: the same as real tokens before the input, as PEFT's own, and as without every shortcut."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from architectures import ARCHITECTURES
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from training import same, weights
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from tunewright import jobs, methods, recipes
from tunewright.compress import merge
from tunewright.core.errors import ModelError, RecipeError
from tunewright.data.rows import Message
from tunewright.data.template import ChatCodec
from tunewright.methods import _prefixes, _prompts
from tunewright.models import anatomy
from tunewright.models.generate import answer, context_length
from tunewright.models.load import find, load_model
from tunewright.objectives.sft import Config, Sft
from tunewright.recipes import plugin_config

VOCAB, LENGTH = 64, 5
KINDS = ("llama", "qwen2", "mixtral", "gpt2", "gpt-neo")
EMBEDDED: dict[str, dict[str, Any]] = {
    "prompt": {"name": "prompt"},
    "p_tuning": {"name": "p_tuning"},
    "p_tuning-lstm": {"name": "p_tuning", "encoder": "lstm", "hidden_size": 12, "lstm_layers": 3},
}
PREFIXED: dict[str, dict[str, Any]] = {
    "prefix": {"name": "prefix", "hidden_size": 24},
    "p_tuning_v2": {"name": "p_tuning_v2"},
}
ALL = {**EMBEDDED, **PREFIXED}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_method = pytest.mark.parametrize("name", ALL)


def base(kind: str, **own: Any) -> Any:
    """A tiny model with fixed random weights."""
    torch.manual_seed(0)
    model = ARCHITECTURES[kind](
        vocab_size=VOCAB, initializer_range=0.2, bos_token_id=None, eos_token_id=2, pad_token_id=0, **own
    )
    return model.eval()


def made(name: str, **options: Any) -> methods.Method:
    choice = {"length": LENGTH, **ALL[name], **options}
    return methods.create(choice, plugin_config("methods", choice))


def prompted(name: str, kind: str, **own: Any) -> Any:
    """A prompt of random numbers before a tiny model."""
    model = made(name).apply(base(kind, **own))
    torch.manual_seed(1)
    return model


def some_ids(*shape: int, seed: int = 2) -> torch.Tensor:
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def close(one: torch.Tensor, other: torch.Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(one, other, atol=atol, rtol=0)


def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and mask, padded at the left."""
    longest = max(map(len, rows))
    ids = [[0] * (longest - len(row)) + row for row in rows]
    return torch.tensor(ids), torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])


@torch.no_grad()
def greedy(model: Any, ids: list[int], count: int) -> list[int]:
    """The reference: one row, one token at a time, without cache or padding."""
    said = list(ids)
    for _ in range(count):
        out = model(input_ids=torch.tensor([said]), use_cache=False)
        said.append(int(out.logits[0, -1].argmax()))
    return said[len(ids) :]


# The same as real tokens before the input: mask, positions, heads and layout are the model's own


@every_kind
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@torch.no_grad()
def test_a_prefix_that_starts_from_tokens_is_those_tokens(kind: str, use_cache: bool, masked: bool) -> None:
    ids = some_ids(2, 9)
    torch.manual_seed(7)
    start = _prompts.common_tokens(base(kind), LENGTH)
    expected = base(kind)(input_ids=torch.cat([start.expand(2, -1), ids], dim=1)).logits[:, LENGTH:]
    torch.manual_seed(7)
    model = made("p_tuning_v2").apply(base(kind))
    mask = {"attention_mask": torch.ones_like(ids)} if masked else {}
    close(model(input_ids=ids, use_cache=use_cache, **mask).logits, expected)
    assert (base(kind)(input_ids=ids).logits - expected).abs().max() > 0.01


@every_kind
@torch.no_grad()
def test_a_prompt_that_starts_from_words_is_those_words(kind: str) -> None:
    method, ids, start = made("prompt", init="text", text="a b"), some_ids(2, 9), [7, 9, 7, 9, 7]
    model = method.apply(base(kind))
    tokenizer = lambda text, add_special_tokens: {"input_ids": [7, 9]}  # noqa: E731
    method.begin(model, SimpleNamespace(codec=SimpleNamespace(tokenizer=tokenizer)))
    expected = base(kind)(input_ids=torch.cat([torch.tensor([start] * 2), ids], dim=1)).logits[:, LENGTH:]
    close(model(input_ids=ids, use_cache=False).logits, expected)


@pytest.mark.parametrize("init", ["vocab", "random"])
def test_a_prompt_starts_where_embeddings_are(init: str) -> None:
    model = base("llama")
    table = model.get_input_embeddings().weight.detach()
    rows = made("prompt", init=init, length=200).apply(model).prompt_encoder.default.embedding.weight.detach()
    assert float(rows.std()) == pytest.approx(float(table.std()), rel=0.05)
    found = (rows[:, None] == table[None]).all(-1).any(1)
    assert bool(found.all()) == (init == "vocab")


@pytest.mark.parametrize("options", [{"init": "text"}, {"text": "words"}])
def test_text_and_the_start_that_uses_it_belong_together(options: dict[str, str]) -> None:
    with pytest.raises(RecipeError, match="init: text and text belong together"):
        made("prompt", **options)


def test_text_without_tokens() -> None:
    method = made("prompt", init="text", text=" ")
    nothing = SimpleNamespace(codec=SimpleNamespace(tokenizer=lambda *_, **__: {"input_ids": []}))
    with pytest.raises(ModelError, match=r"method\.text"):
        method.begin(method.apply(base("llama")), nothing)


@every_method
@every_kind
@torch.no_grad()
def test_a_caller_sees_its_own_tokens_only(name: str, kind: str) -> None:
    model, ids = prompted(name, kind), some_ids(2, 9)
    out = model(input_ids=ids, use_cache=False, output_hidden_states=True)
    assert out.logits.shape == (2, 9, VOCAB)
    assert {states.shape[1] for states in out.hidden_states} == {9}
    embeds = model.get_base_model().get_input_embeddings()(ids)
    close(model(inputs_embeds=embeds, use_cache=False).logits, out.logits)
    close(model(input_ids=ids, use_cache=False, logits_to_keep=2).logits, out.logits[:, -2:])
    kept = model(input_ids=ids, use_cache=False, logits_to_keep=torch.tensor([1, 4]))
    close(kept.logits, out.logits[:, [1, 4]])


@every_method
@every_kind
@torch.no_grad()
def test_padding_at_the_left_changes_nothing_where_positions_are_given(name: str, kind: str) -> None:
    model = prompted(name, kind)
    (ids, mask), row = padded([some_ids(4).tolist(), some_ids(9).tolist()]), some_ids(4)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    close(out.logits[0, -4:], model(input_ids=row[None], use_cache=False).logits[0])


@every_method
@torch.no_grad()
def test_without_its_adapter_the_model_is_its_base(name: str) -> None:
    model, ids = prompted(name, "llama"), some_ids(1, 6)
    plain = base("llama")
    with model.disable_adapter():
        close(model(input_ids=ids).logits, plain(input_ids=ids).logits)
        close(model.generate(ids, max_new_tokens=4), plain.generate(ids, max_new_tokens=4))
    assert (model(input_ids=ids).logits - plain(input_ids=ids).logits).abs().max() > 1e-3


@every_method
def test_samples_packed_into_one_row_are_refused(name: str) -> None:
    model, ids = prompted(name, "llama"), some_ids(1, 6)
    with pytest.raises(ModelError, match="packed into one row"):
        model(input_ids=ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))
    with pytest.raises(ModelError, match="packed into one row"):
        model(input_ids=ids, attention_mask=torch.ones(1, 1, 6, 6))


# The same as PEFT's


@every_method
@every_kind
@torch.no_grad()
def test_peft_reads_what_is_saved(tmp_path: Path, name: str, kind: str) -> None:
    method, ids = made(name), some_ids(2, 9)
    model = method.apply(base(kind))
    method.export(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base(kind), tmp_path)
    expected = theirs(input_ids=ids, use_cache=False).logits[:, -9:]
    close(model.eval()(input_ids=ids, use_cache=False).logits, expected)
    close(type(method).load(base(kind), tmp_path)(input_ids=ids, use_cache=False).logits, expected)


THEIRS: dict[str, Callable[[], Any]] = {
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=LENGTH, task_type="CAUSAL_LM"),
    "p_tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=LENGTH, task_type="CAUSAL_LM"),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=LENGTH, task_type="CAUSAL_LM"),
}


@pytest.fixture
def of_peft(tiny_model_folder: Path, make_model: Any, tmp_path: Path) -> Callable[[str], Path]:
    """``of_peft(name)`` is an adapter that PEFT made of this method, with numbers of its own."""

    def make(name: str) -> Path:
        model = peft.get_peft_model(make_model(), THEIRS[name]())
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


@pytest.mark.parametrize("name", THEIRS)
@torch.no_grad()
def test_what_peft_saved_is_loaded(of_peft: Any, make_model: Any, name: str) -> None:
    folder, ids = of_peft(name), some_ids(2, 9)
    manifest = methods.foreign_manifest(folder)
    assert manifest["method"] == name
    model, _ = methods.load_adapter(folder, manifest, "fp32")
    expected = peft.PeftModel.from_pretrained(make_model(), folder)(input_ids=ids, use_cache=False)
    close(model(input_ids=ids).logits, expected.logits[:, -9:])
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


# What is trained, and what is saved of it


@every_method
@every_kind
@pytest.mark.parametrize("projection", [True, False])
def test_the_count_is_that_of_what_is_trained(name: str, kind: str, projection: bool) -> None:
    method = made(name, **({"projection": projection} if name in PREFIXED else {}))
    with torch.device("meta"):
        outline = base(kind)
    assert not method.problems(outline)
    model = method.apply(base(kind))
    trained = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    assert all(n.startswith("prompt_encoder.") for n in trained)
    assert method.count(outline) == sum(trained.values()) > 0


@every_method
def test_the_prompt_is_saved_and_not_its_encoder(tmp_path: Path, name: str) -> None:
    method = made(name)
    model = method.apply(base("llama"))
    method.export(model, tmp_path)
    (rows,) = load_file(tmp_path / "adapter_model.safetensors").values()
    width = 2 * 2 * 2 * 8 if name in PREFIXED else 32  # 2 layers with 2 key and 2 value heads of 8, not 4
    assert rows.shape == (LENGTH, width)
    assert method.saved(model) == rows.numel()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


@every_method
def test_prompts_have_the_dtype_of_the_base(tmp_path: Path, name: str) -> None:
    method = made(name)
    model = method.apply(base("llama").bfloat16())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    logits = model.train()(input_ids=some_ids(2, 9), use_cache=False).logits
    logits.float().logsumexp(-1).mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    method.export(model, tmp_path)
    again = type(method).load(base("llama").bfloat16(), tmp_path)
    close(again(input_ids=some_ids(2, 9)).logits, logits.detach())


@every_method
def test_training_resumes_bit_for_bit(make_trainer: Any, tmp_path: Path, name: str) -> None:
    method = {**ALL[name], "length": LENGTH}
    if name == "prompt":
        method |= {"init": "text", "text": "Answer in one word."}
    whole = make_trainer(method=method, max_steps=4, save_every=2, folder="whole")
    whole.run()
    (tmp_path / "half").mkdir()
    last = shutil.ignore_patterns("step-00000004", "events.jsonl")
    shutil.copytree(tmp_path / "whole", tmp_path / "half", dirs_exist_ok=True, ignore=last)
    resumed = make_trainer(method=method, max_steps=4, save_every=2, folder="half")
    resumed.run()
    assert resumed.state.step == 4
    assert same(weights(whole), weights(resumed))


@pytest.mark.parametrize("name", ["prompt", "p_tuning", "prefix", "p_tuning_v2"])
def test_a_prompt_cannot_be_merged(make_model: Any, tokenizer: Any, tmp_path: Path, name: str) -> None:
    method = made(name)
    model = method.apply(make_model())
    with pytest.raises(ModelError, match="a prompt is input that was trained"):
        merge.merge(model, type(method), ChatCodec(tokenizer), tmp_path / "merged", torch.float32)
    assert not (tmp_path / "merged").exists()
    assert not method.starts_equal


# Gradient checkpointing


def gradients(model: Any, *batches: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    """Of one backward pass through forward passes over all of these."""
    model.zero_grad()
    loss = torch.zeros(())
    for ids in batches:
        logits = model(input_ids=ids, use_cache=False).logits
        loss = loss + F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.fixture
def computed() -> Iterator[Callable[[Any], list[int]]]:
    """``computed(model)`` has an entry for every time that a feed-forward layer of it is computed."""
    handles: list[Any] = []

    def watch(model: Any) -> list[int]:
        seen: list[int] = []
        blocks = [block for _, block in anatomy.blocks(model)]
        handles.extend(block.mlp.register_forward_pre_hook(lambda *_: seen.append(1)) for block in blocks)
        return seen

    yield watch
    for handle in handles:
        handle.remove()


@every_method
@every_kind
def test_recomputed_activations_give_the_same_gradients(computed: Any, name: str, kind: str) -> None:
    model = prompted(name, kind).train()
    batches = some_ids(3, 9), some_ids(2, 6, seed=3)  # two passes of other shapes before one backward
    seen = computed(model)
    loss, expected = gradients(model, *batches)
    once = len(seen)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    again, found = gradients(model, *batches)
    assert len(seen) - once == 2 * once == 8
    assert again == pytest.approx(loss, abs=1e-6)
    for key, gradient in expected.items():
        close(found[key], gradient, 1e-6)
        assert gradient.abs().max() > 1e-5


# Generation


@every_method
@every_kind
def test_answers_in_a_padded_batch_are_the_greedy_ones(name: str, kind: str) -> None:
    model = prompted(name, kind)
    rows = [some_ids(length, seed=length).tolist() for length in (3, 7, 12)]
    expected = [greedy(model, row, 8) for row in rows]
    ids, mask = padded(rows)
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None,
        pad_token_id=0, use_cache=True,
    )  # fmt: skip
    assert torch.equal(out[:, :12], ids)
    assert out[:, 12:].tolist() == expected


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        ("gpt-neo", {"window_size": 8}),
        ("mixtral", {"sliding_window": 8}),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}),
    ],
)
@pytest.mark.parametrize("name", ["prompt", "p_tuning_v2"])
def test_a_window_looks_past_padding_to_the_prompt(name: str, kind: str, own: dict[str, Any]) -> None:
    model = prompted(name, kind, **own)
    rows = [some_ids(length, seed=length).tolist() for length in (3, 7, 12, 7)]
    ids, mask = padded(rows)
    out = model.generate(ids, mask, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert out[:, 12:].tolist() == [greedy(model, row, 8) for row in rows]


def test_rows_that_end_early_are_padded(make_model: Any) -> None:
    model = prompted("p_tuning_v2", "gpt-neo", window_size=8)
    rows = [some_ids(length, seed=length).tolist() for length in (4, 9)]
    first, second = (greedy(model, row, 6) for row in rows)
    stop = next(token for token in second if token not in first)
    ids, mask = padded(rows)
    out = model.generate(ids, mask, max_new_tokens=6, do_sample=False, eos_token_id=stop, pad_token_id=1)
    cut = second[: second.index(stop) + 1]
    assert out[:, 9:].tolist() == [first, cut + [1] * (6 - len(cut))]


@every_method
@every_kind
@torch.no_grad()
def test_a_cache_that_is_handed_on_has_the_prompt(name: str, kind: str) -> None:
    model, row = prompted(name, kind), some_ids(6).tolist()
    out = model(input_ids=torch.tensor([row]), use_cache=True)
    said = [int(out.logits[0, -1].argmax())]
    for _ in range(5):
        step = torch.tensor([said[-1:]])
        out = model(input_ids=step, past_key_values=out.past_key_values, use_cache=True)
        said.append(int(out.logits[0, -1].argmax()))
    assert said == greedy(model, row, 6)


@every_method
def test_conversations_are_answered_as_one_by_one(make_model: Any, tokenizer: Any, name: str) -> None:
    model, codec = made(name).apply(make_model()).eval(), ChatCodec(tokenizer)
    asked = [(Message("user", text),) for text in ("Hi", "What is two and two?", "And then? " * 9)]
    alone = [greedy(model, codec.prompt(messages), 12) for messages in asked]
    stops = [next((i for i, t in enumerate(said) if t in codec.stop_ids), 12) for said in alone]
    expected = [
        tokenizer.decode(said[:end], skip_special_tokens=True).strip()
        for said, end in zip(alone, stops, strict=True)
    ]
    assert answer(model, codec, asked, 12) == expected


# The context that is left


@every_method
def test_a_prompt_takes_from_the_context(tokenizer: Any, name: str) -> None:
    model = ARCHITECTURES["gpt2"](vocab_size=len(tokenizer), eos_token_id=None)
    assert context_length(model) == 256
    model = made(name).apply(model)
    assert context_length(model) == 256 - LENGTH
    model(input_ids=torch.ones(1, 256 - LENGTH, dtype=torch.long))
    with pytest.raises(IndexError):
        model(input_ids=torch.ones(1, 257 - LENGTH, dtype=torch.long))
    answer(model, ChatCodec(tokenizer), [(Message("user", "And then? " * 200),)], 16)


@every_method
def test_samples_are_cut_to_what_the_prompt_leaves(
    tiny_model_folder: Path, tmp_path: Path, name: str
) -> None:
    talk = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes. " * 400}]}
    (tmp_path / "data.jsonl").write_text(json.dumps(talk) + "\n")
    recipe = recipes.load(
        {
            "model": str(tiny_model_folder), "output": str(tmp_path / "run"),
            "data": {"train": str(tmp_path / "data.jsonl"), "valid_share": 0}, "method": {**ALL[name], "length": 20},
        }
    )  # fmt: skip
    (job,) = jobs.check(recipe)
    assert job.codec.max_length == int(job.data.lengths.max()) == 256 - 20


@every_method
@pytest.mark.parametrize(("length", "fits"), [(248, True), (249, False)])
def test_a_prompt_that_fills_the_context_is_refused(name: str, length: int, fits: bool) -> None:
    found = made(name, length=length).problems(base("llama"))
    assert [problem.where for problem in found] == [] if fits else ["method.length"]


# What cannot be served


@pytest.mark.parametrize("name", PREFIXED)
def test_a_prefix_longer_than_a_window_is_refused(name: str) -> None:
    method = made(name, length=8)
    assert not method.problems(base("gpt-neo", window_size=9))
    (problem,) = method.problems(base("gpt-neo", window_size=8))
    assert (problem.where, "looks back 8" in problem.what) == ("method.length", True)


def test_layers_without_attention_take_no_prefix() -> None:
    mamba = MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, state_size=4))
    (problem,) = made("prefix").problems(mamba)
    assert problem.what == "mamba: backbone.layers.0 is no layer that a prefix can stand before"
    assert not made("prompt").problems(mamba)


def test_other_kinds_of_attention_take_no_prefix() -> None:
    model = base("qwen2")
    model.config.layer_types = ["linear_attention", "full_attention"]
    (problem,) = made("prefix").problems(model)
    assert "linear_attention is no attention" in problem.what


def odd_models() -> dict[str, Any]:
    small = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    latent = DeepseekV3Config(
        **small, num_key_value_heads=4, intermediate_size=32, moe_intermediate_size=16, n_routed_experts=4,
        num_experts_per_tok=2, n_group=1, topk_group=1, kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=8,
        qk_rope_head_dim=4, v_head_dim=8, first_k_dense_replace=1,
    )  # fmt: skip
    shared = FalconConfig(**small, multi_query=True, new_decoder_architecture=False, alibi=False)
    return {"deepseek": DeepseekV3ForCausalLM(latent), "falcon": FalconForCausalLM(shared)}


@pytest.mark.parametrize("kind", ["deepseek", "falcon"])
@pytest.mark.parametrize("name", PREFIXED)
def test_keys_of_another_shape_than_pefts_are_refused(kind: str, name: str) -> None:
    with pytest.raises(ModelError, match="keeps keys and values in another shape"):
        made(name).apply(odd_models()[kind])


def test_models_that_take_tokens_only_are_refused() -> None:
    model = base("llama")
    model.config.hidden_size_per_layer_input = 8
    (problem,) = made("prompt").problems(model)
    assert "takes tokens only" in problem.what


# Adapters made to do harm, or for something else


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_virtual_tokens": 10**9}, {"num_virtual_tokens": LENGTH - 1}, {"num_virtual_tokens": None},
        {"num_virtual_tokens": "5"}, {"num_virtual_tokens": -5}, {"token_dim": 10**9}, {"num_layers": 10**9},
        {"num_attention_heads": 10**9}, {"num_transformer_submodules": 10**9}, {"encoder_num_layers": 10**9},
        {"encoder_hidden_size": 10**9}, {"encoder_hidden_size": "wide"}, {"peft_type": "LORA"},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("name", THEIRS)
def test_numbers_that_the_weights_do_not_bear_out(
    of_peft: Any, make_model: Any, name: str, changes: dict[str, Any]
) -> None:
    folder = of_peft(name)
    edit(folder, **changes)
    with pytest.raises(ModelError) as refused:
        methods.kind(name).load(make_model(), folder)
    assert next(iter(changes)).removeprefix("peft_") in str(refused.value)


@pytest.mark.parametrize("name", THEIRS)
def test_an_encoder_wider_than_the_prompt_is_nothing_to_refuse(
    of_peft: Any, make_model: Any, name: str
) -> None:
    folder = of_peft(name)
    edit(folder, encoder_hidden_size=1024)
    methods.kind(name).load(make_model(), folder)


BROKEN: dict[str, dict[str, torch.Tensor]] = {
    "another name": {"prompt": torch.ones(LENGTH, 32)},
    "another width": {"prompt_embeddings": torch.ones(LENGTH, 31)},
    "a vector": {"prompt_embeddings": torch.ones(LENGTH)},
    "no rows": {"prompt_embeddings": torch.ones(0, 32)},
    "no numbers": {"prompt_embeddings": torch.ones(LENGTH, 32, dtype=torch.bool)},
    "something besides": {"prompt_embeddings": torch.ones(LENGTH, 32), "lm_head.weight": torch.ones(LENGTH)},
}


@pytest.mark.parametrize("what", BROKEN)
def test_weights_that_are_no_prompt_for_this_base(of_peft: Any, make_model: Any, what: str) -> None:
    folder = of_peft("prompt")
    edit(folder, token_dim=None, num_layers=None, num_attention_heads=None)
    save_file(BROKEN[what], folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"expected prompt_embeddings \[length, 32\]"):
        methods.kind("prompt").load(make_model(), folder)


@pytest.mark.parametrize("name", PREFIXED)
def test_a_prefix_of_another_model_is_refused(tmp_path: Path, name: str) -> None:
    method = made(name)
    method.export(method.apply(base("gpt2")), tmp_path)
    with pytest.raises(
        ModelError, match=r"prompt_embeddings \[5, 128\] F32; expected prompt_embeddings \[length, 64\]"
    ):
        type(method).load(base("llama"), tmp_path)


def test_a_prompt_longer_than_the_context_of_its_base_is_refused(tmp_path: Path) -> None:
    method = made("prompt", length=100)
    method.export(method.apply(base("llama")), tmp_path)
    short = base("llama")
    short.config.max_position_embeddings = 100
    with pytest.raises(ModelError, match="leaves no room in a context of 100"):
        type(method).load(short, tmp_path)


def test_a_strangers_tokenizer_is_never_looked_for(
    of_peft: Any, make_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    looked: list[str] = []
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name, **_: looked.append(name))
    folder = of_peft("prompt")
    edit(folder, prompt_tuning_init="TEXT", prompt_tuning_init_text="x", inference_mode=False,
         tokenizer_name_or_path="evil/evil", tokenizer_kwargs={"trust_remote_code": True})  # fmt: skip
    assert methods.kind("prompt").load(make_model(), folder).virtual_tokens == LENGTH
    assert not looked


# Learning


@pytest.mark.parametrize("name", ["prompt", "p_tuning", "prefix", "p_tuning_v2"])
def test_the_built_in_model_learns_at_the_default_rate(make_mixture: Any, tokenizer: Any, name: str) -> None:
    talks = [("What is two and two?", "Four."), ("Who are you?", "A small model, made for tests.")]
    samples, method = (
        make_mixture(talks),
        methods.create({"name": name}, plugin_config("methods", {"name": name})),
    )
    objective = Sft(Config(), ChatCodec(tokenizer))
    torch.manual_seed(0)
    model = method.apply(load_model(find("builtin:pico"))).train()
    batch = objective.collate([samples[i] for i in range(len(samples))])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=method.default_lr)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss, _ = objective.loss(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0], losses


def test_shapes_are_of_keys_and_not_of_queries() -> None:
    assert _prefixes.shape(base("llama")) == (2, 2, 8)
    assert _prefixes.shape(base("gpt2")) == (2, 4, 8)
    assert _prefixes.shape(base("gpt-neo")) == (2, 4, 8)
