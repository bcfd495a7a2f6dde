"""What a compiled block keeps: attention's results where they are little; losses and gradients are the plain path's."""

from typing import Any

import pytest
import torch
from techniques import SHAPE, assert_near, batch, learn, work
from transformers import LlamaConfig, LlamaForCausalLM

from tunewright.fast import _causal, _native, compile
from tunewright.fast.attention import Attention

needs_compiler = pytest.mark.skipif(_native.compiler() is None, reason="there is no C++ compiler")


@needs_compiler
@pytest.mark.filterwarnings("default")  # torch._dynamo warns of what it looks at itself
@pytest.mark.parametrize(("most", "passes"), [(0, 2), (1 << 30, 1)], ids=["computed again", "kept"])
def test_attention_is_computed_again_unless_its_results_are_little(
    monkeypatch: pytest.MonkeyPatch, most: int, passes: int
) -> None:
    monkeypatch.setattr(compile, "_LITTLE", 0)
    monkeypatch.setattr(compile, "_LITTLE_ATTENTION", most)
    torch.manual_seed(0)
    model, given, calls = LlamaForCausalLM(LlamaConfig(**SHAPE)).train(), batch(12, 12), list[int]()
    expected = learn(model, given)
    plain = _causal.forward

    def count(*args: Any) -> Any:
        calls.append(1)
        return plain(*args)

    monkeypatch.setattr(_causal, "forward", count)
    torch.compiler.reset()
    with Attention().on(work(model)), compile.Compile().on(work(model)):
        found = learn(model, given)
        calls.clear()  # tracing calls it as well
        found = learn(model, given)
    assert len(calls) == passes * SHAPE["num_hidden_layers"]
    assert_near(found, expected)
