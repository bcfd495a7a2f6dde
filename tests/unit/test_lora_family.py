"""LoRA and its relatives against PEFT's own models, and against their papers' formulas."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig

from tunewright import methods
from tunewright.core.errors import ModelError
from tunewright.methods import Clock, Setting
from tunewright.methods.adalora import Adalora
from tunewright.methods.peft import TYPES, Peft
from tunewright.models import anatomy
from tunewright.recipes import plugin_config

IDS = torch.randint(5, 128, (2, 9), generator=torch.Generator().manual_seed(1))
COMMON = {"vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = LlamaConfig(
    **COMMON, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
)  # fmt: skip
GPT2 = GPT2Config(**COMMON, n_embd=32, n_layer=2, n_head=4, n_positions=64)
MIXTRAL = MixtralConfig(
    **COMMON, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    num_local_experts=4, num_experts_per_tok=2,
)  # fmt: skip
SMALL: dict[str, dict[str, Any]] = {
    "C3A": {"block_size": 16}, "FOURIERFT": {"n_frequency": 64}, "PSOFT": {"r": 8}, "ROAD": {"group_size": 16},
    "WAVEFT": {"n_frequency": 64},
}  # fmt: skip
"""Options for layers as small as these."""


def model(config: Any = LLAMA) -> Any:
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config)
    for parameter in made.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return made


def create(name: str, **options: Any) -> Any:
    return methods.create({"name": name}, plugin_config("methods", {"name": name, **options}))


@torch.no_grad()
def logits(of: Any) -> Tensor:
    of.eval()
    return of(input_ids=IDS, use_cache=False).logits


def close(one: Tensor, other: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(one, other, atol=atol, rtol=0)


@torch.no_grad()
def disturb(of: Any) -> None:
    """As if trained: every trained parameter moves."""
    generator = torch.Generator().manual_seed(3)
    for parameter in of.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def saved(method: Any, trained: Any, folder: Path) -> Path:
    folder.mkdir()
    method.export(trained, folder)
    return folder


# The same numbers as PEFT's own


PEERS: dict[str, tuple[dict[str, Any], Any]] = {
    "lora": ({"rank": 4, "alpha": 12}, LoraConfig(r=4, lora_alpha=12, target_modules="all-linear")),
    "rslora": (
        {"name": "lora", "rank": 4, "alpha": 12, "rslora": True},
        LoraConfig(r=4, lora_alpha=12, use_rslora=True, target_modules="all-linear"),
    ),
    "pissa": (
        {"name": "lora", "rank": 4, "alpha": 12, "init": "pissa"},
        LoraConfig(r=4, lora_alpha=12, init_lora_weights="pissa", target_modules="all-linear"),
    ),
    "olora": (
        {"name": "lora", "rank": 4, "alpha": 12, "init": "olora"},
        LoraConfig(r=4, lora_alpha=12, init_lora_weights="olora", target_modules="all-linear"),
    ),
    "dora": ({"rank": 4, "alpha": 12}, LoraConfig(r=4, lora_alpha=12, use_dora=True, target_modules="all-linear")),
    "adalora": (
        {"rank": 3, "init_rank": 5, "alpha": 12},
        AdaLoraConfig(init_r=5, target_r=3, lora_alpha=12, total_step=100, target_modules="all-linear"),
    ),
    "ia3": (
        {},
        IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PEERS)
def test_logits_are_pefts_own(name: str) -> None:
    options, config = PEERS[name]
    torch.manual_seed(5)
    ours = create(**{"name": name, **options}).apply(model())
    torch.manual_seed(5)
    config.task_type = "CAUSAL_LM"
    theirs = get_peft_model(model(), config)
    disturb(ours), disturb(theirs)
    moved = (logits(ours) - logits(model())).abs().max()
    assert moved > 1e-2
    assert torch.equal(logits(ours), logits(theirs))


@pytest.mark.parametrize("config", [LLAMA, GPT2, MIXTRAL], ids=["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("name", ["lora", "dora", "adalora", "ia3", "vera"])
def test_peft_reads_what_is_saved(tmp_path: Path, name: str, config: Any) -> None:
    method = create(name)
    trained = method.apply(model(config))
    disturb(trained)
    folder = saved(method, trained, tmp_path / "adapter")
    with pytest.warns(UserWarning, match="vera_A") if name == "vera" else _nothing():
        close(logits(PeftModel.from_pretrained(model(config), folder)), logits(trained), 0.0)


class _nothing:  # noqa: N801 stands where pytest.warns does
    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


# LoRA's options


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_what_starts_inside_the_weights_is_saved_for_the_base_as_it_was(
    tmp_path: Path, init: str, rslora: bool
) -> None:
    method = create("lora", rank=4, alpha=12, init=init, rslora=rslora, rank_pattern={"q_proj": 2})
    trained = method.apply(model())
    close(logits(trained), logits(model()))
    disturb(trained)
    folder = saved(method, trained, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["init_lora_weights"]) == (8, {"q_proj": 4}, True)
    close(logits(PeftModel.from_pretrained(model(), folder)), logits(trained))
    numbers = sum(tensor.numel() for tensor in load_file(folder / "adapter_model.safetensors").values())
    assert numbers == method.saved(trained) == 2 * method.count(model())


def test_pissa_begins_with_the_largest_singular_values() -> None:
    trained = create("lora", rank=4, alpha=4, init="pissa", target_modules=("q_proj",)).apply(model())
    layer = trained.base_model.model.model.layers[0].self_attn.q_proj
    term = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    left, values, right = torch.linalg.svd(model().model.layers[0].self_attn.q_proj.weight)
    close(term, left[:, :4] @ torch.diag(values[:4]) @ right[:4])


def test_lora_plus_lets_b_learn_faster() -> None:
    method = create("lora", lr_ratio=16)
    names = [name for name, p in method.apply(model()).named_parameters() if p.requires_grad]
    assert {method.lr_scale(name) for name in names if "lora_A" in name} == {1.0}
    assert {method.lr_scale(name) for name in names if "lora_B" in name} == {16.0}


def test_lora_plus_moves_b_by_its_own_rate(make_trainer: Callable[..., Any]) -> None:
    moved = {}
    for ratio in (1, 4):
        method = {"name": "lora", "rank": 4, "lr_ratio": ratio}
        trainer = make_trainer(method=method, lr=1e-4, max_steps=1, folder=f"ratio-{ratio}")
        trainer.run()
        moved[ratio] = max(
            float(p.detach().abs().max()) for n, p in trainer.model.named_parameters() if "lora_B" in n
        )
    assert moved[4] == pytest.approx(4 * moved[1], rel=1e-3)  # AdamW's first step is the rate itself


def test_patterns_give_modules_their_own_rank_and_alpha() -> None:
    method = create("lora", rank=4, alpha=8, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 40})
    trained = method.apply(model())
    attention = trained.base_model.model.model.layers[1].self_attn
    assert attention.q_proj.lora_A["default"].weight.shape == (2, 32)
    assert (attention.q_proj.scaling["default"], attention.v_proj.scaling["default"]) == (4.0, 10.0)
    assert method.count(model()) == sum(p.numel() for p in trained.parameters() if p.requires_grad)


def test_a_pattern_that_names_nothing_is_refused_and_named() -> None:
    method = create("lora", rank_pattern={"nowhere": 2}, alpha_pattern={"elsewhere": 3})
    with pytest.raises(ModelError) as caught:
        method.apply(model())
    assert [p.where for p in caught.value.problems] == [
        "method.rank_pattern.nowhere",
        "method.alpha_pattern.elsewhere",
    ]


def batches() -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    for _ in range(3):
        yield {"input_ids": torch.randint(5, 128, (3, 12), generator=generator)}


def test_eva_begins_with_the_directions_of_the_activations(tokenizer: Any) -> None:
    from tunewright.data.template import ChatCodec

    method = create("lora", rank=4, init="eva", target_modules=("q_proj",))
    trained = method.apply(model())
    method.begin(trained, Setting(ChatCodec(tokenizer), batches, Clock(0, 10, 0)))
    close(logits(trained), logits(model()), 0.0)
    layer = trained.base_model.model.model.layers[1].self_attn.q_proj
    seen: list[Tensor] = []
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, 1)))
    with torch.no_grad():
        for batch in batches():
            trained(**batch, use_cache=False)
    values_ND = torch.cat(seen) - torch.cat(seen).mean(dim=0)
    covered = (values_ND @ layer.lora_A["default"].weight.T).square().sum() / values_ND.square().sum()
    best = torch.linalg.svdvals(values_ND).square()
    assert (
        covered > 0.9 * best[:4].sum() / best.sum() > 1.5 * 4 / 32
    )  # PEFT's SVD takes one batch after the other


def test_experts_of_a_mixture_are_adapted_where_they_are_asked_for(tmp_path: Path) -> None:
    plain, method = create("lora", rank=2), create("lora", rank=2, experts=True)
    trained = method.apply(model(MIXTRAL))
    assert method.count(model(MIXTRAL)) == sum(p.numel() for p in trained.parameters() if p.requires_grad)
    assert method.count(model(MIXTRAL)) > plain.count(model(MIXTRAL))
    disturb(trained)
    expected = logits(trained)
    folder = saved(method, trained, tmp_path / "adapter")
    close(logits(type(method).load(model(MIXTRAL), folder)), expected, 0.0)
    close(logits(type(method).merge(trained)), expected)


@pytest.mark.parametrize(
    ("options", "config", "where"),
    [
        ({"experts": True}, LLAMA, "method.experts"),
        ({"experts": True, "dropout": 0.1}, MIXTRAL, "method.experts"),
        ({"init": "olora"}, GPT2, "method.init"),
        ({"target_modules": ("nowhere",)}, LLAMA, "method.target_modules"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_done(options: Any, config: Any, where: str) -> None:
    (problem,) = create("lora", **options).problems(model(config))
    assert problem.where == where
    assert problem.fix


@pytest.mark.parametrize("name", ["loha", "lokr", "oft", "boft"])
def test_conv1d_is_refused_by_name(name: str) -> None:
    with pytest.raises(ModelError, match="Conv1D layers of gpt2"):
        create(name).apply(model(GPT2))


@pytest.mark.parametrize("name", ["oft", "boft"])
def test_blocks_that_do_not_divide_are_refused_by_layer(name: str) -> None:
    with pytest.raises(
        ModelError, match=r"method\.block_size: 24 does not divide the 32 inputs of model\.layers\.0"
    ):
        create(name, block_size=24).apply(model())


# AdaLoRA


def adalora(steps: int) -> tuple[Adalora, Any]:
    method = create("adalora", rank=2, init_rank=4, alpha=8, warm=0.2, settled=0.2, orthogonality=0.1)
    torch.manual_seed(5)
    trained = method.apply(model())
    method.begin(trained, Setting(None, batches, Clock(0, steps, 0)))  # type: ignore[arg-type] it looks at no data
    return method, trained


def test_adalora_allocates_as_pefts_own_loop_does() -> None:
    steps = 15
    method, ours = adalora(steps)
    torch.manual_seed(5)
    config = AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=8, tinit=3, tfinal=3, deltaT=1, orth_reg_weight=0.1, total_step=steps,
        target_modules="all-linear", task_type="CAUSAL_LM",
    )  # fmt: skip
    theirs = get_peft_model(model(), config)
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 0.01) for m in (ours, theirs)
    ]
    for step in range(steps):
        target = torch.randint(5, 128, (2, 9), generator=torch.Generator().manual_seed(step))
        out = ours(input_ids=IDS, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), target[:, 1:].flatten())
        penalty = method.penalty(ours, Clock(step, steps, 0))
        assert penalty is not None
        (loss + penalty).backward()
        expected = theirs(input_ids=IDS, labels=target, use_cache=False).loss
        assert float((loss + penalty).detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
        expected.backward()
        for optimizer in optimizers:
            optimizer.step()
        method.after_update(ours, Clock(step, steps, 0))
        theirs.base_model.update_and_allocate(step + 1)
        for optimizer in optimizers:
            optimizer.zero_grad()
    ranks = method.report(ours)["ranks"]
    assert sum(ranks.values()) == 2 * len(ranks) == 28
    assert len(set(ranks.values())) > 1
    close(logits(ours), logits(theirs), 1e-4)


def test_a_finished_adalora_is_saved_at_its_final_ranks(
    make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    choice = {"name": "adalora", "rank": 2, "init_rank": 4}
    trainer = make_trainer(method=choice, lr=0.02, max_steps=12)
    trainer.run()
    folder = saved(trainer.method, trainer.model, tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    kept = {n.partition(".lora_E")[0]: len(t) for n, t in tensors.items() if "lora_E" in n}
    assert sum(kept.values()) == 2 * len(kept)
    assert sum(t.numel() for t in tensors.values()) == trainer.method.saved(trainer.model)
    assert set(kept.values()) == set(trainer.method.report(trainer.model)["ranks"].values())


# PEFT's other methods


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("config", [LLAMA, GPT2, MIXTRAL], ids=["llama", "gpt2", "mixtral"])
def test_every_other_type_keeps_the_contract(tmp_path: Path, kind: str, config: Any) -> None:
    method = create("peft", type=kind, options=SMALL.get(kind, {}))
    with torch.device("meta"):
        outline = AutoModelForCausalLM.from_config(config)
    if problems := method.problems(outline):
        assert config is GPT2
        assert "Conv1D" in problems[0].what
        return
    trained = method.apply(model(config))
    close(logits(trained), logits(model(config)))
    assert method.count(outline) == sum(p.numel() for p in trained.parameters() if p.requires_grad)
    disturb(trained)
    expected = logits(trained)
    assert (expected - logits(model(config))).abs().max() > 1e-4
    folder = saved(method, trained, tmp_path / "adapter")
    numbers = sum(t.numel() for t in load_file(folder / "adapter_model.safetensors").values())
    assert numbers == method.saved(trained) <= 1.1 * method.count(outline)
    close(logits(Peft.load(model(config), folder)), expected, 0.0)
    close(logits(Peft.merge(trained)), expected)


def test_norms_are_what_ln_tuning_trains() -> None:
    trained = create("peft", type="LN_TUNING").apply(model())
    names = {name for name, p in trained.named_parameters() if p.requires_grad}
    assert names
    assert all("norm" in name for name in names)


def test_an_option_that_peft_does_not_have_is_told_the_nearest() -> None:
    (problem,) = create("peft", type="HRA", options={"apply_gz": True}).problems(model())
    assert problem.where == "method.options.apply_gz"
    assert "apply_GS" in problem.fix


# The parts of a transformer


@pytest.mark.parametrize("config", [LLAMA, GPT2, MIXTRAL], ids=["llama", "gpt2", "mixtral"])
def test_the_parts_of_a_block_are_found(config: Any) -> None:
    found = anatomy.blocks(model(config))
    assert len(found) == 2
    for _, block in found:
        attention, feed_forward = anatomy.attention(block), anatomy.feed_forward(block)
        assert "Attention" in type(attention).__name__
        assert any(part in type(feed_forward).__name__ for part in ("MLP", "Moe"))


def test_embeddings_are_those_of_tokens_positions_and_the_head() -> None:
    assert [name for name, _ in anatomy.embeddings(model())] == [
        "model.embed_tokens.weight",
        "lm_head.weight",
    ]
    assert [name for name, _ in anatomy.embeddings(model(GPT2))] == [
        "transformer.wte.weight",
        "transformer.wpe.weight",
    ]
