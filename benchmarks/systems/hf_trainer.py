"""transformers' Trainer with PEFT, as a careful user's script has it: rows tokenized before, padded by the batch."""

from typing import Any

from datasets import Dataset
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)

from benchmarks import rows
from benchmarks.systems import _trainer
from benchmarks.systems._work import Work


def main(work: Work) -> None:
    """Train and save."""
    tokenizer = AutoTokenizer.from_pretrained(work["model"])
    data = Dataset.from_list(list(rows.encode(tokenizer, rows.read(work["train"]), work["max_length"])))
    model = _trainer.loaded(work)
    if work["method"]["name"] == "lora":
        model = _trainer.adapted(work, model)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**_trainer.arguments(work)),
        train_dataset=data,
        data_collator=_collator(work, tokenizer),
        callbacks=[_trainer.Watch(work)],
    )
    trainer.train()
    trainer.save_model(work["output"])
    tokenizer.save_pretrained(work["output"])
    work.finish(work.now, work["output"])


def _collator(work: Work, tokenizer: Any) -> Any:
    return DataCollatorWithFlattening() if work.settings.get("flatten") else DataCollatorForSeq2Seq(tokenizer)


if __name__ == "__main__":
    main(Work.read())
