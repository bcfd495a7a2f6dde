"""Every method on every architecture. A method is found by its file; nothing here depends on which there are."""

import checks
import pytest
from architectures import ARCHITECTURES
from school import School

from tunewright.core import plugins

METHODS = plugins.names("methods")


def of_one(method: str) -> pytest.MarkDecorator:
    """Tests of one method stay in one process: they share its lessons."""
    return pytest.mark.xdist_group(method)


every_method = pytest.mark.parametrize("method", [pytest.param(m, marks=of_one(m)) for m in METHODS])
every_pair = pytest.mark.parametrize(
    ("method", "architecture"),
    [pytest.param(m, a, id=f"{m}-{a}", marks=of_one(m)) for m in METHODS for a in ARCHITECTURES],
)
every_check = pytest.mark.parametrize("check", [pytest.param(c, id=c.__name__) for c in checks.CHECKS])


@every_check
@every_pair
def test_every_method_on_every_architecture(school: School, check, method, architecture):
    lesson = school(method, architecture)
    if lesson is not None:  # else it is refused, which is looked at below
        check(lesson)


@every_pair
def test_what_cannot_be_adapted_is_refused_in_advance(school: School, method, architecture):
    checks.refuses_in_advance(school, method, architecture)


def refused(school: School, method: str) -> list[str]:
    """The architectures that a method is not for."""
    return [architecture for architecture in ARCHITECTURES if school(method, architecture) is None]


@pytest.mark.parametrize("method", ["lora", "full", "scratch"])
def test_the_common_methods_are_refused_nowhere(school: School, method):
    assert refused(school, method) == []


@every_method
def test_every_method_is_for_one_architecture_at_least(school: School, method):
    assert len(refused(school, method)) < len(ARCHITECTURES)


@pytest.mark.parametrize("objective", plugins.names("objectives"))
@every_method
def test_every_method_takes_a_step_of_every_objective(school: School, method, objective):
    lesson = next(made for a in ARCHITECTURES if (made := school(method, a)))
    checks.takes_a_step_of(lesson, objective)
