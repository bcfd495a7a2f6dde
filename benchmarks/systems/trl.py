"""TRL's SFTTrainer, DPOTrainer and GRPOTrainer.

Conversations go in as prompt and completion, so that its own default learns the answers only.
"""

from typing import Any

import trl
from datasets import Dataset

from benchmarks import rewards, rows
from benchmarks.systems import _trainer
from benchmarks.systems._work import Work

KINDS = {"sft": "SFT", "dpo": "DPO", "grpo": "GRPO"}


def main(work: Work) -> None:
    """Train and save as TRL's own scripts do."""
    asked, found = work["objective"], rows.read(work["train"])
    trainer_of, config_of = (getattr(trl, KINDS[asked["name"]] + kind) for kind in ("Trainer", "Config"))
    own: dict[str, Any] = {"max_length": work["max_length"]}
    more: dict[str, Any] = {}
    if asked["name"] == "grpo":
        own = {"num_generations": asked["group"], "max_completion_length": asked["longest"]}
        more = {"reward_funcs": rewards.of_completions}
    data = Dataset.from_list(found if asked["name"] == "dpo" else [rows.split(row) for row in found])
    ours = work.settings.get(
        "bf16_adapter"
    )  # TRL has no setting for it: it takes a model that has its adapter
    load = {} if ours else {"model_init_kwargs": work.settings.get("load")}
    trainer = trainer_of(
        model=_trainer.adapted(work, _trainer.loaded(work)) if ours else work["model"],
        args=config_of(**{**own, **load, **_trainer.arguments(work)}),
        train_dataset=data,
        peft_config=_trainer.lora() if work["method"]["name"] == "lora" and not ours else None,
        callbacks=[_trainer.Watch(work)],
        **more,
    )
    trainer.train()
    trainer.save_model(work["output"])
    work.finish(work.now, work["output"])


if __name__ == "__main__":
    main(Work.read())
