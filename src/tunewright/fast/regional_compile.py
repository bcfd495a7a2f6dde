"""Compile the decoder block once and use it for every layer ("regional" compilation of torch.compile).

Costs seconds at the first step and needs a C++ compiler on a CPU; pays back on runs of many steps.
"""

from typing import Any

from tunewright.models.anatomy import blocks


def apply(model: Any) -> int:
    """Compile each decoder block in place; returns how many."""
    found = blocks(model)
    for _, block in found:
        block.compile()
    return len(found)
