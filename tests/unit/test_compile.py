"""What a compiled block keeps: attention's results where they are little; losses and gradients are the plain path's."""

from typing import Any

import pytest
import torch
from techniques import SHAPE, assert_near, batch, learn, work
from transformers import LlamaConfig, LlamaForCausalLM

from tunewright.fast import Portion, _causal, _native, compile
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


def test_where_to_compute_again_costs_more_so_few_tokens_go_at_a_time_that_products_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_native, "has_units", lambda: False)
    training = work(LlamaForCausalLM(LlamaConfig(**SHAPE)).train(), portion=Portion(4096, None, float, print))
    a_token = compile._products(training, 1)
    for most, tokens, way in (
        (1025, 1024, compile._PRODUCTS_KEPT),
        (513, 512, compile._PRODUCTS_KEPT),
        (512, 1024, compile._ATTENTION_KEPT),  # there is no number that is few enough
    ):
        monkeypatch.setattr(compile, "_LITTLE", most * a_token)
        assert (compile._at_a_time(training), compile._chosen(training)) == (tokens, way)


def test_on_matrix_units_many_tokens_go_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "has_units", lambda: True)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).train()
    sizes = [compile._at_a_time(work(model, portion=Portion(n, None, float, print))) for n in (3000, 9000)]
    assert sizes == [3000, 4096]
