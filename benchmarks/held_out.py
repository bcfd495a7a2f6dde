"""The held-out loss of what a run saved, by plain transformers and PEFT in fp32, on the same rows for every system.

    python -m benchmarks.held_out WORK.json RESULT.json

WORK has ``model``, ``held_out``, ``max_length`` and ``artifacts``, a list of folders; an empty name is the model itself.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import rows

_AT_ONCE = 8
Tree = dict[str, Any]


def losses(work: Tree) -> list[float]:
    """Mean cross-entropy in nats per supervised token, one for each artifact."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work["model"])
    samples = list(rows.encode(tokenizer, rows.read(work["held_out"]), work["max_length"]))
    samples.sort(key=lambda sample: len(sample["input_ids"]))
    return [_loss(load(work["model"], artifact), samples) for artifact in work["artifacts"]]


def load(base: str, artifact: str) -> Any:
    """The model with what was saved: a whole model, a PEFT adapter, or parameters of the model by their names."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = Path(artifact)
    whole = artifact and (folder / "config.json").exists()
    model = AutoModelForCausalLM.from_pretrained(artifact if whole else base, dtype=torch.float32)
    if artifact and not whole:
        model = _adapted(model, folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval()


def _adapted(model: Any, folder: Path) -> Any:
    from peft import PeftModel
    from safetensors.torch import load_file

    if "tunewright_method" not in json.loads((folder / "adapter_config.json").read_text()):
        return PeftModel.from_pretrained(model, folder)
    found = model.load_state_dict(load_file(folder / "adapter_model.safetensors"), strict=False)
    if found.unexpected_keys:
        raise ValueError(f"{folder}: the model has no {found.unexpected_keys[0]}")
    return model


def _loss(model: Any, samples: Sequence[Tree]) -> float:
    import torch
    from torch.nn import functional as F

    total, count = 0.0, 0
    for start in range(0, len(samples), _AT_ONCE):
        ids_BT, labels_BT = (
            torch.nn.utils.rnn.pad_sequence(
                [torch.tensor(sample[key]) for sample in samples[start : start + _AT_ONCE]], True, filler
            ).to(model.device)
            for key, filler in (("input_ids", 0), ("labels", rows.IGNORED))
        )
        kept_BT = labels_BT[:, 1:] != rows.IGNORED
        with torch.inference_mode():  # padding is on the right: under causal attention no real token sees it
            logits_BTV = model(input_ids=ids_BT, use_cache=False).logits[:, :-1]
            summed = F.cross_entropy(logits_BTV[kept_BT].float(), labels_BT[:, 1:][kept_BT], reduction="sum")
        total, count = total + float(summed), count + int(kept_BT.sum())
    return total / count


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps({"losses": losses(json.loads(Path(sys.argv[1]).read_text()))}))
