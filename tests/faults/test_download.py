"""A torn download is never trusted: whatever file of a model is cut, the model is refused and the file named."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tunewright import jobs, methods, recipes
from tunewright.core.errors import DataError, ModelError, UserError
from tunewright.data.rows import Message, Row
from tunewright.data.template import ChatCodec
from tunewright.models.load import ModelSource, find, load_model, load_tokenizer

PERCENTS = range(10, 100, 10)
METADATA = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
TALK = Row("", (Message("user", "Hi"), Message("assistant", "Hello there.")))


def sharded(tiny: Path, folder: Path) -> Path:
    """The tiny model with its weights in several files and an index."""
    shutil.copytree(tiny, folder)
    load_model(find(str(tiny))).save_pretrained(folder, max_shard_size="60KB")
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture(params=["whole", "sharded"])
def folder(request: pytest.FixtureRequest, tiny_model_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    if request.param == "sharded":
        return sharded(tiny_model_folder, tmp_path / "copy")
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "copy"))


@pytest.fixture
def shards(tiny_model_folder: Path, tmp_path: Path) -> Path:
    return sharded(tiny_model_folder, tmp_path / "copy")


@pytest.fixture
def openings(tmp_path: Path) -> dict[str, Callable[[Path], Any]]:
    """Each way to open a model; none relies on another having looked before."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(f'{{"prompt": "Say {i}", "completion": "{i}."}}\n' for i in range(100)))

    def check(folder: Path) -> Any:
        return jobs.check(recipes.load({"model": str(folder), "data": str(data), "precision": "fp32"}))

    return {
        "find": lambda folder: find(str(folder)),
        "load_tokenizer": lambda folder: load_tokenizer(ModelSource(str(folder), str(folder))),
        "load_model": lambda folder: load_model(ModelSource(str(folder), str(folder))),
        "jobs.check": check,
    }


@contextmanager
def cut(path: Path, percent: int) -> Iterator[None]:
    """The file as a download leaves it that stopped there."""
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * percent // 100])
    yield
    path.write_bytes(whole)


def names(opening: Callable[[Path], Any], folder: Path, file: str, words: str = "") -> bool:
    """Whether the model is refused with the file named and a new download advised."""
    try:
        opening(folder)
    except UserError as error:
        return any(p.where == str(folder / file) and p.fix and words in p.what for p in error.problems)
    return False


@pytest.mark.row(15)
def test_the_whole_folder_opens(folder: Path, openings: Any, tally: Any) -> None:
    for name, opening in openings.items():
        tally.add(opening(folder) is not None, name)


@pytest.mark.row(15)
def test_cut_files_are_named(folder: Path, openings: Any, tally: Any) -> None:
    weights = [p.name for p in folder.glob("model*")]
    assert len(weights) in (1, 4)  # an index and three shards
    for file in (*METADATA, *weights):
        for percent in PERCENTS:
            with cut(folder / file, percent):
                for name, opening in openings.items():
                    tally.add(names(opening, folder, file), f"{file} cut at {percent} % through {name}")


@pytest.mark.row(15)
def test_bytes_are_told_against_bytes_expected(folder: Path, tally: Any) -> None:
    for path in folder.glob("model*.safetensors"):
        for percent in PERCENTS:
            with cut(path, percent):
                told = names(lambda at: find(str(at)), folder, path.name, " expected ")
                tally.add(told, f"{path.name} at {percent} %")


@pytest.mark.row(15)
def test_a_cut_template_is_refused_or_at_least_usable(folder: Path, tally: Any) -> None:
    for percent in PERCENTS:
        with cut(folder / "chat_template.jinja", percent):
            tally.add(refused_or_usable(folder), f"template cut at {percent} %")


def refused_or_usable(folder: Path) -> bool:
    try:
        codec = ChatCodec(load_tokenizer(find(str(folder))))
        return bool(codec.stop_ids) and len(codec.encode(TALK).ids) > 0
    except (ModelError, DataError):
        return True


@pytest.mark.row(15)
def test_a_shard_that_is_absent(shards: Path, openings: Any, tally: Any) -> None:
    index = "model.safetensors.index.json"
    for path in sorted(shards.glob("*.safetensors")):
        path.rename(shards / "aside")
        for name, opening in openings.items():
            tally.add(names(opening, shards, index, path.name), f"{path.name} absent through {name}")
        (shards / "aside").rename(path)


@pytest.mark.row(15)
@pytest.mark.parametrize("entry", ["../{}", "/tmp/{}", "sub/{}", "..", "", "a\0b.safetensors", "{}/../{}"])
def test_an_index_that_leads_out_of_the_folder(shards: Path, tally: Any, entry: str) -> None:
    index = shards / "model.safetensors.index.json"
    tree = json.loads(index.read_text())
    first = next(iter(tree["weight_map"].values()))
    own = f"row15-{os.getpid()}-{first}"  # the same test may run beside with another entry
    (shards / "sub").mkdir()
    for place in (shards.parent, shards / "sub", Path("/tmp")):
        shutil.copy(shards / first, place / own)
    name = entry.format(own, own)
    tree["weight_map"] = {key: name if v == first else v for key, v in tree["weight_map"].items()}
    index.write_text(json.dumps(tree))
    tally.add(names(lambda at: find(str(at)), shards, index.name, "no safetensors file"), entry)
    Path("/tmp", own).unlink()


@pytest.mark.row(15)
def test_a_link_out_of_the_folder(folder: Path, tally: Any) -> None:
    for path in [p for p in folder.iterdir() if p.suffix in (".json", ".safetensors", ".jinja")]:
        outside = path.rename(folder.parent / path.name)
        path.symlink_to(outside)
        tally.add(names(lambda at: find(str(at)), folder, path.name, "a link out"), path.name)
        path.unlink()
        outside.rename(path)


@pytest.mark.row(15)
def test_a_hub_snapshot_links_to_its_blobs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tally: Any
) -> None:
    repo, commit = tmp_path / "hub" / "models--someone--tiny", "0" * 40
    snapshot, blobs = repo / "snapshots" / commit, repo / "blobs"
    for place in (snapshot, blobs, repo / "refs"):
        place.mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    for path in folder.iterdir():
        shutil.copy(path, blobs / path.name)
        (snapshot / path.name).symlink_to(os.path.relpath(blobs / path.name, snapshot))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    tally.add(load_model(find(str(snapshot))) is not None, "the snapshot's folder")
    tally.add(find("someone/tiny").path == "someone/tiny", "the hub id")
    weights = sorted(p.name for p in blobs.glob("model*"))
    for name in ("tokenizer.json", "config.json", *weights):
        for percent in PERCENTS:
            with cut(blobs / name, percent):
                tally.add(
                    names(lambda at: find("someone/tiny"), snapshot, name), f"hub {name} at {percent} %"
                )


@pytest.mark.row(15)
def test_weights_that_no_file_holds(tiny_model_folder: Path, tmp_path: Path, tally: Any) -> None:
    state = load_file(tiny_model_folder / "model.safetensors")
    for name in state:
        folder = Path(shutil.copytree(tiny_model_folder, tmp_path / name))
        rest = {key: tensor for key, tensor in state.items() if key != name}
        save_file(rest, folder / "model.safetensors", metadata={"format": "pt"})
        try:
            load_model(find(str(folder)))
            tally.add(False, name)
        except ModelError as error:
            tally.add(name in str(error) and "lacks 1 of" in str(error), f"{name}: {error}")


@pytest.mark.row(15)
def test_an_output_head_is_missing_only_if_it_is_not_tied(
    tiny_model_folder: Path, tmp_path: Path, tally: Any
) -> None:
    folder = Path(shutil.copytree(tiny_model_folder, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    for tied in (True, False):
        (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": tied}))
        try:
            load_model(find(str(folder)))
            tally.add(tied, "an output head out of nowhere")
        except ModelError as error:
            tally.add(not tied and "lm_head.weight" in str(error), str(error))


@pytest.fixture
def adapter(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """A LoRA in PEFT's format, as another tool would leave it."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(load_model(find(str(tiny_model_folder))), config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def opened(folder: Path) -> Any:
    return methods.load_adapter(folder, methods.foreign_manifest(folder), "fp32")


@pytest.mark.row(15)
def test_a_cut_adapter(adapter: Path, tally: Any) -> None:
    tally.add(opened(adapter)[0] is not None, "the whole adapter")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        for percent in PERCENTS:
            with cut(adapter / file, percent):
                tally.add(names(opened, adapter, file), f"{file} cut at {percent} %")


@pytest.mark.row(15)
def test_an_adapter_that_lacks_weights_or_has_strange_ones(adapter: Path, tally: Any) -> None:
    path = adapter / "adapter_model.safetensors"
    state = load_file(path)
    for name in state:
        save_file({key: tensor for key, tensor in state.items() if key != name}, path)
        tally.add(names(opened, adapter, path.name, "lacks 1 of"), name)
    strange = {"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.zeros(4, 32)}
    save_file({**state, **strange}, path)
    tally.add(names(opened, adapter, path.name, "that the base lacks"), "a strange module")
