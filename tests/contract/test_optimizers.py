"""Every optimizer, found by its file: it learns, its state is as large as it says, and it goes on bit for bit."""

import re
import shutil
from math import isfinite

import pytest
import torch
from lessons import STEPS, STOP, Watch
from school import School

from tunewright import optimizers
from tunewright.core import plugins
from tunewright.recipes import plugin_config

LAST = f"checkpoints/step-{STEPS:08d}"


@pytest.mark.parametrize("name", plugins.names("optimizers"))
@pytest.mark.parametrize("method", ["full", "lora"])
def test_an_optimizer_goes_on_bit_for_bit(school: School, method, name):
    choice = {"name": name}
    lesson = school(method, "llama")
    assert lesson is not None

    def trainer(folder):
        return lesson.trainer(
            folder, algorithm=optimizers.create(choice, plugin_config("optimizers", choice))
        )

    whole = trainer(f"{name}-whole")
    watch, before = Watch(whole.optimizer.parameters), whole.optimizer.weights()
    before = {key: value.clone() for key, value in before.items()}
    whole.log.readers.append(watch)
    whole.run()
    assert len(watch.losses) == STEPS
    assert all(map(isfinite, watch.losses))
    assert not any(torch.equal(value, before[key]) for key, value in whole.optimizer.weights().items())

    ignored = shutil.ignore_patterns(f"step-{STEPS:08d}")
    shutil.copytree(whole.folder, lesson.folder / f"{name}-again", ignore=ignored)
    again = trainer(f"{name}-again")
    resumed = []
    again.run(lambda: resumed.append(again.state.step))
    assert resumed == [STOP]
    for file in ("trainable", "optimizer"):
        path = f"{LAST}/{file}.safetensors"
        assert (whole.folder / path).read_bytes() == (again.folder / path).read_bytes()


@pytest.mark.parametrize("name", plugins.names("optimizers"))
def test_an_optimizers_facts_are_complete_and_true(name):
    choice = {"name": name}
    optimizer = optimizers.create(choice, plugin_config("optimizers", choice))
    facts = optimizer.facts
    assert facts.idea.en and facts.idea.zh and facts.idea.en != facts.idea.zh
    assert re.search(r"\b(19|20)\d\d\b", facts.paper)
    large = torch.empty(4096, 4096, device="meta")
    held = sum(tensor.nbytes for tensor in optimizer.start(large).values())
    assert held / large.numel() == pytest.approx(facts.bytes_per_parameter, rel=0.05)
