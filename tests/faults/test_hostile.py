"""Models and adapters made to do harm: none of their code runs, and each is refused by name, soon and cheaply."""

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bounded import Bounded, chosen, within
from safetensors.torch import load_file, save_file

from tunewright.models.load import find, load_model

Harm = Callable[[Path, Path], None]
"""Does something to a model's folder so that, if code runs, the canary is made."""


@pytest.fixture
def folder(tiny_model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "copy"))


@pytest.fixture(scope="module")
def good_adapter(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "good"
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    get_peft_model(load_model(find(str(tiny_model_folder))), config).save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(good_adapter: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good_adapter, tmp_path / "adapter"))


def fault(told: dict[str, Any], canary: Path, place: str) -> str:
    """What speaks against a refusal, or an empty string."""
    if canary.exists():
        return "the payload ran"
    if told["error"] not in ("ModelError", "RecipeError", "UserError"):
        return f"{told['error'] or 'nothing'} was raised: {told.get('text')}"
    if not any(place in where and what for where, what, _ in told["problems"]):
        return f"the problem does not name {place}: {told['problems']}"
    if not within(told):
        return f"it took {told['seconds']:.2f} s and {told['growth'] >> 20} MB"
    return ""


def judge(tally: Any, told: dict[str, Any], canary: Path, place: str, what: str) -> None:
    """Count one payload."""
    broken = fault(told, canary, place)
    tally.add(not broken, f"{what}: {broken}")
    for name, value in (("seconds", told["seconds"]), ("megabytes", told["growth"] / (1 << 20))):
        tally.note(name, max(tally.notes.get(name, 0), round(value, 3)))


class Payload:
    """Pickled, it makes the canary when it is read."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.canary),))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def put(path: Path, content: bytes | int) -> None:
    """The file's content, or a size that it has without taking up the disk."""
    path.write_bytes(content if isinstance(content, bytes) else b'{"a": "')
    if isinstance(content, int):
        os.truncate(path, content)


def evil(folder: Path, canary: Path, name: str = "evil.py") -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(
        f"import os\nos.mkdir({str(canary)!r})\nclass Config: pass\nclass Model: pass\n"
    )


# Pickles


def pickled(folder: Path, canary: Path, name: str) -> None:
    (folder / name).write_bytes(pickle.dumps(Payload(canary)))


@pytest.mark.row(16)
def test_the_payloads_do_run_where_they_are_let(
    bounded: Bounded, folder: Path, canary: Path, tally: Any
) -> None:
    pickled(folder, canary, "a.bin")
    pickle.loads((folder / "a.bin").read_bytes())
    tally.add(canary.exists(), "the pickle makes no canary")
    canary.rmdir()
    evil(folder, canary)
    edit(folder / "config.json", auto_map={"AutoConfig": "evil.Config"}, model_type="own")
    bounded.call("trusted", folder)
    tally.add(canary.exists(), "the module makes no canary")


@pytest.mark.row(16)
@pytest.mark.parametrize("zipped", [False, True], ids=["pickle", "zip"])
@pytest.mark.parametrize("call", ["find", "model", "speaker"])
def test_pickled_weights(
    bounded: Bounded, folder: Path, canary: Path, tally: Any, call: str, zipped: bool
) -> None:
    (folder / "model.safetensors").unlink()
    pickled(folder, canary, "pytorch_model.bin")
    if zipped:
        torch.save(Payload(canary), folder / "pytorch_model.bin")
    judge(tally, bounded.call(call, folder), canary, str(folder), "pytorch_model.bin")


@pytest.mark.row(16)
@pytest.mark.parametrize("call", ["speaker", "adapter"])
def test_a_pickled_adapter(bounded: Bounded, adapter: Path, canary: Path, tally: Any, call: str) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    pickled(adapter, canary, "adapter_model.bin")
    judge(tally, bounded.call(call, adapter), canary, str(adapter), "adapter_model.bin")


@pytest.mark.row(16)
def test_pickles_beside_a_good_model_are_not_looked_at(
    bounded: Bounded, folder: Path, adapter: Path, canary: Path, tally: Any
) -> None:
    names = ("training_args.bin", "optimizer.pt", "scheduler.pt", "pytorch_model.bin", "rng_state.pth")
    for name in (*names, "adapter_model.bin"):
        pickled(folder, canary, name)
        pickled(adapter, canary, name)
    for call, place in (("all", folder), ("speaker", folder), ("speaker", adapter)):
        told = bounded.call(call, place)
        for name in names:
            tally.add(not told["error"] and not canary.exists(), f"{name} through {call}: {told}")


# Code that comes along

AUTO = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
CODE: dict[str, Harm] = {
    "config": lambda at, _: edit(at / "config.json", auto_map=AUTO),
    "config of an unknown type": lambda at, _: edit(at / "config.json", auto_map=AUTO, model_type="own"),
    "inner config": lambda at, _: edit(at / "config.json", text_config={"auto_map": AUTO}),
    "tokenizer": lambda at, _: edit(at / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]}),
    "another repository": lambda at, _: edit(at / "config.json", auto_map={"AutoModel": "a/b--evil.Model"}),
    "custom_generate": lambda at, canary: evil(at, canary, "custom_generate/generate.py"),
    "hub kernel": lambda at, _: edit(at / "config.json", attn_implementation="someone/kernel"),
    "hub kernel, private": lambda at, _: edit(at / "config.json", _attn_implementation="a/b:c"),
}  # fmt: skip


@pytest.mark.row(16)
@pytest.mark.parametrize("call", chosen(["find", "tokenizer", "model", "scratch", "speaker"], 2))
@pytest.mark.parametrize("name", CODE)
def test_code_that_comes_along(
    bounded: Bounded, folder: Path, canary: Path, tally: Any, name: str, call: str
) -> None:
    evil(folder, canary)
    CODE[name](folder, canary)
    told = bounded.call(call, folder)
    judge(tally, told, canary, "model", f"{name} through {call}")
    tally.add(
        "set trust_remote_code: true" in str(told["problems"]), f"{name}: it is not said how to allow it"
    )


# Weights whose header lies


def header(length: int | None = None, body: bytes | None = None, tail: int = 64, **tensors: Any) -> bytes:
    entries = {
        name: dict(zip(("dtype", "shape", "data_offsets"), t, strict=True)) for name, t in tensors.items()
    }
    body = json.dumps(entries).encode() if body is None else body
    return struct.pack("<Q", len(body) if length is None else length) + body + b"\0" * tail


HEADERS: dict[str, Callable[[], bytes]] = {
    "length of 2**63": lambda: header(length=1 << 63),
    "length of 2**64 - 1": lambda: header(length=(1 << 64) - 1),
    "length beyond the file": lambda: header(length=1 << 20),
    "100 MB": lambda: header(body=b'{"a":"' + b"x" * 100_000_000 + b'"}'),
    "15 MB of lists": lambda: header(body=b'{"a":[' + b"[]," * 5_000_000 + b"[]]}"),
    "shape of 2**40": lambda: header(a=("F32", [1 << 40], [0, 64])),
    "shape of 2**60 often": lambda: header(a=("F32", [1 << 60] * 10_000, [0, 64])),
    "shape that overflows": lambda: header(a=("F32", [1 << 32, 1 << 32], [0, 0]), tail=0),
    "negative shape": lambda: header(a=("F32", [-4, -4], [0, 64])),
    "fractional shape": lambda: header(a=("F32", [1.5], [0, 64])),
    "boolean shape": lambda: header(a=("F32", [True] * 2, [0, 4]), tail=4),
    "overlap": lambda: header(a=("F32", [8], [0, 32]), b=("F32", [16], [0, 64])),
    "gap": lambda: header(a=("F32", [4], [0, 16]), b=("F32", [4], [48, 64])),
    "negative offset": lambda: header(a=("F32", [16], [-64, 0])),
    "offsets turned round": lambda: header(a=("F32", [16], [64, 0])),
    "three offsets": lambda: header(a=("F32", [16], [0, 32, 64])),
    "offsets of 4,000 digits": lambda: header(body=b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,1' + b"0" * 4000 + b"]}}"),
    "offsets of 10,000 digits": lambda: header(body=b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,1' + b"0" * 10000 + b"]}}"),
    "more bytes than asked for": lambda: header(a=("F32", [4], [0, 16])),
    "unknown type": lambda: header(a=("F99", [16], [0, 64])),
    "type that is a list": lambda: header(a=([], [16], [0, 64])),
    "not JSON": lambda: header(body=b"\xff" * 64),
    "list": lambda: header(body=b"[]", tail=0),
    "entries that are numbers": lambda: header(body=b'{"a": 1}', tail=0),
    "metadata that is a list": lambda: header(body=b'{"__metadata__": []}', tail=0),
    "deep nesting": lambda: header(body=b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "empty": lambda: b"",
    "zeros": lambda: bytes(64),
    "zip": lambda: b"PK\x03\x04" + bytes(60),
}  # fmt: skip


@pytest.mark.row(16)
@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_lie(
    bounded: Bounded, folder: Path, adapter: Path, canary: Path, tally: Any, name: str
) -> None:
    content = HEADERS[name]()
    (folder / "model.safetensors").write_bytes(content)
    (adapter / "adapter_model.safetensors").write_bytes(content)
    for call in chosen(("find", "model")):
        judge(tally, bounded.call(call, folder), canary, "model.safetensors", f"{name} through {call}")
    told = bounded.call("adapter", adapter)
    judge(tally, told, canary, "adapter_model.safetensors", f"{name} in an adapter")


@pytest.mark.row(16)
def test_weights_of_another_shape(bounded: Bounded, folder: Path, canary: Path, tally: Any) -> None:
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"] = torch.zeros(64)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    judge(tally, bounded.call("model", folder), canary, "model", "another shape")


# Configs

SIZES = ("hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size", "num_attention_heads",
         "num_key_value_heads", "max_position_embeddings", "head_dim", "num_local_experts")  # fmt: skip
ODD = (10**9, 10**30, -1, "64", "x", 1.5, True, {}, [10**9])


@pytest.mark.row(16)
@pytest.mark.parametrize("call", chosen(["find", "scratch", "model"]))
def test_sizes_that_no_model_has(
    bounded: Bounded, folder: Path, canary: Path, tally: Any, times: Any, call: str
) -> None:
    good = (folder / "config.json").read_text()
    for key in SIZES:
        for value in ODD[: times(4, len(ODD))]:
            edit(folder / "config.json", **{key: value})
            judge(
                tally, bounded.call(call, folder), canary, "config.json", f"{key} = {value!r} through {call}"
            )
            (folder / "config.json").write_text(good)


CONFIGS: dict[str, Callable[[], bytes | int]] = {
    "200 MB": lambda: 200 << 20,
    "15 MB of lists": lambda: b'{"a": [' + b"[]," * 5_000_000 + b"[]]}",
    "15 MB of text": lambda: b'{"a": "' + b"x" * (15 << 20),
    "deep lists": lambda: b'{"a": ' + b"[" * 1_000_000,
    "deep objects": lambda: b'{"a": ' * 100_000 + b"1" + b"}" * 100_000,
    "900 deep": lambda: b'{"a": ' * 900 + b"1" + b"}" * 900,
    "NaN": lambda: b'{"model_type": "llama", "rope_theta": NaN}',
    "10,000 digits": lambda: b'{"hidden_size": 1' + b"0" * 10_000 + b"}",
    "not UTF-8": lambda: b'{"a": "\xff\xfe"}',
    "NUL": lambda: b"\0" * 100,
    "list": lambda: b"[1]",
    "YAML": lambda: b"a: !!python/object/apply:os.system [x]",
    "weights elsewhere": lambda: b'{"model_type": "llama", "transformers_weights": "../x.safetensors"}',
}
OF_A_FILE = ("config.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json")


@pytest.mark.row(16)
@pytest.mark.parametrize("name", CONFIGS)
def test_giant_and_broken_configs(
    bounded: Bounded, folder: Path, canary: Path, tally: Any, times: Any, name: str
) -> None:
    for file in OF_A_FILE[: 1 if name == "weights elsewhere" else times(1, len(OF_A_FILE))]:
        before = (folder / file).read_bytes() if (folder / file).exists() else b"{}"
        put(folder / file, CONFIGS[name]())
        for call in ("find", "tokenizer"):
            judge(tally, bounded.call(call, folder), canary, file, f"{name} as {file} through {call}")
        (folder / file).write_bytes(before)


LOADED: dict[str, dict[str, Any]] = {
    "no such type": {"model_type": "abacus"},
    "a type that is a number": {"model_type": 5},
    "a type that is a list": {"model_type": []},
    "a path as type": {"model_type": "../../evil"},
    "vocabulary of another size": {"vocab_size": 7},
    "vocabulary at the ceiling": {"vocab_size": 1 << 22},
    "hidden size at the ceiling": {"hidden_size": 1 << 16},
    "no heads": {"num_attention_heads": 0},
    "text as theta": {"rope_theta": "x", "rope_parameters": "x"},
    "unknown activation": {"hidden_act": "os.system"},
    "quantized as a list": {"quantization_config": [1]},
    "an encoder": {"model_type": "vit"},
    "a dtype that is none": {"dtype": "os.system"},
}


@pytest.mark.row(16)
@pytest.mark.parametrize("name", LOADED)
def test_configs_that_fit_no_weights(
    bounded: Bounded, folder: Path, canary: Path, tally: Any, name: str
) -> None:
    edit(folder / "config.json", **LOADED[name])
    judge(tally, bounded.call("model", folder), canary, "model", name)


UNHEEDED: dict[str, dict[str, Any]] = {
    "quantized how": {"quantization_config": {"quant_method": "evil"}},
    "versions": {"transformers_version": {}, "_name_or_path": "/nowhere"},
    "an architecture that is none": {"architectures": ["evil.Model"]},
}


@pytest.mark.row(16)
@pytest.mark.parametrize("name", UNHEEDED)
def test_what_the_library_does_not_heed_runs_nothing(
    bounded: Bounded, folder: Path, canary: Path, tally: Any, name: str
) -> None:
    evil(folder, canary)
    edit(folder / "config.json", **UNHEEDED[name])
    told = bounded.call("model", folder)
    tally.add(not told["error"] and not canary.exists(), f"{name}: {told}")


@pytest.mark.row(16)
def test_a_large_architecture_is_not_allocated(
    bounded: Bounded, folder: Path, canary: Path, tally: Any
) -> None:
    (folder / "model.safetensors").unlink()
    for layers, hidden in ((512, 1 << 13), (1, 1 << 16), (64, 1 << 15)):
        sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": 1 << 18}
        edit(folder / "config.json", **sizes, head_dim=64, vocab_size=1 << 20)
        told = bounded.call("scratch", folder)
        judge(tally, told, canary, "model", f"{layers} layers of {hidden}")


# Tokenizers

TOKENIZERS: dict[str, Callable[[], bytes | int]] = {
    "300 MB": lambda: 300 << 20,
    "60 MB of lists": lambda: b'{"a": [' + b"[]," * 20_000_000 + b"[]]}",
    "10 MB of lists": lambda: b'{"model": [' + b"[]," * 1_000_000 + b"[]]}",
    "deep lists": lambda: b'{"model": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": lambda: b'{"model": ' * 100_000 + b"1" + b"}" * 100_000,
    "900 deep": lambda: b'{"model": ' * 900 + b"1" + b"}" * 900,
    "a number as model": lambda: b'{"model": 5}',
    "a list": lambda: b"[]",
    "nothing": lambda: b"{}",
    "no JSON": lambda: b"{]}",
    "no text": lambda: b"{\xff}",
    "vocabulary of numbers": lambda: b'{"version": "1.0", "model": {"type": "BPE", "vocab": [1, 2], "merges": []}, "added_tokens": []}',
    "merges out of nowhere": lambda: b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["b", "c"]]}, "added_tokens": []}',
    "negative ids": lambda: b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}, "added_tokens": []}',
    "added tokens as text": lambda: b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "added_tokens": "x"}',
    "unknown model": lambda: b'{"version": "1.0", "model": {"type": "Evil"}, "added_tokens": []}',
    "a pattern that is none": lambda: b'{"version": "1.0", "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": false}, "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "added_tokens": []}',
}  # fmt: skip


@pytest.mark.row(16)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_giant_and_broken_tokenizers(
    bounded: Bounded, folder: Path, canary: Path, tally: Any, name: str
) -> None:
    put(folder / "tokenizer.json", TOKENIZERS[name]())
    judge(tally, bounded.call("tokenizer", folder), canary, "", name)


SETTINGS: dict[str, dict[str, Any]] = {
    "a class that is a number": {"tokenizer_class": 5},
    "tokens that are lists": {"eos_token": [[]], "added_tokens_decoder": {"1": []}},
    "a template that is a number": {"chat_template": 5},
    "templates that are numbers": {"chat_template": [1, 2]},
    "ids that are words": {"added_tokens_decoder": {"x": {"content": "a"}}},
}


@pytest.mark.row(16)
@pytest.mark.parametrize("name", SETTINGS)
def test_tokenizer_settings_of_wrong_types(
    bounded: Bounded, folder: Path, canary: Path, tally: Any, name: str
) -> None:
    (folder / "chat_template.jinja").unlink()
    edit(folder / "tokenizer_config.json", **SETTINGS[name])
    told = bounded.call("tokenizer", folder)
    usable = not told["error"]  # the library takes some for absent
    tally.add(usable or not fault(told, canary, ""), f"{name}: {fault(told, canary, '')}")


@pytest.mark.row(16)
@pytest.mark.parametrize(
    "file", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
)
def test_pipes_and_folders_in_place_of_files(
    bounded: Bounded, folder: Path, canary: Path, tally: Any, file: str
) -> None:
    for make in (os.mkfifo, os.mkdir):
        (folder / file).unlink() if (folder / file).is_file() else (folder / file).rename(folder / "aside")
        make(folder / file)
        judge(tally, bounded.call("find", folder), canary, "", f"{file} made by {make.__name__}")


# Adapters

LORA: dict[str, dict[str, Any]] = {
    "rank of 10**9": {"r": 10**9},
    "rank beyond the weights": {"r": 5},
    "no rank": {"r": 0},
    "negative rank": {"r": -4},
    "rank in words": {"r": "4"},
    "fractional rank": {"r": 4.5},
    "rank of a module": {"rank_pattern": {"q_proj": 10**9}},
    "ranks as a list": {"rank_pattern": [1]},
    "scale in words": {"lora_alpha": "x"},
    "scale of 10**30": {"lora_alpha": 10**30},
    "dropout of a list": {"lora_dropout": []},
    "unknown type": {"peft_type": "EVIL"},
    "another type": {"peft_type": "IA3"},
    "type that is a list": {"peft_type": []},
    "own code": {"auto_mapping": {"base_model_class": "Model", "parent_library": "evil"}},
    "own code as text": {"auto_mapping": "evil.Model"},
    "megatron": {"megatron_config": {"a": 1}, "megatron_core": "evil"},
    "layers repeated": {"layer_replication": [[0, 10**9]]},
    "base that is a URL": {"base_model_name_or_path": "https://example.com/model"},
    "base that is absent": {"base_model_name_or_path": "/nowhere/model"},
    "base that is a list": {"base_model_name_or_path": []},
    "base that is empty": {"base_model_name_or_path": ""},
    "base that is null": {"base_model_name_or_path": None},
    "base with a NUL": {"base_model_name_or_path": "a\0b"},
    "base of 100,000 letters": {"base_model_name_or_path": "x" * 100_000},
    "modules that are numbers": {"target_modules": [1, 2]},
    "modules that are absent": {"target_modules": ["nowhere"]},
    "modules that are a number": {"target_modules": 5},
    "pattern of ranks": {"rank_pattern": {"(.*)*x": 4}},
    "pattern of scales": {"alpha_pattern": {"(a+)+$": 4}},
    "pattern of layers": {"layers_pattern": "(.*)*x", "layers_to_transform": [0]},
    "pattern to save": {"modules_to_save": ["(.*)*x"]},
    "modules to save as a number": {"modules_to_save": 5},
}


@pytest.mark.row(16)
@pytest.mark.parametrize("name", LORA)
def test_adapter_configs(bounded: Bounded, adapter: Path, canary: Path, tally: Any, name: str) -> None:
    evil(adapter, canary)
    edit(adapter / "adapter_config.json", **LORA[name])
    judge(tally, bounded.call("adapter", adapter), canary, "", name)


@pytest.mark.row(16)
@pytest.mark.parametrize("name", [*CONFIGS][:-1])
def test_giant_and_broken_adapter_configs(
    bounded: Bounded, adapter: Path, canary: Path, tally: Any, name: str
) -> None:
    put(adapter / "adapter_config.json", CONFIGS[name]())
    judge(tally, bounded.call("adapter", adapter), canary, "adapter_config.json", name)


@pytest.mark.row(16)
def test_a_pattern_that_searches_for_ever_is_not_searched_with(
    bounded: Bounded, adapter: Path, canary: Path, tally: Any
) -> None:
    for key in ("target_modules", "exclude_modules"):
        edit(adapter / "adapter_config.json", **{key: r"((\w|\.)+)+!"})
        told = bounded.call("adapter", adapter)
        tally.add(not told["error"] and within(told), f"{key}: {told}")


@pytest.mark.row(16)
def test_an_adapter_inside_a_model(
    bounded: Bounded, folder: Path, adapter: Path, canary: Path, tally: Any
) -> None:
    shutil.copy(adapter / "adapter_config.json", folder)
    pickled(folder, canary, "adapter_model.bin")
    for call in ("find", "speaker"):
        judge(tally, bounded.call(call, folder), canary, "", call)


@pytest.mark.row(16)
def test_a_manifest_cannot_give_the_users_trust(
    bounded: Bounded, folder: Path, adapter: Path, canary: Path, tally: Any
) -> None:
    from tunewright.core import store

    evil(folder, canary)
    edit(folder / "config.json", auto_map=AUTO, model_type="own")
    facts = {"base": str(folder), "method": "lora", "precision": "fp32", "trust_remote_code": True}
    with store.artifact(adapter.parent / "sealed", **facts) as partial:
        shutil.copytree(adapter, partial, dirs_exist_ok=True)
    told = bounded.call("speaker", adapter.parent / "sealed")
    judge(tally, told, canary, "model", "a sealed adapter")
