"""Shapes from config.json, from a model's folder, or from a name in shapes.yaml."""

import json
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from tunewright.advise.shape import Experts, Linear, Shape
from tunewright.core.errors import ModelError, Problem, nearest
from tunewright.core.paths import given

Tree = Mapping[str, Any]
NAMED = "shape:"
"""What stands before a name of shapes.yaml."""
_BUILTIN = "builtin:"
_LARGEST = 1 << 20
"""Bytes of a config.json; real ones have a few thousand."""
_OPTIONAL = ("head_dim", "num_key_value_heads", "n_inner", "intermediate_size", "decoder_sparse_step",
             "max_position_embeddings")  # fmt: skip
_LAYERS, _MOST_LAYERS = ("num_hidden_layers", "num_layers", "n_layer"), 10_000


def table(name: str) -> Any:
    """One of the data files beside this code."""
    path = resources.files("tunewright.advise") / name
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def find(model: str) -> Shape:
    """The shape of ``shape:NAME``, ``builtin:NAME``, a folder with a config.json, or a hub id in the local cache.

    Raises:
        ModelError: there is no such model here, or it is of an unknown kind.
    """
    if model.startswith(NAMED):
        return named(model.removeprefix(NAMED))
    path = _config(model)
    return from_config(_read(path), model)


def named(name: str) -> Shape:
    """A shape of shapes.yaml; ModelError with the nearest name if there is none."""
    known = table("shapes.yaml")
    if name not in known:
        raise ModelError(Problem("model", f"there is no shape called {name!r}", nearest(name, known)))
    return from_config(known[name]["config"], name)


def folder(model: str) -> Path | None:
    """Where the model's files are, if they are here."""
    return None if model.startswith(NAMED) else _config(model).parent


def _config(model: str) -> Path:
    if model.startswith(_BUILTIN):
        models = Path(str(resources.files("tunewright"))) / "models"
        known = sorted(p.parent.name for p in models.glob("*/config.json"))
        name = model.removeprefix(_BUILTIN)
        if name not in known:
            raise ModelError(Problem("model", f"there is no built-in model {name!r}", nearest(name, known)))
        return models / name / "config.json"
    path = given(model, "model") / "config.json"
    if path.is_file():
        return path
    return _cached(model)


def _cached(model: str) -> Path:
    """A hub id's config in the local cache; the network is not asked."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, "config.json")
    except HFValidationError:
        found = None
    if not isinstance(found, str):
        what = f"{model} is neither a folder with a config.json nor in the model cache"
        raise ModelError(Problem("model", what, "give its folder, or a size by name: model=shape:llama-2-7b"))
    return Path(found)


def _read(path: Path) -> Tree:
    try:
        if path.stat().st_size > _LARGEST:
            raise ModelError(Problem(str(path), "too long for a config", "check where it comes from"))
        tree = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(Problem(str(path), f"not readable as JSON ({str(error)[:200]})", "")) from None
    if not isinstance(tree, dict):
        raise ModelError(Problem(str(path), "holds no JSON object", "give a config.json"))
    return tree


def from_config(config: Tree, name: str) -> Shape:
    """The shape that a config.json describes.

    Raises:
        ModelError: the kind is unknown, or sizes are missing or no numbers; all of them together.
    """
    kind = config.get("model_type")
    if "num_experts" not in config and "num_local_experts" in config:  # transformers writes either
        config = {**config, "num_experts": config["num_local_experts"]}
    if kind not in KINDS:
        what = f"{name}: the advisor does not know model_type {kind!r}"
        raise ModelError(Problem("model", what, f"known are {', '.join(sorted(KINDS))}"))
    needed, make = KINDS[kind]
    bad = [key for key in needed if not _is_size(config.get(key))]
    bad += [key for key in _OPTIONAL if key not in bad and not _is_size(config.get(key) or 1)]
    bad += [key for key in _LAYERS if key not in bad and (config.get(key) or 0) > _MOST_LAYERS]
    bad += [] if isinstance(config.get("mlp_only_layers") or [], list) else ["mlp_only_layers"]
    if bad:
        raise ModelError(
            Problem(name, f"{key} is {str(config.get(key))[:40]}, expected a usual size", "see config.json")
            for key in bad
        )
    return make(config, name)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 32


def _llama_like(config: Tree, name: str) -> Shape:
    """Llama and what is built as it is: rotary positions, RMS norms, grouped keys, a gated feed-forward layer."""
    kind, hidden, layers = config["model_type"], config["hidden_size"], config["num_hidden_layers"]
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    size = config.get("head_dim") or (128 if kind == "qwen3" else hidden // heads)
    experts = _mixture(config, layers)
    dense = layers - (experts.layers if experts else 0)
    inner = config.get("intermediate_size") or 0
    qkv = (kind in ("qwen2", "qwen2_moe") and config.get("qkv_bias", True)) or bool(
        config.get("attention_bias")
    )
    out = bool(config.get("attention_bias")) and kind not in ("qwen2", "qwen2_moe")
    mlp_bias = kind == "llama" and bool(config.get("mlp_bias"))
    linears = [
        Linear("attention.q", hidden, heads * size, layers, qkv),
        Linear("attention.k", hidden, kv_heads * size, layers, qkv),
        Linear("attention.v", hidden, kv_heads * size, layers, qkv),
        Linear("attention.out", heads * size, hidden, layers, out),
    ]
    linears += _feed_forward("mlp", hidden, inner, dense, mlp_bias) if dense else []
    if kind == "qwen2_moe" and experts:
        shared = config["shared_expert_intermediate_size"]
        linears += _feed_forward("shared", hidden, shared, experts.layers)
        linears.append(Linear("shared.switch", hidden, 1, experts.layers))
    return Shape(
        name=name, kind=kind, hidden=hidden, layers=layers, heads=heads, kv_heads=kv_heads, head_size=size,
        inner=inner, vocabulary=config["vocab_size"], context=config.get("max_position_embeddings") or 2048,
        tied=bool(config.get("tie_word_embeddings", False)), linears=tuple(linears), experts=experts,
        head_norms=kind in ("qwen3", "qwen3_moe"),
    )  # fmt: skip


def _feed_forward(name: str, hidden: int, inner: int, count: int, bias: bool = False) -> list[Linear]:
    """Gate, up and down."""
    return [
        Linear(f"{name}.gate", hidden, inner, count, bias), Linear(f"{name}.up", hidden, inner, count, bias),
        Linear(f"{name}.down", inner, hidden, count, bias),
    ]  # fmt: skip


def _mixture(config: Tree, layers: int) -> Experts | None:
    if config["model_type"] == "mixtral":
        inner = config["intermediate_size"]
        return Experts(config["num_experts"], config["num_experts_per_tok"], inner, tuple(range(layers)))
    if not config["model_type"].endswith("_moe"):
        return None
    step, plain = config.get("decoder_sparse_step") or 1, config.get("mlp_only_layers") or ()
    sparse = tuple(i for i in range(layers) if i not in plain and (i + 1) % step == 0)
    return Experts(
        config["num_experts"], config["num_experts_per_tok"], config["moe_intermediate_size"], sparse
    )


def _gpt2(config: Tree, name: str) -> Shape:
    hidden, layers = config["n_embd"], config["n_layer"]
    inner = config.get("n_inner") or 4 * hidden
    linears = (
        Linear("attention.qkv", hidden, 3 * hidden, layers, True),
        Linear("attention.out", hidden, hidden, layers, True),
        Linear("mlp.up", hidden, inner, layers, True), Linear("mlp.down", inner, hidden, layers, True),
    )  # fmt: skip
    heads, positions = config["n_head"], config["n_positions"]
    return _gpt(config, name, hidden, layers, heads, inner, positions, linears)


def _gpt_neo(config: Tree, name: str) -> Shape:
    hidden, layers = config["hidden_size"], config["num_layers"]
    inner = config.get("intermediate_size") or 4 * hidden
    linears = (
        *(Linear(f"attention.{part}", hidden, hidden, layers) for part in "qkv"),
        Linear("attention.out", hidden, hidden, layers, True),
        Linear("mlp.up", hidden, inner, layers, True), Linear("mlp.down", inner, hidden, layers, True),
    )  # fmt: skip
    heads, positions = config["num_heads"], config["max_position_embeddings"]
    return _gpt(config, name, hidden, layers, heads, inner, positions, linears)


def _gpt(
    config: Tree, name: str, hidden: int, layers: int, heads: int, inner: int, positions: int,
    linears: tuple[Linear, ...],
) -> Shape:  # fmt: skip
    """Learned positions, layer norms with biases, a feed-forward layer without a gate."""
    return Shape(
        name=name, kind=config["model_type"], hidden=hidden, layers=layers, heads=heads, kv_heads=heads,
        head_size=hidden // heads, inner=inner, vocabulary=config["vocab_size"], context=positions,
        tied=bool(config.get("tie_word_embeddings", True)), linears=linears, positions=positions, gated=False,
        layer_norm=True, packed=config["model_type"] == "gpt2",
    )  # fmt: skip


_LLAMA = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_GROUPED = (*_LLAMA, "num_key_value_heads", "intermediate_size")
_SPARSE = (*_GROUPED, "num_experts", "num_experts_per_tok", "moe_intermediate_size")

KINDS: dict[str, tuple[tuple[str, ...], Callable[[Tree, str], Shape]]] = {
    "llama": ((*_LLAMA, "intermediate_size"), _llama_like),
    "mistral": (_GROUPED, _llama_like), "qwen2": (_GROUPED, _llama_like), "qwen3": (_GROUPED, _llama_like),
    "mixtral": ((*_GROUPED, "num_experts", "num_experts_per_tok"), _llama_like),
    "qwen2_moe": ((*_SPARSE, "shared_expert_intermediate_size"), _llama_like),
    "qwen3_moe": (_SPARSE, _llama_like),
    "gpt2": (("n_embd", "n_layer", "n_head", "n_positions", "vocab_size"), _gpt2),
    "gpt_neo": (
        ("hidden_size", "num_layers", "num_heads", "max_position_embeddings", "vocab_size"), _gpt_neo,
    ),
}  # fmt: skip
"""``model_type`` -> the sizes that its config must give, and what makes the shape."""
