"""What each method trains, saves, loads and merges."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from tunewright import methods
from tunewright.core import plugins
from tunewright.core.errors import DamagedError, ModelError, RecipeError
from tunewright.methods.full import Full
from tunewright.methods.lora import Config, Lora
from tunewright.methods.scratch import Scratch
from tunewright.models.load import find, load_model

MakeModel = Callable[..., Any]
IDS = torch.tensor([[5, 77, 1030, 9, 4, 42]])


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    model.eval()
    return model(input_ids=IDS).logits.float()


def close(one: torch.Tensor, other: torch.Tensor, atol: float) -> None:
    torch.testing.assert_close(one, other, atol=atol, rtol=0)


def trainable(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def lora(**options: Any) -> Lora:
    return Lora(Config(**options))


# Names


def methods_config(name: str) -> Any:
    return plugins.load("methods", name).Config()


def test_a_misspelt_method_is_told_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean 'lora'"):
        methods.kind("lroa")


# LoRA


def test_lora_trains_its_factors_only(make_model: MakeModel) -> None:
    model = lora(rank=4).apply(make_model())
    names = trainable(model)
    assert names
    assert all("lora_A" in name or "lora_B" in name for name in names)


def test_lora_has_rank_times_in_plus_out_parameters_for_every_linear_layer(make_model: MakeModel) -> None:
    base = make_model()
    linear = {n: m for n, m in base.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    expected = 4 * sum(layer.in_features + layer.out_features for layer in linear.values())
    assert len(linear) == 2 * 7
    model = lora(rank=4).apply(base)
    assert sum(parameter.numel() for parameter in trainable(model).values()) == expected


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], r".*\.[qv]_proj"])
def test_lora_goes_where_it_is_told(make_model: MakeModel, targets: Any) -> None:
    names = trainable(lora(target_modules=targets).apply(make_model()))
    assert {name.split(".lora_")[0].split(".")[-1] for name in names} == {"q_proj", "v_proj"}


def test_an_untrained_lora_changes_nothing(make_model: MakeModel) -> None:
    before = logits(make_model())
    assert torch.equal(logits(lora(dropout=0.5).apply(make_model())), before)


def test_lora_is_the_weight_plus_alpha_over_rank_times_b_a(make_model: MakeModel) -> None:
    model = lora(rank=4, alpha=12, target_modules=["q_proj"]).apply(make_model())
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(3, 32)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = x @ (layer.base_layer.weight + 12 / 4 * b @ a).T
    torch.testing.assert_close(layer(x), expected)


@pytest.fixture
def trained(make_trainer: Any, tmp_path: Path) -> tuple[torch.Tensor, Path]:
    """The logits of a trained LoRA, and the folder it is saved in."""
    trainer = make_trainer(method={"name": "lora", "rank": 4, "alpha": 12}, lr=0.02, max_steps=4)
    trainer.run()
    folder = tmp_path / "adapter"
    folder.mkdir()
    lora(rank=4, alpha=12).export(trainer.model, folder)
    return logits(trainer.model), folder


def test_peft_reads_what_lora_saves(trained: tuple[torch.Tensor, Path], make_model: MakeModel) -> None:
    expected, folder = trained
    close(logits(PeftModel.from_pretrained(make_model(), folder)), expected, 1e-5)


def test_a_saved_lora_is_pefts_own_format_and_nothing_else(
    trained: tuple[torch.Tensor, Path], tiny_model_folder: Path
) -> None:
    _, folder = trained
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 12)
    assert config["base_model_name_or_path"] == str(tiny_model_folder)


def test_an_adapter_is_found_again_by_its_manifest(
    trained: tuple[torch.Tensor, Path], tiny_model_folder: Path
) -> None:
    expected, folder = trained
    manifest = {"base": str(tiny_model_folder), "method": "lora"}
    model, method = methods.load_adapter(folder, manifest, "fp32")
    assert method is Lora
    close(logits(model), expected, 1e-5)


@pytest.mark.parametrize("manifest", [{}, {"base": "builtin:pico"}, {"method": "lora"}])
def test_a_manifest_must_name_base_and_method(tmp_path: Path, manifest: dict[str, str]) -> None:
    with pytest.raises(DamagedError, match="does not name base and method"):
        methods.load_adapter(tmp_path, manifest, "fp32")


def test_an_adapter_whose_base_is_gone(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no folder"):
        methods.load_adapter(tmp_path, {"base": str(tmp_path / "gone"), "method": "lora"}, "fp32")


@pytest.mark.parametrize(
    ("variable", "trusted", "runs"), [("", False, False), ("1", False, True), ("", True, True)]
)
def test_a_bases_code_runs_only_if_the_user_says_so(
    tiny_model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    trusted: bool,
    runs: bool,
) -> None:
    folder = Path(shutil.copytree(tiny_model_folder, tmp_path / "base"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "own.Model"}}))
    manifest = {"base": str(folder), "method": "lora", "trust_remote_code": True}
    monkeypatch.setenv("TUNEWRIGHT_TRUST_REMOTE_CODE", variable)
    if runs:
        assert methods.base_of(manifest, trusted).trust_remote_code
    else:
        with pytest.raises(ModelError, match="set the environment variable TUNEWRIGHT_TRUST_REMOTE_CODE=1"):
            methods.base_of(manifest, trusted)
    with pytest.raises(ModelError, match="wants to run its own Python code"):
        methods.base_of({**manifest, "trust_remote_code": False}, trusted)


def test_another_tools_adapter_names_its_base(
    trained: tuple[torch.Tensor, Path], tiny_model_folder: Path
) -> None:
    expected, folder = trained
    manifest = methods.foreign_manifest(folder)
    assert manifest == {"base": str(tiny_model_folder), "method": "lora", "precision": "fp32"}
    close(logits(methods.load_adapter(folder, manifest, "fp32")[0]), expected, 1e-5)


@pytest.mark.parametrize(
    "targets", ["all-linear", r".*\.[qv]_proj", r".*layers\.1\..*_proj", ["k_proj", "mlp.up_proj"]]
)
def test_what_was_adapted_by_a_pattern_is_found_in_the_weights(
    make_model: MakeModel, tmp_path: Path, targets: Any
) -> None:
    model = lora(rank=4, target_modules=targets).apply(make_model())
    for parameter in trainable(model).values():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    again = Lora.load(make_model(), tmp_path)
    close(logits(again), logits(model), 1e-5)
    assert {n for n, _ in again.named_parameters()} == {n for n, _ in model.named_parameters()}


# Full and scratch


def test_full_saves_an_ordinary_hugging_face_folder(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    Full(methods_config("full")).export(model, tmp_path)
    assert {"config.json", "model.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    assert torch.equal(logits(load_model(find(str(tmp_path)))), logits(model))


def test_scratch_needs_the_architecture_only() -> None:
    assert not Scratch.needs_weights
    assert Full.needs_weights
    assert Lora.needs_weights
    assert methods.kind("scratch") is Scratch
