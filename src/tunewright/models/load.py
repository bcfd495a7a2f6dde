"""Find and load a base model: the built-in one, a Hugging Face folder, or a hub id."""

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from tunewright.core import hashing, store
from tunewright.core.errors import ModelError, Problem, UserError, nearest
from tunewright.core.machine import available_memory
from tunewright.core.paths import given
from tunewright.core.units import human_bytes
from tunewright.models import files, hollow, intact, wide

BUILTIN = {"pico": Path(str(resources.files("tunewright.models"))) / "pico"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float32}
"""What weights are held in; fp16 means fp32 weights under an fp16 autocast with a scaled loss."""
_ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".7z", ".rar")
_LONGEST_REASON = 400
_ANY_SIZE, _TIGHTEST = 64 << 20, 16


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
    """Check that the model exists, is whole and can be trusted; ModelError says what to do if not."""
    if name.startswith("builtin:"):
        known = name.removeprefix("builtin:")
        if known not in BUILTIN:
            what = f"there is no built-in model {known!r}"
            raise ModelError(Problem("model", what, nearest(known, BUILTIN)))
        return ModelSource(name, str(BUILTIN[known]))
    path = _local(name)
    if path.is_dir():
        _check_folder(path, name, trust_remote_code)
        return ModelSource(name, str(path), trust_remote_code)
    if path.is_file():
        kind = "an archive, and nothing is unpacked" if path.name.endswith(_ARCHIVES) else "a file"
        what = f"{name} is {kind}; expected a Hugging Face model folder"
        raise ModelError(Problem("model", what, "give the folder that holds config.json and *.safetensors"))
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelError(
            Problem("model", f"there is no folder {name[:200]}", "check the path, or use builtin:pico")
        )
    return _on_hub(name, trust_remote_code)


def _local(name: str) -> Path:
    """The name as a path; ModelError if no file can have it."""
    try:
        return given(name, "model")
    except UserError as error:
        raise ModelError(error.problems) from None


def _check_folder(path: Path, name: str, trusted: bool) -> None:
    if not (path / "config.json").is_file():
        what = f"{name} holds no config.json, so it is not a Hugging Face model folder"
        raise ModelError(Problem("model", what, "give the folder that holds config.json and *.safetensors"))
    if (path / "adapter_config.json").exists():
        what = f"{name} holds an adapter besides the model, and it is not clear which is meant"
        raise ModelError(Problem("model", what, "move adapter_config.json to a folder of its own"))
    intact.check(path, name, trusted)


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
    intact.check(Path(config).parent, name, trust_remote_code, partly=True)
    return ModelSource(name, name, trust_remote_code)


def load_tokenizer(source: ModelSource) -> Any:
    """The model's fast tokenizer."""
    from transformers import AutoTokenizer

    _quiet()
    if source.folder:
        intact.check(source.folder, source.name, source.trust_remote_code)
    try:
        with files.no_collection():
            tokenizer = AutoTokenizer.from_pretrained(source.path, trust_remote_code=source.trust_remote_code)
    except Exception as error:  # whatever the libraries make of a file that is not as they expect it
        raise ModelError(_unusable(source, error)) from error
    if not tokenizer.is_fast:
        raise ModelError(
            Problem("model", f"{source.name} has no fast tokenizer", "convert it to tokenizer.json")
        )
    tokenizer.model_max_length = 1 << 30  # our own max_length cuts; the library would only warn
    return tokenizer


def _unusable(source: ModelSource, error: Exception) -> Problem:
    """What is wrong with a tokenizer, by its file if that is no JSON."""
    path = source.folder / "tokenizer.json" if source.folder else None
    if path and path.is_file():
        try:
            with files.no_collection():
                json.loads(path.read_bytes())
        except (ValueError, RecursionError) as reason:
            what = f"not readable as JSON, {path.stat().st_size} bytes: {reason}"
            return Problem(str(path), what, files.AGAIN)
    return Problem("model", f"{source.name} has no usable tokenizer: {_brief(error)}", "")


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:_LONGEST_REASON]


def _quiet() -> None:
    """No progress bars of the library's own: ours tell what happens."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def load_model(
    source: ModelSource, precision: str = "fp32", random_weights: bool = False, quantization: Any = None
) -> Any:
    """The causal language model on the best device; its weights come from safetensors only.

    With ``random_weights`` it has the same architecture, freshly initialised. ``quantization`` is a config of
    transformers', by which weights are quantized while they are read. ModelError if the folder is not whole, or lacks
    weights that the config asks for. Where tensors have no values nothing is read but the config.
    """
    _quiet()
    if source.folder:
        intact.check(source.folder, source.name, source.trust_remote_code)
    dtype = DTYPES[precision]
    if dtype == torch.bfloat16:
        wide.begin()
    try:
        if hollow.is_on():
            model = _shaped(source, dtype)
        elif random_weights:
            model = _initialised(source, dtype)
        else:
            model = _stored(source, dtype, quantization)
    except ModelError:
        raise
    except Exception as error:  # whatever the libraries make of a config that is not as they expect it
        raise ModelError(Problem("model", f"{source.name} cannot be loaded: {_brief(error)}")) from error
    return model.to(best_device())


def _stored(source: ModelSource, dtype: torch.dtype, quantization: Any) -> Any:
    from transformers import AutoModelForCausalLM

    if source.folder and not intact.weight_files(source.folder):
        what = f"{source.name} cannot be loaded: it holds no *.safetensors"
        raise ModelError(Problem("model", what, "download its weights, too"))
    if source.folder:
        _check_proportion(source, dtype)
    model, told = AutoModelForCausalLM.from_pretrained(
        source.path, dtype=dtype, trust_remote_code=source.trust_remote_code, use_safetensors=True,
        output_loading_info=True, quantization_config=quantization,
    )  # fmt: skip
    parameters = {name for name, _ in model.named_parameters()}
    if missing := sorted(parameters.intersection(told["missing_keys"])):
        some = ", ".join(missing[:3]) + (" ..." if missing[3:] else "")
        what = f"{source.name} lacks {len(missing)} of {len(parameters)} weights: {some}"
        raise ModelError(Problem("model", what, files.AGAIN))
    return model


def _shaped(source: ModelSource, dtype: torch.dtype) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    trusted = source.trust_remote_code
    config = AutoConfig.from_pretrained(source.path, trust_remote_code=trusted)
    return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trusted)


def _initialised(source: ModelSource, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    shape = outline(source, dtype)
    if (need := _bytes(shape)) > (free := available_memory()):
        what = (
            f"{source.name} needs {human_bytes(need)} for its weights, {human_bytes(free)} of memory is free"
        )
        raise ModelError(Problem("model", what, "use a smaller model"))
    return AutoModelForCausalLM.from_config(
        shape.config, dtype=dtype, trust_remote_code=source.trust_remote_code
    )


def outline(source: ModelSource, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The model with all its shapes and no values: its tensors lie on the ``meta`` device and take no memory.

    ModelError if the config describes no model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    code = source.trust_remote_code
    try:
        config = AutoConfig.from_pretrained(source.path, trust_remote_code=code)
        _check_kind(source, config)
        with torch.device("meta"), no_init_weights(), files.no_collection():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=code)
        model.tie_weights()  # else done as weights are initialised
    except ModelError:
        raise
    except Exception as error:  # whatever the libraries make of a config that is not as they expect it
        raise ModelError(Problem("model", f"{source.name} cannot be loaded: {_brief(error)}")) from error
    return model


def _check_kind(source: ModelSource, config: Any) -> None:
    """ModelError if it is no model of language. Transformers says so too, once it has imported all two hundred that are."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not hasattr(config, "auto_map"):
        what = f"{source.name} is of type {str(config.model_type)[:80]!r}, which is no causal language model"
        raise ModelError(Problem("model", what, "use a model that continues text, such as llama or qwen2"))


def _bytes(model: Any) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _check_proportion(source: ModelSource, dtype: torch.dtype) -> None:
    """ModelError before memory is taken for weights that the files cannot fill, be they packed ever so tightly."""
    need = _bytes(outline(source, dtype))
    stored = sum(path.stat().st_size for path in intact.weight_files(Path(source.path)))
    if need > max(_ANY_SIZE, _TIGHTEST * stored):
        what = f"{source.name} has {human_bytes(stored)} of weights, its config describes {human_bytes(need)}"
        raise ModelError(Problem("model", what, files.AGAIN))


def best_device() -> str:
    """``cuda`` where there is one, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def fingerprint(source: ModelSource) -> str:
    """SHA-256 over the model's files, or of the hub id: what tells one base from another."""
    if source.folder is None:
        return store.sha256_json(source.path)
    paths = _identity(source.folder)
    found = hashing.begin(paths)
    return store.sha256_json({path.name: one.result() for path, one in zip(paths, found, strict=True)})


def begin_fingerprint(source: ModelSource) -> None:
    """Read the model's files beside what is done until :func:`fingerprint` is asked."""
    if source.folder:
        hashing.begin(_identity(source.folder))


def _identity(folder: Path) -> list[Path]:
    """The files that decide what the model says."""
    paths = (p for pattern in ("*.safetensors", "*.json", "*.jinja") for p in folder.glob(pattern))
    return sorted(path for path in paths if path.name != store.MANIFEST)
