"""LoRA that starts inside the base's weights (PiSSA, OLoRA), saved so that it fits the base as it was.

Training begins with W − s·B₀·A₀ beside the adapter s·B₀·A₀. What was learned is s·(B·A − B₀·A₀), which is a LoRA of
twice the rank: the columns of B and −B₀, the rows of A and A₀ (Meng et al. 2024, section 4).
"""

from math import sqrt
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tunewright.core import store
from tunewright.methods import _adapter
from tunewright.models import files

Factors = dict[str, Tensor]


_START = "tunewright_start"


def remember(model: Any) -> None:
    """Keep copies of A and B on a PEFT model, by the names that they are saved under."""
    from peft import get_peft_model_state_dict

    saved = get_peft_model_state_dict(model, save_embedding_layers=False)
    setattr(model, _START, {name: tensor.detach().clone() for name, tensor in saved.items()})


def remembered(model: Any) -> Factors:
    """What :func:`remember` kept; nothing if the model starts outside of its weights."""
    start: Factors = getattr(model, _START, {})
    return start


def subtract(folder: Path, start: Factors) -> None:
    """Rewrite a saved adapter as its difference to where it started, at twice its rank and the same scale."""
    trained = load_file(folder / _adapter.WEIGHTS)
    both = {name: _joined(name, tensor, start[name].to(tensor)) for name, tensor in trained.items()}
    save_file(both, folder / _adapter.WEIGHTS, metadata={"format": "pt"})
    config = files.json_object(folder / _adapter.CONFIG)
    grown = sqrt(2) if config["use_rslora"] else 2
    ranks = {name: 2 * rank for name, rank in config["rank_pattern"].items()}
    alphas = {name: alpha * grown for name, alpha in config["alpha_pattern"].items()}
    change = {"r": 2 * config["r"], "lora_alpha": config["lora_alpha"] * grown, "rank_pattern": ranks,
              "alpha_pattern": alphas, "init_lora_weights": True}  # fmt: skip
    store.write_json(folder / _adapter.CONFIG, {**config, **change})


def _joined(name: str, trained: Tensor, start: Tensor) -> Tensor:
    if "lora_A" in name:
        return torch.cat([trained, start], dim=0)
    return torch.cat([trained, -start], dim=1).contiguous()
