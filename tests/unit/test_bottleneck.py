"""Bottleneck adapters against their papers' formulas, in float64, on every shape of block."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    Qwen2Config,
)

from tunewright import methods
from tunewright.core.errors import ModelError
from tunewright.methods.compacter import Compacter, PhmLinear
from tunewright.models import anatomy
from tunewright.recipes import plugin_config

NAMES = ("houlsby", "pfeiffer", "parallel_adapter", "compacter")
IDS = torch.tensor([[5, 77, 30, 9, 4, 42], [61, 2, 2, 88, 17, 3]])
WIDTH, VOCABULARY = 32, 97
LLAMA = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "eos_token_id": None,
}  # fmt: skip
GPT_NEO = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]],
    "initializer_range": 0.2, "eos_token_id": None, "bos_token_id": None,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**LLAMA),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=4, initializer_range=0.2,
                       bos_token_id=None, eos_token_id=None),
    "gpt_neo": GPTNeoConfig(**GPT_NEO),
    "gpt_neox": GPTNeoXConfig(**{**LLAMA, "num_key_value_heads": 4}),
    "qwen2": Qwen2Config(**LLAMA),
    "mixtral": MixtralConfig(**LLAMA, num_local_experts=4),
    "gpt_oss": GptOssConfig(**LLAMA, head_dim=8, num_local_experts=4, pad_token_id=0),
}  # fmt: skip
BLOOM = BloomConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, n_layer=2, n_head=4)
every_method = pytest.mark.parametrize("name", NAMES)
every_model = pytest.mark.parametrize("kind", CONFIGS)


def build(config: Any, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager", dtype=dtype
    ).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def method(name: str, **options: Any) -> Any:
    choice = {"name": name, **options}
    return methods.create(choice, plugin_config("methods", choice))


def trained(name: str, config: Any, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A model whose adapters and norms are where training might have brought them."""
    model = method(name, **options).apply(build(config, dtype))
    for parameter in trainable(model).values():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def trainable(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def norms(model: Any) -> list[torch.nn.Parameter]:
    return [p for name, p in model.named_parameters() if "norm" in name or ".ln_" in name]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


# How much is trained


def shape(kind: str, width: int, depth: int) -> Any:
    """A model of this size without its numbers: BERT's sizes as a Llama, or GPT-2."""
    if kind == "gpt2":
        config: Any = GPT2Config(n_embd=width, n_layer=depth)
    else:
        config = LlamaConfig(
            vocab_size=30522, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=depth,
            num_attention_heads=12,
        )  # fmt: skip
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("houlsby", {"bottleneck": 64, "layer_norms": False}, 2 * 12 * (2 * 64 * 768 + 64 + 768)),
        ("houlsby", {"layer_norms": False}, 1_789_056),
        ("pfeiffer", {}, 894_528),
        ("parallel_adapter", {"bottleneck": 384}, 7_091_712),
        ("compacter", {"layer_norms": False}, 57_088),
        ("compacter", {"bottleneck": 64, "n": 8, "layer_norms": False}, 2 * 12 * 3 * (64 + 768) + 8**3),
    ],
)
def test_the_count_is_that_of_the_papers(kind: str, name: str, options: Any, expected: int) -> None:
    """The round figures are AdapterHub's for BERT-base: reductions of 16, 16, 2 and 32."""
    model, made = shape(kind, 768, 12), method(name, **options)
    assert made.count(model) == expected
    assert sum(p.numel() for p in trainable(made.apply(model)).values()) == expected


@pytest.mark.parametrize(("kind", "per_norm"), [("gpt2", 2 * 768), ("llama", 768)])
@pytest.mark.parametrize("name", ["houlsby", "compacter"])
def test_the_norms_are_trained_too_by_default(name: str, kind: str, per_norm: int) -> None:
    model = shape(kind, 768, 12)
    more = method(name).count(model) - method(name, layer_norms=False).count(model)
    assert more == (2 * 12 + 1) * per_norm
    model = method(name).apply(model)
    assert {id(p) for p in norms(model)} < {id(p) for p in trainable(model).values()}


@pytest.mark.parametrize(("places", "published"), [(2, 0.073), (1, 0.047)])
def test_compacters_share_of_t5_base_is_the_published_one(places: int, published: float) -> None:
    """Table 1 of arXiv:2106.04647, Compacter and Compacter++: T5-base has 24 blocks and 62 norms."""
    t5_base, norm_weights = 222_903_552, 62 * 768
    whole = method("compacter", layer_norms=False).count(shape("llama", 768, 24))
    adapters = (whole - 4**3) * places // 2 + 4**3
    assert round(100 * (adapters + norm_weights) / t5_base, 3) == published


@every_method
@every_model
def test_the_count_is_what_is_trained(name: str, kind: str) -> None:
    model, made = build(CONFIGS[kind]), method(name)
    count = made.count(model)
    assert count == sum(p.numel() for p in trainable(made.apply(model)).values())


# What is computed


def dense(layer: torch.nn.Module) -> torch.Tensor:
    """W, by the definition where it is a sum of Kronecker products."""
    if isinstance(layer, PhmLinear):
        terms = zip(layer.rules, layer.s, layer.t, strict=True)
        return sum(torch.kron(a_nn, torch.outer(s, t)) for a_nn, s, t in terms)  # type: ignore[return-value]
    assert isinstance(layer, torch.nn.Linear)
    return layer.weight


def change(adapter: Any, x_BTD: torch.Tensor, activation: str, scale: float) -> torch.Tensor:
    z_BTM = getattr(functional, activation)(x_BTD @ dense(adapter.down).T + adapter.down.bias)
    return scale * (z_BTM @ dense(adapter.up).T + adapter.up.bias)


class Spy:
    """Sees what goes into a sub-layer and what comes out, and computes what it gave without an adapter."""

    def __init__(self, sublayer: Any) -> None:
        self.sublayer = sublayer
        sublayer.register_forward_hook(self._see, with_kwargs=True)

    def _see(self, sublayer: Any, args: Any, kwargs: Any, output: Any) -> None:
        self.input = args[0] if args else kwargs["hidden_states"]
        self.output = output[0] if isinstance(output, tuple) else output
        plain = type(sublayer).forward(sublayer, *args, **kwargs)
        self.plain = plain[0] if isinstance(plain, tuple) else plain


def spied(model: Any, place: Callable[[Any], Any]) -> list[Spy]:
    spies = [Spy(place(block)) for _, block in anatomy.blocks(model)]
    logits(model)
    return spies


@every_model
@pytest.mark.parametrize(
    ("name", "options", "activation"),
    [
        ("houlsby", {}, "gelu"),
        ("houlsby", {"activation": "silu", "bottleneck": 5}, "silu"),
        ("pfeiffer", {}, "relu"),
        ("compacter", {}, "gelu"),
        ("compacter", {"n": 2, "bottleneck": 6}, "gelu"),
    ],
)
@torch.no_grad()
def test_an_adapter_follows_the_sublayer(kind: str, name: str, options: Any, activation: str) -> None:
    model = trained(name, CONFIGS[kind], **options)
    for place in method(name).places:
        for spy in spied(model, place):
            expected = spy.plain + change(spy.sublayer.adapter, spy.plain, activation, 1.0)
            torch.testing.assert_close(spy.output, expected, atol=1e-10, rtol=1e-10)
            assert (spy.output - spy.plain).abs().max() > 1e-2


@pytest.mark.parametrize(("options", "scale"), [({}, 4.0), ({"scale": 0.5}, 0.5)])
@pytest.mark.parametrize("config", [*CONFIGS.values(), BLOOM], ids=[*CONFIGS, "bloom"])
@torch.no_grad()
def test_a_parallel_adapter_reads_what_the_feed_forward_reads(
    config: Any, options: Any, scale: float
) -> None:
    model = trained("parallel_adapter", config, **options)
    for spy in spied(model, anatomy.feed_forward):
        expected = spy.plain + change(spy.sublayer.adapter, spy.input, "relu", scale)
        torch.testing.assert_close(spy.output, expected, atol=1e-10, rtol=1e-10)
        assert (spy.output - spy.plain).abs().max() > 1e-2


@torch.no_grad()
def test_the_residual_is_added_after_the_adapter() -> None:
    model = trained("houlsby", CONFIGS["llama"])
    (block,) = [block for name, block in anatomy.blocks(model) if name.endswith(".0")]
    seen: list[Any] = []
    block.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    attention, feed_forward = Spy(block.self_attn), Spy(block.mlp)
    logits(model)
    x_BTD, found = seen[0]
    x_BTD = x_BTD + attention.plain + change(block.self_attn.adapter, attention.plain, "gelu", 1.0)
    torch.testing.assert_close(feed_forward.input, block.post_attention_layernorm(x_BTD))
    h_BTD = block.mlp.forward(block.post_attention_layernorm(x_BTD))
    torch.testing.assert_close(found, x_BTD + h_BTD + change(block.mlp.adapter, h_BTD, "gelu", 1.0))


@pytest.mark.parametrize(("n", "inputs", "outputs"), [(1, 5, 7), (2, 6, 4), (4, 32, 8), (4, 8, 32)])
def test_a_phm_layer_is_a_sum_of_kronecker_products(n: int, inputs: int, outputs: int) -> None:
    torch.manual_seed(0)
    rules = torch.nn.Parameter(torch.randn(n, n, n, dtype=torch.float64))
    layer = PhmLinear(rules, inputs, outputs, zero=False)
    torch.nn.init.normal_(layer.bias)
    x_BTD = torch.randn(2, 3, inputs, dtype=torch.float64)
    w_OI = dense(layer)
    assert w_OI.shape == (outputs, inputs)
    torch.testing.assert_close(layer(x_BTD), x_BTD @ w_OI.T + layer.bias)
    ours = torch.autograd.grad(layer(x_BTD).square().sum(), tuple(layer.parameters()))
    theirs = torch.autograd.grad(
        (x_BTD @ dense(layer).T + layer.bias).square().sum(), tuple(layer.parameters())
    )
    torch.testing.assert_close(ours, theirs)


def test_a_phm_layer_keeps_the_size_of_its_input_at_the_start() -> None:
    torch.manual_seed(0)
    made = []
    for _ in range(200):
        rules = torch.nn.init.normal_(torch.nn.Parameter(torch.empty(4, 4, 4)), std=0.5)
        made.append(dense(PhmLinear(rules, 64, 16, zero=False)))
    assert 64 * torch.stack(made).var().item() == pytest.approx(1, rel=0.1)


# From the start on


@every_method
@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_are_the_bases_at_the_start(name: str, kind: str, dtype: torch.dtype) -> None:
    model = method(name).apply(build(CONFIGS[kind], dtype))
    assert torch.equal(logits(model), logits(build(CONFIGS[kind], dtype)))
    assert {parameter.dtype for parameter in trainable(model).values()} == {dtype}


@every_method
@every_model
def test_only_adapters_and_norms_learn_and_all_of_them_can(name: str, kind: str) -> None:
    model = method(name).apply(build(CONFIGS[kind]))
    with_norms = {id(p) for p in norms(model)} if name in ("houlsby", "compacter") else set()
    for parameter in model.parameters():
        assert parameter.requires_grad == (id(parameter) in with_norms or in_an_adapter(model, parameter))
    gradients(model)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trainable(model).values())
    assert any(p.grad.any() for name, p in trainable(model).items() if ".adapter.up." in name)
    model = trained(name, CONFIGS[kind], bottleneck=8)
    for name, gradient in gradients(model).items():
        assert gradient.any(), name


def in_an_adapter(model: Any, parameter: Any) -> bool:
    adapters = (module for name, module in model.named_modules() if name.endswith(".adapter"))
    return any(parameter is own for adapter in adapters for own in adapter.parameters())


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in trainable(model).items()}


@every_method
@every_model
def test_generation_with_a_cache_is_that_without(name: str, kind: str) -> None:
    model = trained(name, CONFIGS[kind])
    options = {
        "max_new_tokens": 8,
        "do_sample": False,
        "attention_mask": torch.ones_like(IDS),
        "pad_token_id": 0,
    }
    cached = model.generate(input_ids=IDS, use_cache=True, **options)
    assert torch.equal(cached, model.generate(input_ids=IDS, use_cache=False, **options))
    again = model(input_ids=cached, use_cache=False).logits.argmax(-1)
    assert torch.equal(cached[:, IDS.shape[1] :], again[:, IDS.shape[1] - 1 : -1])


@every_method
@every_model
def test_gradients_are_the_same_when_activations_are_recomputed(name: str, kind: str) -> None:
    model = trained(name, CONFIGS[kind]).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    plain = gradients(model)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    recomputed = gradients(model)
    torch.testing.assert_close(recomputed, plain)


@every_method
def test_a_block_with_adapters_compiles_in_one_piece(name: str) -> None:
    model = trained(name, CONFIGS["llama"], torch.float32)
    expected = logits(model)
    for _, block in anatomy.blocks(model):
        block.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(model), expected)


@every_method
def test_a_copied_model_uses_its_own_adapters(name: str) -> None:
    model = trained(name, CONFIGS["llama"])
    other = copy.deepcopy(model)
    before = logits(other)
    for parameter in trainable(model).values():
        parameter.data.zero_()
    assert torch.equal(logits(other), before)
    assert not torch.equal(logits(model), before)


def test_compacters_rules_are_one_tensor_for_all_adapters() -> None:
    for model in (
        trained("compacter", CONFIGS["llama"]),
        copy.deepcopy(trained("compacter", CONFIGS["llama"])),
    ):
        layers = [module for module in model.to(torch.bfloat16).modules() if isinstance(module, PhmLinear)]
        assert len(layers) == 2 * 2 * 2
        assert len({id(layer.rules) for layer in layers}) == 1
        assert sum(name.endswith(".rules") for name, _ in model.named_parameters()) == 1


# What is saved


@every_method
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_an_adapter_comes_back_from_its_folder(name: str, kind: str, tmp_path: Path) -> None:
    model, made = trained(name, CONFIGS[kind], torch.float32, bottleneck=8), method(name, bottleneck=8)
    made.export(model, tmp_path)
    again = methods.kind(name).load(build(CONFIGS[kind], torch.float32), tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert trainable(again).keys() == trainable(model).keys()


@every_method
def test_a_folder_holds_what_was_trained_and_the_options(
    make_trainer: Any, make_model: Any, name: str, tmp_path: Path
) -> None:
    trainer = make_trainer(method=name, max_steps=2)
    trainer.run()
    folder = tmp_path / "saved"
    folder.mkdir()
    trainer.method.export(trainer.model, folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    saved = load_file(folder / "adapter_model.safetensors")
    count = trainer.method.count(make_model())
    assert sum(tensor.nbytes for tensor in saved.values()) == 4 * count
    assert saved.keys() == trainable(trainer.model).keys()
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["tunewright_method"]) == ("TUNEWRIGHT", name)
    assert config["tunewright_options"]["bottleneck"] is None


@every_method
def test_the_loss_falls(make_trainer: Any, name: str) -> None:
    losses: list[float] = []
    trainer = make_trainer(
        method=name, max_steps=60, lr=0.03, readers=[lambda e: losses.append(e.get("loss", 0))]
    )
    trainer.run()
    losses = [loss for loss in losses if loss]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


@every_method
def test_another_bases_adapter_is_refused(name: str, tmp_path: Path) -> None:
    method(name).export(trained(name, CONFIGS["llama"]), tmp_path)
    wider = LlamaConfig(**{**LLAMA, "hidden_size": 64})
    with pytest.raises(ModelError, match=r"expected .* for this base"):
        methods.kind(name).load(build(wider), tmp_path)


# What cannot be


@every_method
def test_merging_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(ModelError, match="non-linearity between its two projections"):
        methods.kind(name).merge(trained(name, CONFIGS["llama"]))


@every_method
def test_a_model_without_a_feed_forward_of_its_own_is_refused(name: str) -> None:
    opt = OPTConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2, ffn_dim=64, num_attention_heads=4,
                    word_embed_proj_dim=WIDTH)  # fmt: skip
    bert = BertConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4,
                      is_decoder=True)  # fmt: skip
    for config in (opt, bert):
        with pytest.raises(ModelError, match=f"no block of {config.model_type} has a feed-forward sub-layer"):
            method(name).apply(build(config))


@pytest.mark.parametrize("name", ["houlsby", "pfeiffer", "compacter"])
def test_sublayers_that_add_the_residual_are_refused(name: str) -> None:
    with pytest.raises(ModelError, match=r"add the residual themselves.*use method: parallel_adapter"):
        method(name).apply(build(BLOOM))


@every_method
def test_a_second_adapter_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="has such adapters already"):
        method(name).apply(trained(name, CONFIGS["llama"]))


def test_sizes_that_compacter_cannot_cut_are_refused_together() -> None:
    problems = Compacter(plugin_config("methods", {"name": "compacter", "n": 5, "bottleneck": 7})).problems(
        build(CONFIGS["llama"])
    )
    assert [(p.where, p.what) for p in problems] == [
        ("method.n", "5 does not divide the hidden size 32"),
        ("method.n", "5 does not divide the bottleneck 7"),
    ]
    assert method("compacter", n=4).size(build(CONFIGS["llama"])) == 4
