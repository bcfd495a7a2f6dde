"""LLaMA-Factory's own training entry. It wants torchaudio to be there although text never uses it."""

import importlib.machinery
import json
import sys
import types
from pathlib import Path

from benchmarks.systems._work import Work

_TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}


def main(work: Work) -> None:
    """Write its dataset_info.json, then train."""
    _stand_in("torchaudio")
    from llamafactory.train.tuner import run_exp

    from benchmarks.systems import _trainer

    folder = Path(work["output"])
    folder.mkdir(parents=True, exist_ok=True)
    table = {"rows": {"file_name": work["train"], "formatting": "sharegpt", "tags": _TAGS,
                      "columns": {"messages": "messages"}}}  # fmt: skip
    (folder / "dataset_info.json").write_text(json.dumps(table))
    lora = {"finetuning_type": "lora", "lora_rank": 16, "lora_target": "all"}
    asked = {
        "stage": "sft", "do_train": True, "model_name_or_path": work["model"], "dataset": "rows",
        "dataset_dir": str(folder), "cutoff_len": work["max_length"], "overwrite_output_dir": True,
        **(lora if work["method"]["name"] == "lora" else {"finetuning_type": "full"}),
    }  # fmt: skip
    run_exp({**asked, **_trainer.arguments(work)}, callbacks=[_trainer.Watch(work)])
    work.finish(work.now, folder)


def _stand_in(name: str) -> None:
    """An empty module, since torchaudio has no build for some machines and is only needed for sound."""
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    sys.modules.setdefault(name, module)


if __name__ == "__main__":
    main(Work.read())
