"""Quantized bases: what codes stand for, what is kept of them, and LoRA on top."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from tunewright import methods, pipeline
from tunewright.core import store
from tunewright.core.errors import ModelError, UserError
from tunewright.methods.qlora import Config, Qlora
from tunewright.models import blockwise, quantized, quantized_layers
from tunewright.models.load import find, load_model
from tunewright.models.quantized import Scheme

SCHEMES = [Scheme("nf4", double=True), Scheme("nf4", double=False), Scheme("int8")]
IDS = torch.tensor([[5, 77, 1030, 9, 4, 42]])
MakeModel = Callable[..., Any]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits.float()


def weight(outputs: int = 96, inputs: int = 128, seed: int = 0) -> torch.Tensor:
    return 0.02 * torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))


def values(name: str) -> torch.Tensor:
    return blockwise.codebook(name, torch.device("cpu")).values


def qlora(**options: Any) -> Qlora:
    return Qlora(Config(**options))


# Codes


def test_nf4_has_the_quantiles_of_a_normal_distribution() -> None:
    offset = 0.9677083  # the paper's, the mean of 1 - 1/32 and 1 - 1/30
    above = [NormalDist().inv_cdf(float(p)) for p in torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1]]
    below = [
        -NormalDist().inv_cdf(float(p)) for p in torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1]
    ]
    expected = torch.tensor(sorted([*above, 0.0, *below])) / above[0]
    torch.testing.assert_close(values("nf4"), expected.float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("name", "count"), [("signed", 256), ("unsigned", 256)])
def test_the_dynamic_codebooks_grow_finer_with_size(name: str, count: int) -> None:
    book = values(name)
    assert len(book) == len(book.unique()) == count
    assert book.max() == 1
    assert 0 in book
    assert (book.min() < 0) == (name == "signed")
    positive = book[book > 0]
    per_decade = [int(((positive > 10.0**-d / 10) & (positive < 10.0**-d)).sum()) for d in range(7)]
    finest = 64 if name == "signed" else 128
    assert per_decade == [finest >> d for d in range(7)]


@pytest.mark.parametrize("name", ["nf4", "signed", "unsigned"])
def test_every_code_is_that_of_the_nearest_value(name: str) -> None:
    book, generator = values(name), torch.Generator().manual_seed(0)
    small = torch.rand(5000, generator=generator) * 10 ** (-8 * torch.rand(5000, generator=generator))
    x = torch.cat([torch.rand(5000, generator=generator), small, torch.tensor([0.0, 1.0])])
    x = torch.cat([x, -x])
    codes = blockwise.codebook(name, x.device).nearest(x)
    distance = (x.double()[:, None] - book.double()).abs()
    chosen = distance.gather(1, codes.long()[:, None])[:, 0]
    torch.testing.assert_close(chosen, distance.min(1).values, atol=1e-9, rtol=0)


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 1000, (1 << 18) + 5])
@pytest.mark.parametrize("name", ["nf4", "signed"])
def test_a_block_is_its_largest_magnitude_times_values(name: str, count: int) -> None:
    x = torch.randn(count, generator=torch.Generator().manual_seed(count))
    codes, largest = blockwise.encode(x, name, 64)
    assert torch.equal(largest, torch.stack([part.abs().max() for part in x.split(64)]))
    decoded = blockwise.decode(codes, largest, name, 64, count)
    scaled = torch.cat([part / part.abs().max() for part in x.split(64)])
    nearest = values(name)[blockwise.codebook(name, x.device).nearest(scaled).long()]
    expected = torch.cat([p * s for p, s in zip(nearest.split(64), largest, strict=True)])
    torch.testing.assert_close(decoded, expected, atol=1e-7, rtol=0)
    assert codes.numel() == (-(-count // 2) if name == "nf4" else count)


def test_zeros_stay_zeros() -> None:
    for scheme in SCHEMES:
        held = quantized.quantize(torch.zeros(8, 64), scheme)
        assert not quantized.dequantize(held, scheme, 8, 64, torch.float32).any()


@pytest.mark.parametrize(("scheme", "error"), [(SCHEMES[0], 0.1), (SCHEMES[1], 0.1), (SCHEMES[2], 0.01)])
def test_a_quantized_weight_is_close_and_as_small_as_it_says(scheme: Scheme, error: float) -> None:
    w = weight(512, 1024)
    held = quantized.quantize(w, scheme)
    off = quantized.dequantize(held, scheme, 512, 1024, torch.float32) - w
    assert 0 < off.norm() / w.norm() < error
    each = sum(tensor.nbytes for tensor in held.values()) / w.numel()
    assert each == pytest.approx(scheme.bytes_each, rel=0.005)
    assert qlora(quantization=scheme.kind, double=scheme.double).base_bytes == scheme.bytes_each


def test_int8_is_rounded_to_127_steps_of_each_outputs_largest() -> None:
    w, scheme = weight(), Scheme("int8")
    step = w.double().abs().amax(1, keepdim=True) / 127
    expected = ((w.double() / step).round() * step).float()
    found = quantized.dequantize(quantized.quantize(w, scheme), scheme, 96, 128, torch.float32)
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=0)


def test_double_quantization_moves_weights_little() -> None:
    w = weight(512, 512)
    once, twice = (
        quantized.dequantize(quantized.quantize(w, s), s, 512, 512, torch.float32)
        for s in (SCHEMES[1], SCHEMES[0])
    )
    assert 0 < (once - twice).norm() < 0.1 * (once - w).norm()


# Layers


def layer(kind: str, scheme: Scheme, dtype: torch.dtype = torch.float32) -> tuple[Any, torch.Tensor]:
    """A quantized layer in a model of its own, and the weight [outputs, inputs] that it stands for."""
    torch.manual_seed(0)
    plain: Any = nn.Linear(64, 48) if kind == "linear" else Conv1D(48, 64)
    nn.init.normal_(plain.bias)
    model: Any = nn.ModuleDict({"one": plain}).to(dtype)
    model.dtype = dtype
    w_OI = plain.weight.detach() if kind == "linear" else plain.weight.detach().T
    held = quantized.quantize(w_OI, scheme)
    quantized_layers.replace(model, "one", scheme, held)
    return model["one"], quantized.dequantize(held, scheme, 48, 64, torch.float32)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_layer_computes_with_the_weight_that_its_codes_stand_for(kind: str, scheme: Scheme) -> None:
    held, w_OI = layer(kind, scheme)
    x = torch.randn(3, 5, 64, requires_grad=True)
    y, gradient = held(x), torch.randn(3, 5, 48)
    torch.testing.assert_close(y, x @ w_OI.T + held.bias)
    y.backward(gradient)
    torch.testing.assert_close(x.grad, gradient @ w_OI)
    assert torch.equal(held.weight, w_OI if kind == "linear" else w_OI.T)
    plain = held.plain()
    assert type(plain) is (nn.Linear if kind == "linear" else Conv1D)
    torch.testing.assert_close(plain(x), y)


def test_only_codes_are_kept_for_the_backward_pass() -> None:
    held, _ = layer("linear", Scheme())
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        held(torch.randn(2, 64, requires_grad=True))
    assert sum(tensor.nbytes for tensor in kept) < 0.75 * 48 * 64


def test_the_models_dtype_does_not_reach_the_scales() -> None:
    held, w_OI = layer("linear", Scheme("nf4", double=False))
    half = held.to(torch.bfloat16)
    assert half.weight.dtype == half(torch.randn(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert torch.equal(half.to(torch.float32).weight, w_OI)


def test_an_autocast_decides_the_dtype() -> None:
    held, _ = layer("linear", Scheme())
    with torch.autocast("cpu", torch.bfloat16):
        assert held(torch.randn(2, 64)).dtype == torch.bfloat16


def test_layers_inside_the_blocks_are_quantized_and_nothing_else(make_model: MakeModel) -> None:
    base, model = make_model(), qlora().apply(make_model())
    names = {f"base_model.model.{n}.base_layer" for n, m in base.named_modules() if isinstance(m, nn.Linear)}
    names.discard("base_model.model.lm_head.base_layer")
    assert {name for name, _ in quantized_layers.layers(model)} == names
    assert len(names) == 14
    frozen = {
        n.removeprefix("base_model.model."): p for n, p in model.named_parameters() if not p.requires_grad
    }
    assert frozen
    assert all(torch.equal(p, base.get_parameter(n)) for n, p in frozen.items())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert quantized_layers.parameter_count(model) == base.num_parameters() + trained
    assert trained == qlora().count(base) == methods.create({"name": "lora"}, Config()).count(base)


# The cache


@pytest.fixture
def cached(tiny_model_folder: Path, tmp_path: Path) -> Callable[..., Any]:
    """``cached(**options)`` loads the base with that cache; ``precision`` is bf16 if not given."""

    def load(precision: str = "bf16", **options: Any) -> Any:
        method = qlora(cache=str(tmp_path / "codes"), **options)
        return method.load_base(find(str(tiny_model_folder)), precision)

    return load


def folders(tmp_path: Path) -> list[Path]:
    return [path for path in sorted((tmp_path / "codes").iterdir()) if path.is_dir()]


def test_the_second_start_reads_codes(cached: Any, tmp_path: Path) -> None:
    first = logits(cached())
    (folder,) = folders(tmp_path)
    tensors = load_file(folder / "weights.safetensors")
    other = {name: t.flip(0) if name.endswith("|codes") else t for name, t in tensors.items()}
    with store.artifact(folder) as partial:
        save_file(other, partial / "weights.safetensors")
    assert not torch.equal(logits(cached()), first)


def test_a_damaged_cache_is_made_again(cached: Any, tmp_path: Path) -> None:
    first = logits(cached())
    file = folders(tmp_path)[0] / "weights.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert torch.equal(logits(cached()), first)


@pytest.mark.parametrize(
    "options", [{}, {"quantization": "int8"}, {"init": "loftq", "loftq_iterations": 2}], ids=str
)
def test_codes_do_not_depend_on_how_they_came_about(
    cached: Any, make_model: MakeModel, options: dict[str, Any], tmp_path: Path
) -> None:
    for precision in ("bf16", "fp32"):
        on_load, in_place = cached(precision, **options), make_model(precision)
        expected = qlora(**options).apply(in_place)
        assert torch.equal(logits(qlora(**options).apply(on_load)), logits(expected))
        assert {p.dtype for p in on_load.parameters()} == {p.dtype for p in in_place.parameters()}
    assert len(folders(tmp_path)) == 1


def test_other_options_have_another_folder(cached: Any, tmp_path: Path) -> None:
    for options in (
        {},
        {"double": False},
        {"quantization": "int8"},
        {"init": "loftq"},
        {"init": "loftq", "rank": 4},
    ):
        cached(**options)
    assert len(folders(tmp_path)) == 5
    cached(rank=4)  # nothing that the base depends on
    assert len(folders(tmp_path)) == 5


def test_a_model_read_with_codes_is_an_ordinary_one(cached: Any, make_model: MakeModel) -> None:
    model = cached("fp32")
    assert model.config.to_dict() == make_model("fp32").config.to_dict()
    assert not model.is_quantized
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.layers[0].self_attn.q_proj.like.dtype == torch.float32


def test_a_cache_that_cannot_be_written(
    make_model: MakeModel, tmp_path: Path, tiny_model_folder: Path
) -> None:
    (tmp_path / "file").write_text("")
    method = qlora(cache=str(tmp_path / "file"))
    (problem,) = method.problems(make_model())
    assert problem.where == "method.cache"
    with pytest.raises(UserError, match="cannot be a folder"):
        method.load_base(find(str(tiny_model_folder)), "bf16")


def test_a_weight_that_is_not_finite_is_refused(
    make_model: MakeModel, tmp_path: Path, tokenizer: Any
) -> None:
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
    with pytest.raises(ModelError, match=r"the weight of model\.layers\.1\.mlp\.up_proj is not finite"):
        qlora().apply(model)
    model.save_pretrained(tmp_path / "bad")
    with pytest.raises(ModelError, match="cannot be loaded"):
        qlora(cache=str(tmp_path / "codes")).load_base(find(str(tmp_path / "bad")), "bf16")


# The adapter


def test_loftq_begins_closer_to_the_base(make_model: MakeModel) -> None:
    expected = logits(make_model())
    plain, once, thrice = (
        (logits(qlora(**options).apply(make_model())) - expected).square().mean()
        for options in ({}, {"init": "loftq"}, {"init": "loftq", "loftq_iterations": 3})
    )
    assert once < 0.7 * plain
    assert thrice < 0.7 * plain


def test_loftqs_scale_is_taken_out_of_its_factors(make_model: MakeModel) -> None:
    one, other = (qlora(init="loftq", rank=4, alpha=alpha).apply(make_model()) for alpha in (4, 32))
    torch.testing.assert_close(logits(one), logits(other), atol=1e-5, rtol=0)


@pytest.fixture
def trained(make_trainer: Any, tmp_path: Path, request: Any) -> tuple[Any, Path]:
    """A trained model and its adapter's folder; the fixture's parameter is the method's options."""
    options = getattr(request, "param", {})
    trainer = make_trainer(method={"name": "qlora", "rank": 4, **options}, lr=0.02, max_steps=4)
    trainer.run()
    folder = tmp_path / "adapter"
    folder.mkdir()
    trainer.method.export(trainer.model, folder)
    return trainer.model, folder


WAYS = [
    {},
    {"quantization": "int8"},
    {"init": "loftq"},
    {"init": "loftq", "loftq_iterations": 2, "rslora": True},
]


def test_to_put_an_adapter_on_it_no_weight_is_made_whole(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def injected() -> Any:
        torch.manual_seed(3)
        return qlora().apply(make_model())

    with monkeypatch.context() as patch:
        patch.setattr(quantized_layers, "unread", nullcontext)
        plain = injected().state_dict()
    made = list[tuple[Any, ...]]()
    monkeypatch.setattr(quantized_layers, "dequantize", lambda *args: made.append(args))
    own = injected().state_dict()
    assert not made
    assert own.keys() == plain.keys()
    assert all(torch.equal(own[name], plain[name]) for name in own)


@pytest.mark.parametrize("trained", WAYS, indirect=True, ids=str)
def test_an_adapter_comes_back_on_the_same_base(trained: tuple[Any, Path], tiny_model_folder: Path) -> None:
    model, folder = trained
    manifest = {"base": str(tiny_model_folder), "method": "qlora"}
    again, method = methods.load_adapter(folder, manifest, "fp32")
    assert method is Qlora
    assert torch.equal(logits(again), logits(model))


def test_what_is_saved_is_pefts_own_lora(trained: tuple[Any, Path], make_model: MakeModel) -> None:
    model, folder = trained
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "quantization.json",
    ]  # fmt: skip
    assert "cache" not in json.loads((folder / "quantization.json").read_text())
    base = make_model()
    on_original = PeftModel.from_pretrained(base, folder)
    assert (logits(on_original) - logits(model)).abs().max() > 1e-3  # it belongs to the quantized base
    assert {name for name, _ in on_original.named_parameters() if "lora_" in name}


def test_merging_gives_the_dequantized_base_with_the_term(
    trained: tuple[Any, Path], make_model: MakeModel, tmp_path: Path
) -> None:
    model, _ = trained
    expected, layer_0 = logits(model), model.base_model.model.model.layers[0].mlp.up_proj
    a, b = layer_0.lora_A["default"].weight, layer_0.lora_B["default"].weight
    weight = layer_0.base_layer.weight + layer_0.scaling["default"] * b @ a
    merged = Qlora.merge(model)
    assert type(merged) is type(make_model())
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(merged.model.layers[0].mlp.up_proj.weight, weight)
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(
        logits(load_model(find(str(tmp_path / "merged")))), expected, atol=1e-4, rtol=0
    )


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (None, r"no quantization\.json"),
        ("[]", "quantization.json"),
        ('{"quantization": "nf3"}', "nf3"),
        ("{", "JSON"),
        ('{"rank": 1000000000, "init": "loftq", "loftq_iterations": 2}', "other ranks"),
    ],
)
def test_an_adapter_that_does_not_say_how_its_base_was_held(
    trained: tuple[Any, Path], make_model: MakeModel, text: str | None, what: str
) -> None:
    _, folder = trained
    (folder / "quantization.json").unlink()
    if text is not None:
        (folder / "quantization.json").write_text(text)
    with pytest.raises(ModelError, match=what):
        Qlora.load(make_model(), folder)


def test_another_tools_lora_is_not_taken_for_ours(trained: tuple[Any, Path]) -> None:
    assert methods.foreign_manifest(trained[1])["method"] == "lora"


def test_a_run_from_a_recipe(tiny_model_folder: Path, tmp_path: Path) -> None:
    """Measured, trained, saved and gone on with by another stage, on the merged model."""
    rows = ({"prompt": f"Say {n}.", "completion": f"{n}, then {n + 1}."} for n in range(24))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {"data": {"train": str(tmp_path / "rows.jsonl"), "valid_share": 0.2}, "precision": "bf16",
              "evaluate": {"limit": 2, "max_new_tokens": 4},
              "train": {"max_steps": 2, "tokens_per_batch": 96}}  # fmt: skip
    stages = [
        {
            "name": "one",
            "model": str(tiny_model_folder),
            "method": {"name": "qlora", "cache": str(tmp_path / "codes")},
        },
        {"name": "two", "model": "stage:one", "method": "lora"},
    ]
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump({"output": str(tmp_path / "run"), "stages": [{**shared, **stage} for stage in stages]})
    )
    pipeline.run(pipeline.load(tmp_path / "recipe.yaml"), quiet=True)
    results = store.read_record(tmp_path / "run" / "results.json")
    first, second = results["stages"]
    base = load_model(find(str(tiny_model_folder)))
    assert first["parameters"]["total"] == base.num_parameters() + first["parameters"]["trainable"]
    assert second["parameters"]["total"] == first["parameters"]["total"]
    assert len(folders(tmp_path)) == 1
    adapter = tmp_path / "run" / "stages" / "one" / "adapter"
    plain = load_model(find(str(tmp_path / "run" / "stages" / "two" / "base")))
    model, method = methods.load_adapter(adapter, store.verify(adapter), "fp32")
    torch.testing.assert_close(logits(method.merge(model)), logits(plain), atol=0.05, rtol=0)  # saved in bf16
