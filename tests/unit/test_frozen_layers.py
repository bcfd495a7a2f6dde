"""States of frozen blocks that are kept: the same losses and gradients, and nothing below is run again."""

import re
import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training import killed_and_whole, logged
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tunewright import methods
from tunewright.core.errors import StorageError
from tunewright.data.tokens import LENGTH, SAMPLE
from tunewright.fast import Portion, Work, _lower_blocks
from tunewright.fast._kept_states import KeptStates
from tunewright.fast._lower_blocks import LowerBlocks
from tunewright.fast.frozen_layers import FrozenLayers
from tunewright.fast.packing import Packing, in_one_row
from tunewright.methods import Clock
from tunewright.models import anatomy, likelihood
from tunewright.models.announce import announced
from tunewright.recipes import plugin_config

Batch = Mapping[str, Tensor]
VOCABULARY, LAYERS = 96, 4
SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
         "initializer_range": 0.1}  # fmt: skip
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64,
        "initializer_range": 0.1, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # fmt: skip
GPT_NEO = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": LAYERS, "num_heads": 4, "window_size": 4,
           "attention_types": [[["global", "local"], 2]], "max_position_embeddings": 64,
           "initializer_range": 0.1, "intermediate_size": 64}  # fmt: skip
MAKERS: dict[str, Callable[..., Any]] = {
    "llama": lambda **own: LlamaForCausalLM(LlamaConfig(**SHAPE, **own)),
    "gpt2": lambda **own: GPT2LMHeadModel(GPT2Config(**{**GPT2, **own})),
    "gpt-neo": lambda **own: GPTNeoForCausalLM(GPTNeoConfig(**{**GPT_NEO, **own})),
    "qwen2": lambda **own: Qwen2ForCausalLM(Qwen2Config(**SHAPE, **own)),
    "mixtral": lambda **own: MixtralForCausalLM(
        MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2, **own)
    ),
}
LENGTHS = (5, 9, 3, 12, 7, 7, 4, 11, 2, 8)
KEPT_FROM = ((0, 1, 2), (3, 4, 5), (6, 7), (8, 9))
TRAINED_ON = ((9, 0, 7, 3), (2, 8), (5, 1, 6, 4))
LAST_TWO = {"name": "partial", "last": 2}
PROJECTIONS = r"model\.layers\.[23]\..*_proj"


def batch(samples: Sequence[int]) -> Batch:
    """Random tokens, each sample's own, right-padded; the first two are not learned."""
    ids = [
        torch.randint(1, VOCABULARY, (LENGTHS[s],), generator=torch.Generator().manual_seed(s))
        for s in samples
    ]
    ids_BT = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    labels_BT = torch.full_like(ids_BT, likelihood.IGNORED)
    for row, own in zip(labels_BT, ids, strict=True):
        row[1 : len(own) - 1] = own[2:]
        row[0] = own[1]
    return {SAMPLE: torch.tensor(samples), LENGTH: torch.tensor([LENGTHS[s] for s in samples]),
            "input_ids": ids_BT, "labels": labels_BT}  # fmt: skip


def adapted(model: Any, method: Mapping[str, Any]) -> Any:
    return methods.create(method, plugin_config("methods", dict(method))).apply(model).train()


def make(kind: str = "llama", method: Mapping[str, Any] = LAST_TWO, **own: Any) -> Any:
    torch.manual_seed(0)
    return adapted(MAKERS[kind](**own), method)


def work(model: Any, folder: Path, **changed: Any) -> Work:
    tokens = sum(LENGTHS)
    batches = partial(map, batch, KEPT_FROM)
    portion = Portion(64, 64, lambda tokens: 0.0, lambda tokens: None)
    return Work(**{"model": model, "steps": 6, "tokens": 2 * tokens, "epochs": 2.0, "batches": batches,
                   "folder": folder / "work", "portion": portion, **changed})  # fmt: skip


def why_not(model: Any, folder: Path, **changed: Any) -> str:
    return FrozenLayers().why_not(work(model, folder, **changed))


def learn(model: Any, given: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """A batch's loss, and the gradients of all that has one."""
    model.zero_grad()
    torch.manual_seed(7)
    with announced(model, given):
        loss = likelihood.token_losses(model, given).mean()
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def calls() -> Iterator[Callable[[Any], list[int]]]:
    """``calls(model)`` is a list that gets the number of each block whose attention is run."""
    hooks = []

    def count(model: Any) -> list[int]:
        seen: list[int] = []
        for number, (_, block) in enumerate(anatomy.blocks(model)):
            attention = anatomy.attention(block)
            assert attention is not None
            hooks.append(attention.register_forward_hook(lambda *_, number=number: seen.append(number)))
        return seen

    yield count
    for hook in hooks:
        hook.remove()


# The same losses and gradients


@pytest.mark.parametrize("kind", MAKERS)
def test_losses_and_gradients_are_those_of_all_blocks(kind: str, tmp_path: Path, calls: Any) -> None:
    model = make(kind)
    expected = [learn(model, batch(samples)) for samples in TRAINED_ON]
    assert why_not(model, tmp_path) == ""
    with FrozenLayers().on(work(model, tmp_path)):
        seen = calls(model)
        found = [learn(model, batch(samples)) for samples in TRAINED_ON]
    assert seen == [2, 3] * len(TRAINED_ON)
    for (loss, gradients), (own_loss, own_gradients) in zip(expected, found, strict=True):
        torch.testing.assert_close(own_loss, loss, rtol=1e-5, atol=1e-5)
        assert own_gradients.keys() == gradients.keys()
        assert all(name.split(".")[2] in "23" for name in gradients)
        for name, gradient in gradients.items():
            torch.testing.assert_close(own_gradients[name], gradient, rtol=1e-5, atol=1e-5, msg=name)


def test_afterwards_every_block_is_run(tmp_path: Path, calls: Any) -> None:
    model = make()
    before = {name: dict(vars(block)) for name, block in anatomy.blocks(model)}
    expected = learn(model, batch([3, 0]))
    with FrozenLayers().on(work(model, tmp_path)):
        learn(model, batch([3, 0]))
    assert {name: dict(vars(block)) for name, block in anatomy.blocks(model)} == before
    seen = calls(model)
    loss, gradients = learn(model, batch([3, 0]))
    assert seen == [0, 1, 2, 3]
    assert torch.equal(loss, expected[0])
    assert all(torch.equal(gradients[name], gradient) for name, gradient in expected[1].items())


def test_all_blocks_may_be_frozen_and_the_head_trained(tmp_path: Path, calls: Any) -> None:
    model = make(
        "llama", {"name": "partial", "patterns": ["lm_head.*", "model.norm.*"]}, tie_word_embeddings=False
    )
    loss, gradients = learn(model, batch([3, 0]))
    assert why_not(model, tmp_path) == ""
    with FrozenLayers().on(work(model, tmp_path)):
        seen = calls(model)
        own_loss, own = learn(model, batch([3, 0]))
    assert seen == []
    torch.testing.assert_close(own_loss, loss, rtol=1e-5, atol=1e-5)
    assert own.keys() == gradients.keys() == {"lm_head.weight", "model.norm.weight"}
    for name, gradient in gradients.items():
        torch.testing.assert_close(own[name], gradient, rtol=1e-5, atol=1e-5)


def test_adapters_above_keep_their_dropout(tmp_path: Path, calls: Any) -> None:
    model = make("llama", {"name": "lora", "rank": 4, "dropout": 0.5, "target_modules": PROJECTIONS})
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    loss, gradients = learn(model, batch([3, 0]))
    assert why_not(model, tmp_path) == ""
    with FrozenLayers().on(work(model, tmp_path)):
        seen = calls(model)
        own_loss, own = learn(model, batch([3, 0]))
    assert seen == [2, 3]
    torch.testing.assert_close(own_loss, loss, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(own[name], gradient, rtol=1e-5, atol=1e-5)


def test_in_bf16_a_batch_of_the_same_rows_has_the_same_bits(tmp_path: Path) -> None:
    model, alone = make().bfloat16(), [batch(KEPT_FROM[1])]
    loss, gradients = learn(model, batch(KEPT_FROM[1]))
    with FrozenLayers().on(work(model, tmp_path, batches=partial(iter, alone))):
        own_loss, own = learn(model, batch(KEPT_FROM[1]))
    assert torch.equal(own_loss, loss)
    assert all(torch.equal(own[name], gradient) for name, gradient in gradients.items())


def test_a_run_that_begins_again_finds_the_same_bits(tmp_path: Path) -> None:
    model, found = make(), []
    for _ in range(2):
        with FrozenLayers().on(work(model, tmp_path)):
            found.append(learn(model, batch(TRAINED_ON[0])))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(found[1][1][name], gradient) for name, gradient in found[0][1].items())


@pytest.mark.parametrize(
    ("together", "rows"), [(1 << 20, [10]), (20, [2, 1, 1, 2, 1, 1, 2])], ids=["all", "some"]
)
def test_where_batches_end_makes_no_difference(
    together: int, rows: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16 at this width, states do depend on what is beside a sample."""
    monkeypatch.setattr(_lower_blocks, "_TOGETHER", together)
    torch.manual_seed(0)
    wide = {**SHAPE, "hidden_size": 256, "intermediate_size": 768}
    model = adapted(LlamaForCausalLM(LlamaConfig(**wide)).bfloat16(), LAST_TWO)
    order = [sample for samples in KEPT_FROM for sample in samples]
    found, sizes = [], []
    for count in (1, 2, 3, len(order)):
        kept = KeptStates(tmp_path, 1 << 30)
        lower = LowerBlocks(model, kept)
        hook = lower.decoder.register_forward_hook(lambda *given: sizes.append(len(given[2][0])))
        lower.compute(batch(order[i : i + count]) for i in range(0, len(order), count))
        hook.remove()
        found.append(kept.read(order, max(LENGTHS)))
    assert all(torch.equal(states, found[0]) for states in found)
    assert sizes == 4 * rows


@pytest.mark.parametrize("killed_at", [3, 8])
def test_a_run_that_is_killed_goes_on_bit_for_bit(make_trainer: Any, tmp_path: Path, killed_at: int) -> None:
    method = {"name": "partial", "last": 1}
    killed_and_whole(
        make_trainer, tmp_path, killed_at, method=method, epochs=4, save_every=2, lr=1e-2, fast=True
    )
    used = [event["on"] for folder in ("whole", "killed") for event in logged(tmp_path, "fast", folder)]
    assert len(used) == 3 and all("frozen_layers" in on for on in used)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("packing", [True, False])
def test_in_a_run_states_are_read_at_every_step(
    make_trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: bool, frozen: bool
) -> None:
    read: list[str] = []
    for name in ("read", "row"):
        plain = getattr(KeptStates, name)
        monkeypatch.setattr(
            KeptStates, name, lambda *given, name=name, plain=plain: read.append(name) or plain(*given)
        )
    fast = {"packing": packing, "frozen_layers": frozen}
    trainer = make_trainer(method={"name": "partial", "last": 1}, epochs=4, lr=1e-2, fast=fast)
    trainer.run()
    (event,) = logged(tmp_path, "fast")
    assert [name in event["on"] for name in fast] == [packing, frozen]
    assert len(read) >= trainer.steps if frozen else not read
    assert set(read) <= {"row" if packing else "read"}


def test_samples_in_one_row_find_their_states_and_others_do_not(tmp_path: Path, calls: Any) -> None:
    model = make()
    expected = learn(model, batch([3, 0, 7]))
    with FrozenLayers().on(work(model, tmp_path)), Packing().on(work(model, tmp_path)):
        seen = calls(model)
        found = learn(model, batch([3, 0, 7]))
        assert seen and min(seen) >= LAYERS - 2
        with announced(model, batch([0, 3, 7])), torch.no_grad():  # the same samples, not in the row's order
            model(**{n: x for n, x in in_one_row(batch([3, 0, 7])).items() if n != "labels"}, use_cache=False)
        assert 0 in seen
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("default")  # torch._dynamo looks at .grad of what it traces, and warns itself
def test_compiled_blocks_are_left_out_as_well(tmp_path: Path, calls: Any) -> None:
    model = make()
    expected, _ = learn(model, batch([3, 0]))
    for _, block in anatomy.blocks(model):
        block.compile(backend="eager")
    compiled: list[Any] = [block._compiled_call_impl for _, block in anatomy.blocks(model)]
    with FrozenLayers().on(work(model, tmp_path)):
        assert [hasattr(block, "_compiled_call_impl") and block._compiled_call_impl is None
                for _, block in anatomy.blocks(model)] == [True, True, False, False]  # fmt: skip
        seen = calls(model)
        found, _ = learn(model, batch([3, 0]))
    assert 0 not in seen and 1 not in seen
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert [block._compiled_call_impl for _, block in anatomy.blocks(model)] == compiled


# What goes the plain way


def others(given: Batch) -> dict[str, Batch]:
    unnamed = {name: tensor for name, tensor in given.items() if name != SAMPLE}
    return {
        "held-out": unnamed,
        "a sample that was not there": {**given, SAMPLE: torch.tensor([3, 77])},
        "more rows than samples": {**given, SAMPLE: torch.tensor([3])},
    }


@pytest.mark.parametrize("which", others(batch([3, 0])))
def test_rows_that_are_not_known_go_through_all_blocks(which: str, tmp_path: Path, calls: Any) -> None:
    model, given = make(), others(batch([3, 0]))[which]
    loss, gradients = learn(model, given)
    with FrozenLayers().on(work(model, tmp_path)):
        learn(model, batch([3, 0]))
        seen = calls(model)
        own_loss, own = learn(model, given)
    assert seen == [0, 1, 2, 3]
    assert torch.equal(own_loss, loss)
    assert all(torch.equal(own[name], gradient) for name, gradient in gradients.items())


@pytest.mark.parametrize(
    "more",
    [
        {"attention_mask": torch.tensor([[1] * 12, [0] * 7 + [1] * 5])},
        {"position_ids": torch.arange(12).expand(2, -1) + 1},
        {"output_hidden_states": True},
        {"use_cache": True},
    ],
    ids=lambda more: next(iter(more)),
)
def test_what_changes_the_blocks_goes_through_all_of_them(more: Any, tmp_path: Path, calls: Any) -> None:
    model, given = make().eval(), batch([3, 0])
    expected = model(given["input_ids"], **more)
    with FrozenLayers().on(work(model, tmp_path)), announced(model, given):
        seen = calls(model)
        found = model(given["input_ids"], **more)
    assert seen == [0, 1, 2, 3]
    assert torch.equal(found.logits, expected.logits)


def test_a_mask_may_be_given_by_its_place(tmp_path: Path) -> None:
    model, given = make().eval().model, batch([3, 0])
    mask_BT = torch.tensor([[1] * 12, [0] * 7 + [1] * 5])
    expected = model(given["input_ids"], mask_BT, use_cache=False).last_hidden_state
    with FrozenLayers().on(work(model, tmp_path)), announced(model, given):
        found = model(given["input_ids"], mask_BT, use_cache=False).last_hidden_state
    assert torch.equal(found, expected)


def test_other_tokens_and_answers_go_through_all_blocks(tmp_path: Path, calls: Any) -> None:
    model, given = make().eval(), batch([3, 0])
    other = torch.flip(given["input_ids"], [1])
    expected = model(other).logits
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    answer = model.generate(given["input_ids"][:1], **options)
    with FrozenLayers().on(work(model, tmp_path)):
        with announced(model, given):
            assert torch.equal(model(other, use_cache=False).logits, expected)
        assert torch.equal(model.generate(given["input_ids"][:1], **options), answer)


def test_a_failed_pass_leaves_nothing_behind(tmp_path: Path) -> None:
    model = make()
    unnamed = {name: tensor for name, tensor in batch([3, 5]).items() if name != SAMPLE}
    expected, _ = learn(model, unnamed)
    with FrozenLayers().on(work(model, tmp_path)):
        fails = anatomy.blocks(model)[3][1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            learn(model, batch([3, 0]))
        fails.remove()
        assert torch.equal(learn(model, unnamed)[0], expected)


# In memory and on disk


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("budget", [0, 1000, 1 << 30])
def test_states_are_the_same_bits_wherever_they_lie(dtype: torch.dtype, budget: int, tmp_path: Path) -> None:
    kept = KeptStates(tmp_path / "made", budget)
    given = {samples: torch.randn(len(samples), 12, 8).to(dtype) for samples in KEPT_FROM}
    for samples, states_BTD in given.items():
        kept.add(samples, [LENGTHS[s] for s in samples], states_BTD)
    own = {
        s: row[: LENGTHS[s]]
        for samples, states in given.items()
        for s, row in zip(samples, states, strict=True)
    }
    whole = sum(LENGTHS) * 8 * dtype.itemsize
    assert {0: kept.spilled == whole, 1000: 0 < kept.spilled < whole, 1 << 30: kept.spilled == 0}[budget]
    for samples in TRAINED_ON:
        longest = max(LENGTHS[s] for s in samples)
        found = kept.read(samples, longest)
        assert found.shape == (len(samples), longest, 8) and found.dtype == dtype
        for row, sample in zip(found, samples, strict=True):
            assert torch.equal(row[: LENGTHS[sample]], own[sample])
            assert not row[LENGTHS[sample] :].any()
    kept.close()


@pytest.mark.parametrize("kind", ["llama", "gpt-neo"])
def test_training_from_disk_is_training_from_memory(kind: str, tmp_path: Path) -> None:
    model, found = make(kind), []
    for budget in (1 << 30, 0):
        kept = KeptStates(tmp_path / "made", budget)
        lower = LowerBlocks(model, kept)
        lower.compute(map(batch, KEPT_FROM))
        with lower.left_out():
            found.append([learn(model, batch(samples)) for samples in TRAINED_ON])
        assert (kept.spilled > 0) == (budget == 0)
        kept.close()
    assert list((tmp_path / "made").iterdir()) == []
    for (loss, gradients), (own_loss, own) in zip(*found, strict=True):
        assert torch.equal(own_loss, loss)
        assert all(torch.equal(own[name], gradient) for name, gradient in gradients.items())


def test_the_file_has_no_name_to_be_left_behind(tmp_path: Path) -> None:
    kept = KeptStates(tmp_path, 0)
    kept.add([0], [4], torch.randn(1, 4, 8))
    assert kept.spilled == 4 * 8 * 4
    assert list(tmp_path.iterdir()) == []
    kept.close()


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    kept, limits = KeptStates(tmp_path, 0), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        with pytest.raises(StorageError, match=re.escape(str(tmp_path))):
            kept.add([0], [64], torch.randn(1, 64, 8))
        kept.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# Where it can do nothing


@pytest.mark.parametrize(
    ("kind", "method", "own", "reason"),
    [
        ("llama", {"name": "full"}, {}, "the first decoder block is trained"),
        ("llama", {"name": "bitfit"}, {}, "the first decoder block is trained"),
        ("llama", {"name": "partial", "layers": [0]}, {}, "the first decoder block is trained"),
        ("llama", {**LAST_TWO, "embeddings": True}, {}, "embeddings"),
        ("gpt2", {**LAST_TWO, "patterns": ["transformer.wpe.weight"]}, {}, "embeddings"),
        ("gpt2", {**LAST_TWO, "patterns": ["lm_head.*"]}, {}, "embeddings"),
        ("gpt2", LAST_TWO, {"embd_pdrop": 0.1}, "dropout"),
        ("gpt2", LAST_TWO, {"resid_pdrop": 0.1}, "dropout"),
        ("llama", LAST_TWO, {"attention_dropout": 0.1}, "dropout"),
        ("mixtral", LAST_TWO, {"router_jitter_noise": 0.1}, "dropout"),
        ("llama", {"name": "prompt", "length": 2}, {}, "more than the tokens"),
        ("llama", {"name": "prefix", "length": 2}, {}, "more than the tokens"),
        ("llama", {"name": "conditional_lora"}, {}, "chosen for each sample"),
    ],
    ids=str,
)
def test_reasons_against_it(kind: str, method: Any, own: Any, reason: str, tmp_path: Path) -> None:
    assert reason in why_not(make(kind, method, **own), tmp_path)


def test_lisa_trains_the_embeddings_whatever_else_is_drawn(tmp_path: Path) -> None:
    choice = {"name": "lisa", "active": 1}
    method = methods.create(choice, plugin_config("methods", choice))
    model = method.apply(MAKERS["llama"]())
    for step in range(0, 200, 20):
        method.before_step(model, Clock(step, 200, 0))
        assert "trained" in why_not(model, tmp_path)


def test_other_reasons_against_it(tmp_path: Path) -> None:
    model = make()
    assert why_not(torch.nn.Sequential(torch.nn.Linear(2, 2)), tmp_path) == "no decoder blocks were found"
    unnamed = [{name: tensor for name, tensor in batch([0]).items() if name != SAMPLE}]
    assert "known samples" in why_not(model, tmp_path, batches=lambda: iter(unnamed))
    assert "there is room for" in why_not(model, tmp_path, tokens=1 << 60)
    model.activation_checkpointing_enable()
    assert why_not(model, tmp_path) == "gradient checkpointing is on"


def test_it_does_not_pay_for_samples_that_are_seen_once(tmp_path: Path) -> None:
    model = make()
    assert FrozenLayers().not_worth(work(model, tmp_path, epochs=1.0))
    assert FrozenLayers().not_worth(work(model, tmp_path, epochs=1.5)) == ""


def test_to_ask_changes_nothing(tmp_path: Path) -> None:
    model = make("gpt2", LAST_TWO, embd_pdrop=0.1)
    model.eval()
    before, hooks = torch.get_rng_state(), {n: len(m._forward_hooks) for n, m in model.named_modules()}
    assert why_not(model, tmp_path)
    assert not model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert {n: len(m._forward_hooks) for n, m in model.named_modules()} == hooks
    assert all(parameter.grad is None for parameter in model.parameters())
