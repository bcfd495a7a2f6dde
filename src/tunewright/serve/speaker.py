"""A model that answers: a run's result, an adapter, a model folder, a built-in name or a hub id."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunewright import methods
from tunewright.core import store
from tunewright.core.errors import ModelError, Problem
from tunewright.data.rows import Message
from tunewright.data.template import ChatCodec
from tunewright.models.generate import answer, context_length
from tunewright.models.load import ModelSource, find, load_model, load_tokenizer


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
    """The adapter or model folder that a run folder, its stage or the folder itself names; else None."""
    path = Path(name).expanduser()
    if (path / "results.json").is_file():
        last = store.read_json(path / "results.json")["stages"][-1]
        return path / str(last["artifact"])
    if (path / "stages").is_dir():
        what = f"{name} is a run that has not finished"
        raise ModelError(Problem("model", what, f"finish it: tunewright run {path / 'recipe.yaml'}"))
    for inner in ("adapter", "model"):
        if (path / inner / store.MANIFEST).is_file():
            return path / inner
    return path if (path / "adapter_config.json").is_file() else None


def load(name: str, precision: str = "", template: str = "auto") -> Speaker:
    """Whatever ``name`` is, ready to answer. ModelError if it is nothing of ours or Hugging Face's."""
    folder = artifact_of(name)
    if folder and (folder / "adapter_config.json").is_file():
        return _adapter(folder, precision, template)
    source = find(str(folder) if folder else name)
    model = load_model(source, precision or "fp32")
    codec = ChatCodec(load_tokenizer(source), template, context_length(model))
    return Speaker(model, codec, None, source.name)


def _adapter(folder: Path, precision: str, template: str) -> Speaker:
    if (folder / store.MANIFEST).is_file():
        manifest = store.verify(folder)
    else:  # another tool's adapter: PEFT's config names the base
        manifest = {"base": store.read_json(folder / "adapter_config.json")["base_model_name_or_path"],
                    "method": "lora", "precision": "fp32"}  # fmt: skip
    model, method = methods.load_adapter(folder, manifest, precision or manifest["precision"])
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    own = ModelSource(str(folder), str(folder))
    tokenizer = load_tokenizer(own if has_tokenizer else methods.base_of(manifest))
    return Speaker(model, ChatCodec(tokenizer, template, context_length(model)), method, manifest["base"])
