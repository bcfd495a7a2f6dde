"""A model that answers: a run's result, an adapter, a model folder, a built-in name or a hub id."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunewright import methods
from tunewright.core import store
from tunewright.core.errors import DamagedError, ModelError, Problem
from tunewright.core.paths import check_plain, given, inside
from tunewright.data.rows import Message
from tunewright.data.template import ChatCodec
from tunewright.models.generate import answer, context_length
from tunewright.models.load import DTYPES, ModelSource, find, load_model, load_tokenizer
from tunewright.models.load import fingerprint as load_fingerprint

Tree = dict[str, Any]


@dataclass(frozen=True)
class Speaker:
    """A loaded model with its codec; ``method`` is the adapter's method, None for a plain model."""

    model: Any
    codec: ChatCodec
    method: type[methods.Method] | None
    base: str

    def reply(self, messages: tuple[Message, ...], max_new_tokens: int = 128) -> str:
        """The greedy answer to a conversation."""
        return answer(self.model, self.codec, [messages], max_new_tokens)[0]


def artifact_of(name: str) -> Path | None:
    """The adapter or model folder that a run folder, its stage or the folder itself names; else None.

    UserError if no file can have the name, or the run names a folder outside of itself.
    """
    path = given(name, "model")
    if (path / "results.json").is_file():
        return result_of(path)
    if (path / "stages").is_dir():
        what = f"{name} is a run that has not finished"
        raise ModelError(Problem("model", what, f"finish it: tunewright run {path / 'recipe.yaml'}"))
    for inner in ("adapter", "model"):
        if (path / inner / store.MANIFEST).is_file():
            return path / inner
    return path if (path / "adapter_config.json").is_file() else None


def result_of(run: Path) -> Path:
    """The last stage's adapter or model folder in the folder of a finished run."""
    results = run / "results.json"
    try:
        name = store.read_json(results)["stages"][-1]["artifact"]
    except (KeyError, IndexError, TypeError):
        name = None
    if not isinstance(name, str):
        raise DamagedError(f"{results}: it names no stage's artifact")
    return inside(run, name, str(results))


def load(name: str, precision: str = "", template: str = "auto", trusted: bool = False) -> Speaker:
    """Whatever ``name`` is, ready to answer; ``trusted`` lets Python code run that comes with it.

    ModelError if it is nothing of ours or Hugging Face's.
    """
    folder = artifact_of(name)
    if folder and folder.is_dir():
        check_plain(folder, "model")
    if folder and (folder / "adapter_config.json").is_file():
        return _adapter(folder, precision, template, trusted)
    if folder and (folder / store.MANIFEST).is_file():
        store.verify(folder)
    source = find(str(folder) if folder else name, trusted)
    model = load_model(source, precision or "fp32")
    codec = ChatCodec(load_tokenizer(source), template, context_length(model))
    return Speaker(model, codec, None, source.name)


def tokenizer(name: str, trusted: bool = False) -> Any:
    """Its tokenizer, without its weights. UserError if it is nothing that can answer."""
    return load_tokenizer(_words_of(name, trusted))


def _words_of(name: str, trusted: bool) -> ModelSource:
    folder = artifact_of(name)
    if folder and (folder / "adapter_config.json").is_file():
        own = ModelSource(str(folder), str(folder))
        has_own = (folder / "tokenizer_config.json").is_file()
        return own if has_own else methods.base_of(_manifest(folder), trusted)
    return find(str(folder) if folder else name, trusted)


def fingerprint(name: str, trusted: bool = False) -> str:
    """What tells it from others: SHA-256 over its files, and its base's if it is an adapter."""
    folder = artifact_of(name)
    if folder and (folder / "adapter_config.json").is_file():
        base = methods.base_of(_manifest(folder), trusted)
        return store.sha256_json([load_fingerprint(ModelSource(name, str(folder))), load_fingerprint(base)])
    return load_fingerprint(find(str(folder) if folder else name, trusted))


def _adapter(folder: Path, precision: str, template: str, trusted: bool) -> Speaker:
    manifest = _manifest(folder)
    model, method = methods.load_adapter(folder, manifest, precision or manifest["precision"], trusted)
    words = load_tokenizer(_words_of(str(folder), trusted))
    return Speaker(model, ChatCodec(words, template, context_length(model)), method, manifest["base"])


def _manifest(folder: Path) -> Tree:
    """What the adapter says of itself: its base, method and precision. DamagedError if one is none."""
    manifest = (
        store.verify(folder) if (folder / store.MANIFEST).is_file() else methods.foreign_manifest(folder)
    )
    wrong = [key for key in ("base", "method", "precision") if not isinstance(manifest.get(key), str)]
    if not wrong and manifest["precision"] not in DTYPES:
        wrong = ["precision"]
    if wrong:
        raise DamagedError(f"{folder}: it does not name its {' and '.join(wrong)}")
    return manifest
