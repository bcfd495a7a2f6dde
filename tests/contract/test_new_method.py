"""A method in one file of the user's own is one like all others."""

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import checks
import pytest
import torch
from architectures import ARCHITECTURES
from lessons import Lesson
from school import School

import tunewright as tw
from tunewright import cli, methods
from tunewright.core import plugins
from tunewright.core.errors import Problem
from tunewright.recipes import schema_json

NAME = "scale_norms"
METHOD = '''
"""Trains the weights of the normalisation layers."""

from typing import Any

from pydantic import Field

from tunewright.core.config import Config as BaseConfig
from tunewright.core.words import Words
from tunewright.methods import Facts
from tunewright.methods._own import OwnMethod


class Config(BaseConfig):
    """Which of the layers."""

    last_name: str = Field("norm", min_length=1)
    """What their classes' names contain."""


class ScaleNorms(OwnMethod):
    """Freezes everything else."""

    default_lr = 1e-2
    facts = Facts(
        idea=Words("Only the norms learn.", "只训练归一化层。"),
        formula="h = w · x / rms(x)",
        count="2·L·d + d",
        inference=Words("none", "无"),
        when=Words("To try a plugin.", "用来尝试插件。"),
        paper="Zhao et al. 2023, arXiv:2312.11420",
    )

    def inject(self, model: Any) -> Any:
        """Only the norms require gradients."""
        model.requires_grad_(False)
        for module in self._norms(model):
            module.requires_grad_(True)
        return model

    def _norms(self, model: Any) -> list[Any]:
        wanted = self.config.last_name
        return [m for m in model.modules() if wanted in type(m).__name__.lower()]

    def count(self, model: Any) -> int:
        """All of the norms' weights."""
        return sum(p.numel() for m in self._norms(model) for p in m.parameters())

    @classmethod
    def merge(cls, model: Any) -> Any:
        """Already plain."""
        return model
'''


@pytest.fixture
def plugged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a method that lies in a folder of the user's."""
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / f"{NAME}.py").write_text(METHOD, encoding="utf-8")
    monkeypatch.setenv(plugins.FOLDERS_VARIABLE, str(tmp_path))
    yield NAME
    sys.modules.pop(f"tunewright.methods.{NAME}", None)


def test_one_file_is_trained_from_a_recipe(plugged, tmp_path, tiny_model_folder):
    data = tmp_path / "my.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": f"Say {n}.", "completion": f"{n}!"}) + "\n" for n in range(30))
    )
    recipe = {
        "model": str(tiny_model_folder), "data": {"train": str(data), "valid_share": 0.2}, "precision": "fp32",
        "method": {"name": plugged, "last_name": "rmsnorm"}, "output": str(tmp_path / "run"),
        "train": {"max_steps": 8, "lr": 3e-2, "tokens_per_batch": 128}, "evaluate": {"generate": False},
    }  # fmt: skip
    (stage,) = tw.run(recipe, quiet=True).results["stages"]
    assert stage["parameters"]["trainable"] == 5 * 32
    assert stage["after"]["loss"] < stage["before"]["loss"]


def test_one_file_is_listed_and_in_the_schema(plugged, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tunewright", "list", "methods", "--json"])
    with pytest.raises(SystemExit):
        cli.main()
    listed = {row["name"]: row["summary"] for row in json.loads(capsys.readouterr().out)}
    assert listed[plugged] == "Trains the weights of the normalisation layers."
    choices = schema_json()["properties"]["method"]["anyOf"]
    assert plugged in choices[0]["enum"]
    (own,) = [choice for choice in choices[1:] if choice["properties"]["name"] == {"const": plugged}]
    assert own["properties"]["last_name"]["description"] == "What their classes' names contain."


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_file_keeps_the_whole_contract(plugged, school: School, architecture):
    lesson = school(plugged, architecture)
    assert lesson is not None
    for check in checks.CHECKS:
        check(lesson)
    checks.takes_a_step_of(lesson, "pretrain")


class Mistakes:
    """What a method could do wrong, as replacements of its own functions; each is named for the check it fails."""

    def fits_what_it_says_it_fits(self, kind):
        late = Problem("method", "not this one", "use method: lora")
        return {"problems": lambda method, model: [] if model.device.type == "meta" else [late]}

    def changes_what_it_declares_and_nothing_else(self, kind):
        def after_update(method, model, clock):
            with torch.no_grad():
                model.get_input_embeddings().weight.mul_(1.001)

        return {"after_update": after_update}

    def begins_as_the_base(self, kind):
        def inject(method, model):
            with torch.no_grad():
                model.model.norm.weight.mul_(1.01)
            return plain(method, model)

        plain = kind.inject
        return {"inject": inject}

    def gives_gradients_to_all_that_it_trains(self, kind):
        return {"inject": idle(kind)}

    def counts_what_it_trains(self, kind):
        return {"count": lambda method, model: 7}

    def comes_back_in_another_process(self, kind):
        plain = kind.tensors
        return {"tensors": lambda method, model: {n: t * 1.001 for n, t in plain(method, model).items()}}

    def merges_or_says_why_not(self, kind):
        return {"merge": lambda model: model.model}

    def saves_what_it_trains_and_no_more(self, kind):
        return {"tensors": lambda method, model: dict(model.named_parameters())}

    def may_recompute_its_activations(self, kind):
        return {"inject": counting(kind)}

    def may_accumulate(self, kind):
        return {"inject": counting(kind)}

    def trains_in_half_precision(self, kind):
        return {"inject": idle(kind)}

    def goes_on_bit_for_bit(self, kind):
        def after_update(method, model, clock):
            method.steps = getattr(method, "steps", 0) + 1
            with torch.no_grad():
                model.model.norm.weight.mul_(1 + method.steps / 1000)

        return {"after_update": after_update}


def idle(kind):
    """An injection of one parameter more, in fp32, that nothing uses."""
    plain = kind.inject

    def inject(method, model):
        plain(method, model).register_parameter(
            "idle", torch.nn.Parameter(torch.ones(1, dtype=torch.float32))
        )
        return model

    return inject


def counting(kind):
    """An injection whose outputs depend on how often the model was called."""
    plain = kind.inject

    def inject(method, model):
        calls = itertools.count()
        model.model.layers[0].mlp.register_forward_hook(
            lambda module, args, out: out * (1 + next(calls) / 100)
        )
        return plain(method, model)

    return inject


@pytest.mark.parametrize("name", [name for name in vars(Mistakes) if not name.startswith("_")])
def test_each_mistake_is_found_out_by_its_check(plugged, school: School, monkeypatch, name):
    kind = methods.kind(plugged)
    for attribute, broken in getattr(Mistakes(), name)(kind).items():
        monkeypatch.setattr(kind, attribute, broken)
    lesson = Lesson(school, plugged, "llama", school.options(plugged, "llama"))
    with pytest.raises(AssertionError):
        getattr(checks, name)(lesson)


def test_every_check_has_a_mistake_that_it_finds():
    assert {check.__name__ for check in checks.CHECKS} <= vars(Mistakes).keys()
