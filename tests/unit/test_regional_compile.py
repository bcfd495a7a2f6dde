"""The compiled block computes what the plain one does."""

import shutil

import pytest
import torch

from tunewright.fast import regional_compile


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.filterwarnings("default")  # torch._dynamo looks at .grad of what it traces, and warns itself
def test_loss_and_gradients_equal_the_plain_path(make_model):
    ids = torch.arange(24).reshape(2, 12) % 50
    found = []
    for compiled in (False, True):
        model = make_model()
        if compiled:
            assert regional_compile.apply(model) == 2
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        found.append((loss.detach(), {n: p.grad for n, p in model.named_parameters()}))
    (plain, gradients), (fast, fast_gradients) = found
    assert torch.allclose(plain, fast, atol=1e-5, rtol=0)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, fast_gradients[name], atol=1e-5, rtol=0), name
