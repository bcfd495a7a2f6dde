"""Prompt tuning: trained vectors stand before the embeddings of the input (Lester et al. 2021), through PEFT."""

from typing import Any, Literal, Self

import torch
from pydantic import model_validator

from tunewright.core.errors import ModelError, Problem
from tunewright.core.words import Words
from tunewright.methods import Facts, Setting
from tunewright.methods._prompts import KEEPS_APART, PromptConfig, PromptMethod, common_tokens, fill


class Config(PromptConfig):
    """How long the prompt is and where it starts."""

    init: Literal["vocab", "text", "random"] = "vocab"
    """Where it starts: the embeddings of frequent tokens, those of ``text``, or noise of the same spread."""
    text: str = ""
    """Words to start from, such as a task's description or its labels; repeated or cut to the length."""

    @model_validator(mode="after")
    def _text_goes_with_init(self) -> Self:
        if (self.init == "text") != bool(self.text):
            raise ValueError("init: text and text belong together")
        return self


class Prompt(PromptMethod):
    """Trains length·D numbers."""

    default_lr = 0.1
    saves = "PROMPT_TUNING"
    reads = ("PROMPT_TUNING",)
    facts = Facts(
        idea=Words(
            "A few vectors that stand for no word are put before every input and trained; the model stays.",
            "在每个输入之前放几个不对应任何词的向量，只训练它们，模型不动。",
        ),
        formula="h = f([P; E(x)])",
        count="length · D",
        inference=Words(
            "length more positions for every sequence, and their keys and values",
            "每个序列多占 length 个位置及其键值",
        ),
        when=Words(
            "Many tasks on one large model: kilobytes a task. Small models learn less this way than by LoRA.",
            "一个大模型服务许多任务：每个任务只有几十 KB。小模型上效果不如 LoRA。",
        ),
        paper="Lester et al. 2021, arXiv:2104.08691",
        keeps_apart=KEEPS_APART,
    )

    @classmethod
    def finished(cls, model: Any, length: int) -> Any:
        """The same as in training: there is no encoder."""
        from peft import PromptTuningConfig

        return PromptTuningConfig(
            num_virtual_tokens=length, token_dim=cls.width(model), task_type="CAUSAL_LM", inference_mode=True
        )

    def peft_config(self, model: Any) -> Any:
        """PEFT's PromptTuningConfig; the start is made here, without the tokenizer that PEFT would load."""
        config = self.finished(model, self.config.length)
        config.inference_mode = False
        return config

    def count(self, model: Any) -> int:
        """One vector for each virtual token."""
        return int(self.config.length * self.width(model))

    def inject(self, model: Any) -> Any:
        """Start from tokens or from noise."""
        adapted = super().inject(model)
        table = model.get_input_embeddings().weight.detach()
        if self.config.init == "random":
            noise = torch.randn(self.config.length, table.shape[1], dtype=torch.float32)
            fill(adapted, noise * table.float().std().cpu())
        else:
            fill(adapted, table[common_tokens(model, self.config.length)])
        return adapted

    def begin(self, model: Any, setting: Setting) -> None:
        """Start from the given words, which only the tokenizer can read."""
        if self.config.init != "text":
            return
        ids = setting.codec.tokenizer(self.config.text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ModelError(Problem("method.text", "holds no token of the model's", "give words"))
        cycled = [ids[i % len(ids)] for i in range(self.config.length)]
        fill(model, model.word_embeddings.weight.detach()[cycled])
