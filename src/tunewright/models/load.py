"""Find and load a base model: the built-in one, a Hugging Face folder, or a hub id."""

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from tunewright.core import store
from tunewright.core.errors import ModelError, Problem, nearest

BUILTIN = {"pico": Path(str(resources.files("tunewright.models"))) / "pico"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float32}
"""What weights are held in; fp16 means fp32 weights under an fp16 autocast with a scaled loss."""


@dataclass(frozen=True)
class ModelSource:
    """Where a model is: ``name`` as the user wrote it, ``path`` a folder or a hub id."""

    name: str
    path: str
    trust_remote_code: bool = False

    @property
    def reference(self) -> str:
        """What finds it again from any working directory: a folder as an absolute path, else the name."""
        return (
            self.name if self.name.startswith("builtin:") or not self.folder else str(self.folder.resolve())
        )

    @property
    def folder(self) -> Path | None:
        """The local folder, if it is one."""
        return Path(self.path) if Path(self.path).is_dir() else None


def find(name: str, trust_remote_code: bool = False) -> ModelSource:
    """Check that the model exists and can be read; ModelError says what to do if not."""
    if name.startswith("builtin:"):
        known = name.removeprefix("builtin:")
        if known not in BUILTIN:
            what = f"there is no built-in model {known!r}"
            raise ModelError(Problem("model", what, nearest(known, BUILTIN)))
        return ModelSource(name, str(BUILTIN[known]))
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            what = f"{name} holds no config.json, so it is not a Hugging Face model folder"
            raise ModelError(
                Problem("model", what, "give the folder that holds config.json and *.safetensors")
            )
        _check_remote_code(path / "config.json", name, trust_remote_code)
        return ModelSource(name, str(path), trust_remote_code)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelError(
            Problem("model", f"there is no folder {name}", "check the path, or use builtin:pico")
        )
    return _on_hub(name, trust_remote_code)


def _check_remote_code(config: Path, name: str, trusted: bool) -> None:
    try:
        tree = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(Problem(str(config), f"not readable as JSON: {error}")) from None
    if not isinstance(tree, dict):
        raise ModelError(Problem(str(config), "not a JSON object, so it is no model's config"))
    wants_code = "auto_map" in tree
    if wants_code and not trusted:
        what = f"{name} wants to run its own Python code"
        raise ModelError(Problem("model", what, "read that code, then set trust_remote_code: true"))


def _on_hub(name: str, trust_remote_code: bool) -> ModelSource:
    """A hub id: in the local cache, or to be had from the hub right now."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
    from huggingface_hub.errors import LocalEntryNotFoundError as Offline

    try:
        config = hf_hub_download(name, "config.json")
    except (Offline, OSError, HfHubHTTPError, EntryNotFoundError, HFValidationError) as error:
        what = f"{name} is neither a folder nor in the model cache, and the hub gave no config.json"
        fix = f"on a connected machine run `hf download {name}` and give its folder, or use builtin:pico"
        raise ModelError(Problem("model", f"{what} ({type(error).__name__})", fix)) from None
    _check_remote_code(Path(config), name, trust_remote_code)
    return ModelSource(name, name, trust_remote_code)


def load_tokenizer(source: ModelSource) -> Any:
    """The model's fast tokenizer."""
    from transformers import AutoTokenizer

    _quiet()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.path, trust_remote_code=source.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(Problem("model", f"{source.name} has no usable tokenizer: {error}")) from None
    if not tokenizer.is_fast:
        raise ModelError(
            Problem("model", f"{source.name} has no fast tokenizer", "convert it to tokenizer.json")
        )
    tokenizer.model_max_length = 1 << 30  # our own max_length cuts; the library would only warn
    return tokenizer


def _quiet() -> None:
    """No progress bars of the library's own: ours tell what happens."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def load_model(source: ModelSource, precision: str = "fp32", random_weights: bool = False) -> Any:
    """The causal language model on the best device; its weights come from safetensors only.

    With ``random_weights`` it has the same architecture, freshly initialised.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    _quiet()
    code, dtype = source.trust_remote_code, DTYPES[precision]
    try:
        if random_weights:
            config = AutoConfig.from_pretrained(source.path, trust_remote_code=code)
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        else:
            model = AutoModelForCausalLM.from_pretrained(
                source.path, dtype=dtype, trust_remote_code=code, use_safetensors=True
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(Problem("model", f"{source.name} cannot be loaded: {error}")) from None
    return model.to(best_device())


def best_device() -> str:
    """``cuda`` where there is one, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def fingerprint(source: ModelSource) -> str:
    """SHA-256 over the model's files, or of the hub id: what tells one base from another."""
    folder = source.folder
    if folder is None:
        return store.sha256_json(source.path)
    files = sorted(p for pattern in ("*.safetensors", "*.json", "*.jinja") for p in folder.glob(pattern))
    return store.sha256_json({p.name: store.sha256_file(p) for p in files if p.name != store.MANIFEST})
