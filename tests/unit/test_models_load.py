"""Base models are found, or it is said what to do; what is damaged or foreign is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tunewright.core import machine
from tunewright.core.errors import ModelError
from tunewright.models import inspect
from tunewright.models.load import ModelSource, find, fingerprint, load_model, load_tokenizer, outline


def refused(name: str | Path, trust: bool = False) -> str:
    with pytest.raises(ModelError) as caught:
        find(str(name), trust)
    return str(caught.value)


def unloaded(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(find(str(folder)))
    return str(caught.value)


@pytest.fixture
def folder(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "copy"))


# Finding


def test_the_builtin_model_is_found() -> None:
    source = find("builtin:pico")
    assert source.name == "builtin:pico"
    assert source.folder is not None
    assert (source.folder / "config.json").is_file()


def test_a_misspelt_builtin_is_told_the_nearest() -> None:
    assert refused("builtin:pica") == "model: there is no built-in model 'pica'; fix: did you mean 'pico'?"


def test_a_folder_is_found(tiny_model_folder: Path) -> None:
    assert find(str(tiny_model_folder)) == ModelSource(str(tiny_model_folder), str(tiny_model_folder))


def test_a_folder_in_the_users_home_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert find("~/copy").folder == folder


def test_a_folder_without_a_config_is_no_model(tmp_path: Path) -> None:
    problem = refused(tmp_path)
    assert problem.startswith(f"model: {tmp_path} holds no config.json")
    assert "; fix: " in problem


@pytest.mark.parametrize("name", ["/nowhere/model", "./model", "../model", "~/no/model", "a/b/c"])
def test_a_folder_that_is_not_there(name: str) -> None:
    assert refused(name) == f"model: there is no folder {name}; fix: check the path, or use builtin:pico"


@pytest.mark.parametrize("name", ["someone/some-model", "some-model", "not a name", "x" * 200])
def test_a_hub_id_without_a_network_says_what_to_do(name: str) -> None:
    problem = refused(name)
    assert f"{name} is neither a folder nor in the model cache" in problem
    assert f"; fix: on a connected machine run `hf download {name}`" in problem
    assert "builtin:pico" in problem


def test_a_model_that_brings_its_own_code_is_refused_until_trusted(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoModel": "evil.Model"}}))
    assert refused(folder) == (
        f"model: {folder} wants to run its own Python code (auto_map in config.json); "
        "fix: read that code, then set trust_remote_code: true"
    )
    assert find(str(folder), trust_remote_code=True).trust_remote_code


@pytest.mark.parametrize("content", ["", "{", "\x00", "null", "3", "[]"])
def test_a_config_that_is_no_json_object(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    assert refused(folder).startswith(f"{folder / 'config.json'}: ")


# Loading


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float32)]
)
def test_weights_are_held_as_the_precision_says(
    tiny_model_folder: Path, precision: str, dtype: torch.dtype
) -> None:
    model = load_model(find(str(tiny_model_folder)), precision)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_random_weights_have_the_architecture_and_follow_the_seed(tiny_model_folder: Path) -> None:
    source, made = find(str(tiny_model_folder)), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        made.append(load_model(source, random_weights=True).state_dict())
    stored = load_model(source).state_dict()
    assert {name: t.shape for name, t in made[0].items()} == {name: t.shape for name, t in stored.items()}
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(made[0][name], made[1][name])
    assert not torch.equal(made[0][name], made[2][name])
    assert not torch.equal(made[0][name], stored[name])


def test_random_weights_need_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert load_model(find(str(folder)), random_weights=True).num_parameters() > 0


def test_missing_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert unloaded(folder).startswith(f"model: {folder} cannot be loaded: ")


def test_pickled_weights_are_not_read(folder: Path) -> None:
    state = load_model(find(str(folder))).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert refused(folder).startswith(f"{folder}: its weights are pickles, which can run code")


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 123\n"


def test_weights_that_are_a_git_lfs_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(LFS_POINTER)
    assert refused(folder) == (
        f"{folder / 'model.safetensors'}: a Git LFS pointer, not the file itself; fix: fetch it: git lfs pull"
    )


def test_a_model_too_large_for_the_machine_is_not_initialised(folder: Path) -> None:
    path = folder / "config.json"
    sizes = {"hidden_size": 1 << 16, "intermediate_size": 1 << 20, "num_attention_heads": 1 << 9}
    path.write_text(json.dumps({**json.loads(path.read_text()), **sizes, "head_dim": None}))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"TB for its weights, .* of memory is free"):
        load_model(find(str(folder)), random_weights=True)


def test_an_unknown_architecture(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "abacus"}')
    assert unloaded(folder).startswith(f"model: {folder} cannot be loaded: ")


def test_the_tokenizer_comes_with_its_template(tiny_model_folder: Path) -> None:
    tokenizer = load_tokenizer(find(str(tiny_model_folder)))
    assert tokenizer.is_fast
    assert tokenizer.chat_template.startswith("{% for m in messages %}")
    assert tokenizer.eos_token == "<|end|>"


@pytest.mark.parametrize("content", [None, "{}", "no json"])
def test_a_tokenizer_that_cannot_be_used(folder: Path, content: str | None) -> None:
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer.json").unlink()
    if content is not None:
        (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(find(str(folder)))


# Telling apart


def test_a_fingerprint_follows_the_files(folder: Path, tiny_model_folder: Path) -> None:
    before = fingerprint(find(str(folder)))
    assert before == fingerprint(find(str(tiny_model_folder)))
    (folder / "notes.txt").write_text("not a part of the model")
    assert fingerprint(find(str(folder))) == before
    (folder / "chat_template.jinja").write_text("other")
    assert fingerprint(find(str(folder))) != before


def test_a_hub_ids_fingerprint_is_its_name() -> None:
    one, other = (fingerprint(ModelSource(name, name)) for name in ("a/b", "a/c"))
    assert one != other


# Inspecting


def test_parameters_are_counted_without_loading(tiny_model_folder: Path) -> None:
    source = find(str(tiny_model_folder))
    assert inspect.parameter_count(source) == load_model(source).num_parameters()


def test_nothing_is_known_of_a_model_that_is_not_here() -> None:
    source = ModelSource("a/b", "a/b")
    assert inspect.parameter_count(source) is None
    assert inspect.context_length(source) is None


@pytest.mark.parametrize("content", [b"", b"\x10\x00", LFS_POINTER, b"\x02\x00\x00\x00\x00\x00\x00\x00[]"])
def test_weights_that_are_no_safetensors_are_told_before_anything_is_loaded(
    folder: Path, content: bytes
) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        inspect.parameter_count(find(str(folder)))


@pytest.mark.parametrize(
    ("config", "length"),
    [({"max_position_embeddings": 256}, 256), ({"n_positions": 1024}, 1024), ({}, None)],
)
def test_the_context_length_is_in_the_config(
    tmp_path: Path, config: dict[str, Any], length: int | None
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert inspect.context_length(find(str(tmp_path))) == length


def test_free_memory_is_told_in_bytes() -> None:
    assert 2**20 < machine.available_memory() < 2**50


def test_an_outline_has_the_tensors_of_the_model() -> None:
    """Also that two of them are one: nothing is initialised in it, where transformers would tie them."""
    source = find("builtin:pico")
    own, whole = outline(source), load_model(source, "bf16")
    assert own.config.tie_word_embeddings
    for tensors in (lambda model: model.named_parameters(), lambda model: model.named_buffers()):
        assert {n: (x.shape, x.dtype) for n, x in tensors(own) if "inv_freq" not in n} == {
            n: (x.shape, x.dtype) for n, x in tensors(whole) if "inv_freq" not in n
        }
    assert {x.device.type for x in own.parameters()} == {"meta"}


def test_a_model_of_another_kind_is_said_to_be_none_of_language(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(
        ModelError, match="of type 'vit', which is no causal language model; fix: use a model"
    ):
        outline(ModelSource("m", str(tmp_path)))
