"""What there is to choose from: the methods with what each costs, computed and not claimed."""

from functools import cache
from typing import Any

from tunewright import methods
from tunewright.core import plugins
from tunewright.core.config import Config
from tunewright.core.units import human_count
from tunewright.methods import Method
from tunewright.recipes import plugin_config

Tree = dict[str, Any]
REFERENCE = "llama"
"""The 7B shape that shares and memory factors are told for."""
_TRAINED = 14.0
"""Bytes for a trained parameter beside its weight: bf16 gradient, fp32 master, AdamW's two fp32 moments."""
_WEIGHT = 2.0

SHAPES: dict[str, tuple[str, Tree]] = {
    "llama": ("Llama", {"num_key_value_heads": 32}),
    "qwen2": ("Qwen2", {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14,
                        "num_key_value_heads": 2, "intermediate_size": 4864}),
    "gpt2": ("GPT2", {}),
    "gpt_neo": ("GPTNeo", {"hidden_size": 768, "num_layers": 12, "num_heads": 12,
                           "attention_types": [[["global", "local"], 6]]}),
    "mixtral": ("Mixtral", {"num_hidden_layers": 2}),
}  # fmt: skip
"""Architecture -> transformers' config class and what differs from its defaults, each of a usual width."""


@cache
def outline(architecture: str) -> Any:
    """A model of that architecture without values."""
    import torch
    import transformers

    name, changes = SHAPES[architecture]
    with torch.device("meta"):
        config = getattr(transformers, f"{name}Config")(**changes)
        return transformers.AutoModelForCausalLM.from_config(config)


def method_rows() -> list[Tree]:
    """Each method: facts, and what it trains, holds and refuses at its default options."""
    return [_row(name) for name in plugins.names("methods")]


def _row(name: str) -> Tree:
    kind = methods.kind(name)
    method, facts = kind(default_config(name)), kind.facts
    whole = outline(REFERENCE)
    total = sum(p.numel() for p in whole.parameters())
    count = method.count(whole)
    refused = {other: method.problems(outline(other)) for other in SHAPES}
    apart = kind.keeps_apart(whole)
    return {
        "name": name, "summary": plugins.summary("methods", name),
        "idea": facts.idea._asdict(), "formula": facts.formula, "trains": facts.count,
        "count": count, "share": count / total, "memory_factor": _memory(method, method.at_once(whole), total),
        "inference": facts.inference._asdict(), "mergeable": apart is None,
        "keeps_apart": apart._asdict() if apart else None,
        "refuses": {other: found[0].what for other, found in refused.items() if found},
        "when": facts.when._asdict(), "paper": facts.paper, "default_lr": kind.default_lr,
    }  # fmt: skip


def default_config(name: str) -> Config:
    """A method's options when a recipe gives none."""
    return plugin_config("methods", {"name": name})


def _memory(method: Method, count: int, total: int) -> float:
    """Weights, gradients and optimizer as a multiple of full fine-tuning's, which takes 16 bytes a parameter."""
    held = (total if method.folder == "adapter" else total - count) * method.base_bytes
    return (held + count * (_TRAINED + _WEIGHT)) / (total * (_TRAINED + _WEIGHT))


def method_table(rows: list[Tree], language: str = "en") -> str:
    """The rows for a terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_edge=False)
    for title, justify in (("method", "left"), ("trains", "right"), ("share", "right"), ("memory", "right"),
                           ("merges", "left"), ("not on", "left"), ("at inference", "left"), ("when", "left")):  # fmt: skip
        table.add_column(title, justify=justify, no_wrap=title in ("method", "trains", "share"))  # type: ignore[arg-type]
    for row in rows:
        merges = "yes" if row["mergeable"] else "no"
        table.add_row(
            row["name"], human_count(row["count"]), f"{row['share']:.3%}", f"{row['memory_factor']:.2f}",
            merges, ", ".join(row["refuses"]), row["inference"][language], row["when"][language],
        )  # fmt: skip
    console = Console(width=140, force_terminal=False, color_system=None)
    with console.capture() as caught:
        console.print(table)
    legend = (
        "trains, share: trainable parameters of a Llama 7B at default options. memory: weights, gradients and "
        "optimizer against full fine-tuning.\nnot on: architectures that refuse it at default options; why, and its "
        "formula and paper: --json, or docs/methods.md"
    )
    return "\n".join(line.rstrip() for line in caught.get().splitlines()) + "\n\n" + legend
