"""How fast this machine multiplies matrices in bf16, and how much multiplying a training step needs.

    python -m benchmarks.matmul WORK.json RESULT.json

WORK has ``model``, a Hugging Face folder, and ``tokens``, the rows of its products.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SIDE = 4096
SIDE_GPU = 8192
_SECONDS = 2.0
_WARM_UPS = 3
Tree = dict[str, Any]


def linears(config: Tree) -> list[tuple[str, int, int]]:
    """Every linear layer of one decoder block of a Llama or Qwen2: its name, inputs and outputs."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or width // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    return [
        ("q", width, queries), ("k", width, keys), ("v", width, keys), ("o", queries, width),
        ("gate", width, inner), ("up", width, inner), ("down", inner, width),
    ]  # fmt: skip


def training_flop(config: Tree, facts: Tree, rank: int) -> float:
    """Floating-point operations that one epoch over these rows cannot do without.

    A frozen weight is multiplied twice a token, forward and for its input's gradient, 2 operations a parameter each;
    a trained one (``rank`` 0, full fine-tuning) a third time for its own gradient, as are the factors of LoRA. The
    output head is needed where a token is supervised. Causal attention needs half of the square: 2 products forward,
    4 backward. Recomputation is no work that was asked for and does not count.
    """
    layers, blocks = linears(config), config["num_hidden_layers"]
    body = blocks * sum(i * o for _, i, o in layers)
    factors = blocks * sum(rank * (i + o) for _, i, o in layers)
    head = config["vocab_size"] * config["hidden_size"]
    passes = 2 if rank else 3
    queries = layers[0][2]
    attention = 6 * blocks * queries * facts["squares"]
    each = 2 * passes * body + 6 * factors
    return float(each * facts["tokens"] + 2 * passes * head * facts["supervised"] + attention)


def rates(config: Tree, tokens: int) -> Tree:
    """Operations per second of a large square product, and of the model's own, forward and for the inputs' gradients."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    side = SIDE_GPU if device == "cuda" else SIDE

    def random(*shape: int) -> Any:
        return torch.randn(shape, dtype=torch.bfloat16, device=device)

    a, b = random(side, side), random(side, side)
    square = 2 * side**3 / _seconds(lambda: a @ b, device)
    needed, spent = 0.0, 0.0
    for inputs, outputs, times in _shapes(config):
        x_TI, w_OI, g_TO = random(tokens, inputs), random(outputs, inputs), random(tokens, outputs)
        needed += times * 4 * tokens * inputs * outputs
        spent += times * sum(
            _seconds(work, device, _SECONDS / 8)
            for work in (lambda x=x_TI, w=w_OI: x @ w.T, lambda g=g_TO, w=w_OI: g @ w)
        )
    return {"square": square, "own_shapes": needed / spent, "side": side, "tokens": tokens}


def _shapes(config: Tree) -> Iterator[tuple[int, int, int]]:
    """Different shapes of the block's layers, with how often each comes."""
    shapes = [(inputs, outputs) for _, inputs, outputs in linears(config)]
    for shape in dict.fromkeys(shapes):
        yield *shape, shapes.count(shape)


def _seconds(work: Callable[[], Any], device: str, budget: float = _SECONDS) -> float:
    """The mean time of one call, after warm-up."""
    import torch

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    for _ in range(_WARM_UPS):
        work()
    wait()
    began, calls = time.perf_counter(), 0
    while time.perf_counter() - began < budget:
        for _ in range(_WARM_UPS):
            work()
        wait()
        calls += _WARM_UPS
    return (time.perf_counter() - began) / calls


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text())
    shape = json.loads((Path(asked["model"]) / "config.json").read_text())
    Path(sys.argv[2]).write_text(json.dumps(rates(shape, asked["tokens"])))
