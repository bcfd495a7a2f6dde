"""P-tuning: a prompt before the input's embeddings that a trained encoder makes (Liu et al. 2021), through PEFT."""

from itertools import pairwise
from typing import Any, Literal

from pydantic import Field

from tunewright.core.words import Words
from tunewright.methods import Facts
from tunewright.methods._prompts import KEEPS_APART, PromptConfig, PromptMethod


class Config(PromptConfig):
    """How long the prompt is and what makes it."""

    encoder: Literal["mlp", "lstm"] = "mlp"
    """Three linear layers for each virtual token by itself; or a bidirectional LSTM over all and two."""
    hidden_size: int | None = Field(None, ge=1)
    """Width of the encoder; null is the model's own."""
    lstm_layers: int = Field(2, ge=1)
    """Layers of the LSTM."""


class PTuning(PromptMethod):
    """Trains the encoder and its inputs; the prompt that it makes in the end is saved alone."""

    default_lr = 3e-3
    saves = "P_TUNING"
    reads = ("P_TUNING",)
    facts = Facts(
        idea=Words(
            "The vectors before the input come from a small network, so that they are learned together.",
            "输入之前的向量由一个小网络生成，因而彼此关联地学习。",
        ),
        formula="h = f([g(P); E(x)])",
        count="length·D + (D+1)·H + (H+1)·H + (H+1)·D with an MLP; an LSTM has its own",
        inference=Words(
            "as prompt tuning: length more positions; the encoder is gone",
            "与 prompt tuning 相同：多占 length 个位置，编码器不再需要",
        ),
        when=Words(
            "Where a plain prompt learns slowly or hangs on its start.",
            "普通提示学得慢、或过分依赖初始值时。",
        ),
        paper="Liu et al. 2021, arXiv:2103.10385",
        keeps_apart=KEEPS_APART,
    )

    @classmethod
    def finished(cls, model: Any, length: int) -> Any:
        """A prompt without an encoder."""
        return _peft_config(cls.width(model), length, inference_mode=True)

    def peft_config(self, model: Any) -> Any:
        """PEFT's PromptEncoderConfig."""
        more = {"encoder_num_layers": self.config.lstm_layers} if self.config.encoder == "lstm" else {}
        return _peft_config(
            self.width(model), self.config.length, encoder_hidden_size=self._hidden(model),
            encoder_reparameterization_type=self.config.encoder.upper(), **more,
        )  # fmt: skip

    def _hidden(self, model: Any) -> int:
        return int(self.config.hidden_size or self.width(model))

    def count(self, model: Any) -> int:
        """The encoder's inputs and its layers with their biases."""
        width, hidden = self.width(model), self._hidden(model)
        if self.config.encoder == "mlp":
            sides = [width, hidden, hidden, width]
            return int(self.config.length * width + _linears(sides))
        inputs = [width] + [2 * hidden] * (self.config.lstm_layers - 1)
        lstm = sum(2 * 4 * hidden * (size + hidden + 2) for size in inputs)  # two directions of four gates
        return int(self.config.length * width + lstm + _linears([2 * hidden, 2 * hidden, width]))


def _linears(sides: list[int]) -> int:
    """Weights and biases of linear layers between these sizes."""
    return sum((one + 1) * other for one, other in pairwise(sides))


def _peft_config(width: int, length: int, **more: Any) -> Any:
    from peft import PromptEncoderConfig

    return PromptEncoderConfig(num_virtual_tokens=length, token_dim=width, task_type="CAUSAL_LM", **more)
