"""What the systems built on transformers' Trainer share: watching its steps, and LoRA as all of them have it."""

from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from benchmarks.systems._work import PEER_SETTINGS, Work

ARGUMENTS = {"report_to": "none", "save_strategy": "no", "use_cpu": not torch.cuda.is_available()}
"""Nothing is logged elsewhere; what is trained is saved once, at the end. Trainers refuse bf16 on a CPU unless told
that a CPU is meant."""


class Watch(transformers.TrainerCallback):
    """Notes when each step ends, how many tokens it had, and when snapshots are whole."""

    def __init__(self, work: Work) -> None:
        self.work, self.tokens = work, 0
        inner = transformers.Trainer.training_step

        def counted(trainer: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self.tokens += real_tokens(inputs)
            return inner(trainer, model, inputs, *args, **kwargs)

        transformers.Trainer.training_step = counted

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """The first one ends the start-up."""
        self.work.first_step = self.work.first_step or self.work.now

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """One optimizer step."""
        self.work.steps.append((self.work.now, self.tokens))
        self.tokens = 0

    def on_save(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """A checkpoint's folder."""
        self.work.snapshots.append((self.work.now, f"{args.output_dir}/checkpoint-{state.global_step}"))


def real_tokens(inputs: Any) -> int:
    """Tokens that are no padding; batches without a mask [B, T] have none. Rows, where they have no tokens yet."""
    if isinstance(inputs, list):  # GRPO's are prompts that are yet to be answered
        return len(inputs)
    mask = inputs.get("attention_mask")
    if mask is not None and mask.ndim == 2:
        return int((mask != 0).sum())
    return int(inputs["input_ids"].numel())


def arguments(work: Work) -> dict[str, Any]:
    """Training arguments: what every system is told, then what this variant sets."""
    if unknown := work.settings.keys() - PEER_SETTINGS:
        raise ValueError(f"settings that no peer knows: {', '.join(sorted(unknown))}")
    asked = {"output_dir": work["output"], "learning_rate": work["lr"], "num_train_epochs": work["epochs"]}
    if work["snapshots"]:  # each is saved after this share of the steps
        asked |= {"save_strategy": "steps", "save_steps": 1 / work["snapshots"], "save_only_model": True}
    return {**ARGUMENTS, **asked, **work.settings.get("args", {})}


def lora() -> LoraConfig:
    """Rank 16 on all linear layers."""
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def loaded(work: Work) -> Any:
    """The model in its own precision, unless the variant says otherwise."""
    return AutoModelForCausalLM.from_pretrained(
        work["model"], **{"dtype": "auto", **work.settings.get("load", {})}
    )


def adapted(work: Work, model: Any) -> Any:
    """The model with an adapter as PEFT makes it, in fp32, or in the model's own precision."""
    return get_peft_model(model, lora(), autocast_adapter_dtype=not work.settings.get("bf16_adapter"))
