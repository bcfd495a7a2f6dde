"""Where a processor has no instructions for bf16, its products are computed in fp32: ``models/wide.py`` says how.

Measuring and generating do so as well, in a training with the switch off, too.
"""

from contextlib import AbstractContextManager, nullcontext

import torch

from tunewright.core.words import Words
from tunewright.fast import Technique, Work
from tunewright.models import wide


class WideProducts(Technique):
    """From the moment a model in bf16 is loaded, so that it is only held back here."""

    idea = Words(
        "On a processor without bf16 instructions, products of bf16 numbers are computed in fp32, part by part.",
        "处理器没有 bf16 指令时，bf16 矩阵乘法分块转为 fp32 计算。",
    )

    def why_not(self, work: Work) -> str:
        """It is for processors that lack the instructions, and weights that want them."""
        if work.device.type != "cpu":
            return "the device multiplies bf16 itself"
        if reason := wide.why_not():
            return reason
        held = {parameter.dtype for parameter in work.model.parameters()}
        return "" if torch.bfloat16 in held else "nothing is held in bf16"

    def on(self, work: Work) -> AbstractContextManager[object]:
        """It stays: other models of the process gain as well."""
        wide.begin()
        return nullcontext()

    def off(self, work: Work) -> AbstractContextManager[object]:
        """PyTorch's own products."""
        return wide.plain()
