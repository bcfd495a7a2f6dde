"""TRL's SFTTrainer. Rows go in as prompt and completion, so that its own default learns the answers only."""

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from benchmarks import rows
from benchmarks.systems import _trainer
from benchmarks.systems._work import Work


def main(work: Work) -> None:
    """Train and save as TRL's own script does."""
    data = Dataset.from_list([rows.split(row) for row in rows.read(work["train"])])
    ours = work.settings.get(
        "bf16_adapter"
    )  # TRL has no setting for it: it takes a model that has its adapter
    load = {} if ours else {"model_init_kwargs": work.settings.get("load")}
    trainer = SFTTrainer(
        model=_trainer.adapted(work, _trainer.loaded(work)) if ours else work["model"],
        args=SFTConfig(**{"max_length": work["max_length"], **load, **_trainer.arguments(work)}),
        train_dataset=data,
        peft_config=_trainer.lora() if work["method"]["name"] == "lora" and not ours else None,
        callbacks=[_trainer.Watch(work)],
    )
    trainer.train()
    trainer.save_model(work["output"])
    work.finish(work.now, work["output"])


if __name__ == "__main__":
    main(Work.read())
