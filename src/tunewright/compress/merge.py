"""Merge an adapter into its base: a plain Hugging Face folder with the same logits, checked each time."""

import shutil
from pathlib import Path
from typing import Any

import torch

from tunewright.core import store
from tunewright.core.errors import Problem, TunewrightError, UserError
from tunewright.core.paths import folder_to_make, inside
from tunewright.data.rows import Message
from tunewright.data.template import ChatCodec
from tunewright.methods import Method

_TOLERANCE = 1e-4
_PROBE = "The capital of France is Paris. 12 + 30 = 42. 法国的首都是巴黎。"


def merge(
    model: Any, method: type[Method], codec: ChatCodec, folder: Path, dtype: torch.dtype
) -> dict[str, float]:
    """Write the merged model to ``folder``; returns the largest logit differences on a probe text.

    ``model`` is held in fp32. ``merged`` is the difference in fp32, which must stay within 1e-4 or
    TunewrightError is raised and nothing written; ``saved`` is that of the weights as saved, in ``dtype``.
    """
    _check_free(folder)
    ids = torch.tensor([_probe(codec)], device=model.device)
    expected = _logits(model, ids)
    plain = method.merge(model)
    merged = float((_logits(plain, ids) - expected).abs().max())
    if not merged <= _TOLERANCE:
        raise TunewrightError(f"merged logits differ from the adapter's by {merged:.2e}; nothing was written")
    plain = plain.to(dtype)
    saved = float((_logits(plain, ids) - expected).abs().max())
    with store.artifact(folder, merged_difference=merged, saved_difference=saved) as partial:
        plain.save_pretrained(partial)
        codec.tokenizer.save_pretrained(partial)
    return {"merged": merged, "saved": saved}


def copy(artifact: Path, folder: Path) -> None:
    """Copy a finished artifact, verified, to ``folder``. UserError if a name in it leads out of either."""
    _check_free(folder)
    manifest = store.verify(artifact)
    where = str(artifact / store.MANIFEST)
    facts = {k: v for k, v in manifest.items() if k != "files"}
    with store.artifact(folder, **facts) as partial:
        for name in manifest["files"]:
            target = inside(partial, name, where)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(inside(artifact, name, where), target)


def _check_free(folder: Path) -> None:
    if folder_to_make(str(folder), "--out").exists():
        raise UserError(Problem(str(folder), "is already there", "give another --out"))


def _probe(codec: ChatCodec) -> list[int]:
    if codec.has_template:
        return codec.prompt((Message("user", _PROBE),))[: codec.max_length]
    return list(codec.tokenizer(_PROBE)["input_ids"])[: codec.max_length]


@torch.no_grad()
def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    model.eval()
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.float()
