"""Whether a model folder can be trusted: whole, inside itself, of sane size and without code of its own.

All of it is told from the files, and nothing is loaded.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tunewright.core.errors import ModelError, Problem
from tunewright.models import files

_INDEX = "model.safetensors.index.json"
_OBJECTS = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model")
_READ = ("config.json", _INDEX, *_OBJECTS, *_VOCABULARIES)
_READ_ENDINGS = (".safetensors", ".jinja")
_VOCABULARY_BYTES, _VOCABULARY_ITEMS = 64 << 20, 4_000_000
_TEMPLATE_BYTES = 1 << 20
_PIECE = 1 << 20

_MOST: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size", "word_embed_proj_dim"), 1 << 16),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "n_inner", "ffn_dim", "d_ff"), 1 << 20),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), 512),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head", "num_heads"), 1 << 13),
    **dict.fromkeys(("head_dim", "d_kv"), 1 << 13),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 1 << 12),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 1 << 27),
    "vocab_size": 1 << 22,
}
"""The sizes a config may ask for; the largest models known have a tenth of these."""


def check(folder: Path, name: str, trusted: bool, partly: bool = False) -> None:
    """ModelError with everything about the folder that speaks against reading it.

    ``name`` is what the user calls the model, ``trusted`` whether its own Python code may run, and ``partly``
    whether files may still be missing, since they are downloaded once they are needed.
    """
    found: list[Problem] = []
    for part in (_places, _config, _headers if partly else _weights, _tokenizer, _templates):
        found += _problems(part, folder)
    if not trusted:
        found += _own_code(folder, name)
    if found:
        raise ModelError(dict.fromkeys(found))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the model, each of them there; empty if it has none.

    Raises ModelError about an index that cannot be read or names what is not in the folder.
    """
    if (whole := folder / "model.safetensors").exists():
        return [whole]
    paths = _indexed(folder / _INDEX)
    if absent := [path.name for path in paths if not path.exists()]:
        what = f"names {len(paths)} files, {len(absent)} not there: {', '.join(absent[:3])}"
        files.refuse(folder / _INDEX, what)
    return paths


def _indexed(index: Path) -> list[Path]:
    """The files that the index names, be they there or not."""
    if not index.exists():
        return []
    names = files.json_object(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        files.refuse(index, "has no weight_map from tensors to files")
    wanted = sorted(set(names.values()))
    plain = [n for n in wanted if Path(n).name == n and n.endswith(".safetensors") and n.isprintable()]
    if odd := sorted(set(wanted).difference(plain)):
        files.refuse(index, f"names {odd[0][:80]!r}, which is no safetensors file in its folder")
    return [index.with_name(name) for name in wanted]


def _problems(part: Callable[[Path], None], folder: Path) -> tuple[Problem, ...]:
    try:
        part(folder)
    except ModelError as error:
        return error.problems
    return ()


def check_place(folder: Path, path: Path) -> None:
    """ModelError unless the path is a file of the folder; in a Hugging Face cache files are links to blobs."""
    root = folder.resolve()
    homes = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    if not path.is_file():
        files.refuse(path, "not there, or not a file", files.AGAIN)
    if not any(path.resolve().is_relative_to(home) for home in homes):
        files.refuse(path, f"a link out of its folder, to {path.resolve()}", "copy the file there")


def _places(folder: Path) -> None:
    for path in _read_here(folder):
        check_place(folder, path)


def _read_here(folder: Path) -> Iterator[Path]:
    more = folder / "additional_chat_templates"
    for path in (*folder.iterdir(), *(more.iterdir() if more.is_dir() else ())):
        if path.name in _READ or path.name.endswith(_READ_ENDINGS):
            yield path


def _config(folder: Path) -> None:
    path = folder / "config.json"
    if not path.is_file():
        return
    config = files.json_object(path)
    wrong = [_excess(key, value) for node in _objects(config) for key, value in node.items()]
    problems = [Problem(str(path), what, "take the model from its maker") for what in wrong if what]
    if "transformers_weights" in config:
        problems.append(Problem(str(path), "transformers_weights is not supported", "drop that key"))
    if problems:
        raise ModelError(problems)


def _objects(tree: Any) -> Iterator[dict[str, Any]]:
    """The object itself and every object in it."""
    nodes = [tree]
    while nodes:
        node = nodes.pop()
        nodes += [value for value in files.children(node) if isinstance(value, (dict, list))]
        if isinstance(node, dict):
            yield node


def _excess(key: str, value: Any) -> str:
    """What is wrong with one size, or an empty string."""
    if (most := _MOST.get(key)) is None:
        return ""
    for one in value if isinstance(value, list) else [value]:
        if one is not None and (type(one) is not int or not 0 <= one <= most):
            return f"{key} is {str(one)[:40]!r}, expected a whole number from 0 to {most}"
    return ""


def _weights(folder: Path) -> None:
    paths = weight_files(folder)
    if not paths and any(folder.glob("pytorch_model*.bin")):
        files.refuse(folder, "its weights are pickles, which can run code and are not read",
                     "get or make *.safetensors of it")  # fmt: skip
    _check_headers(paths)


def _headers(folder: Path) -> None:
    _indexed(folder / _INDEX)
    _check_headers(sorted(folder.glob("model*.safetensors")))


def _check_headers(paths: list[Path]) -> None:
    problems = [p for path in paths for p in _problems(_header, path)]
    if problems:
        raise ModelError(problems)


def _header(path: Path) -> None:
    files.safetensors_header(path)


def _tokenizer(folder: Path) -> None:
    for name in _OBJECTS:
        if (folder / name).is_file():
            files.json_object(folder / name)
    for name in _VOCABULARIES:
        if (folder / name).is_file():
            _check_vocabulary(folder / name)


def _check_vocabulary(path: Path) -> None:
    """Bounded, and a JSON file ends as it must. The tokenizers library parses it once it is needed."""
    there = files.size(path, _VOCABULARY_BYTES)
    count, last = 0, b""
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            count, last = count + files.items(piece), piece.rstrip()[-1:] or last
    if count > _VOCABULARY_ITEMS:
        files.refuse(path, f"more than {_VOCABULARY_ITEMS} values", "check where it comes from")
    if path.suffix == ".json" and last != b"}":
        files.refuse(path, f"ends in the middle, after {there} bytes")


def _templates(folder: Path) -> None:
    for path in _read_here(folder):
        if path.suffix == ".jinja" and path.is_file():
            files.size(path, _TEMPLATE_BYTES)
            try:
                path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                files.refuse(path, f"not UTF-8 at byte {error.start}")


def _own_code(folder: Path, name: str) -> Iterator[Problem]:
    """Where the folder asks for Python code of its own, or of a stranger's, to be imported."""
    places = [place for file in ("config.json", "tokenizer_config.json") for place in _code(folder / file)]
    if (folder / "custom_generate").exists():
        places.append("custom_generate/")
    if places:
        what = f"{name} wants to run its own Python code ({', '.join(places)})"
        yield Problem("model", what, "read that code, then set trust_remote_code: true")


def _code(path: Path) -> set[str]:
    try:
        nodes = list(_objects(files.json_object(path)))
    except ModelError:
        return set()  # absent, or told already
    kernels = [n.get(key) for n in nodes for key in ("attn_implementation", "_attn_implementation")]
    asked = {"auto_map"} if any("auto_map" in node for node in nodes) else set()
    asked |= {"attn_implementation"} if any("/" in str(kernel) for kernel in kernels) else set()
    return {f"{key} in {path.name}" for key in asked}
