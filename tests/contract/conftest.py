"""The tiny models of the contract tests and the lessons on them, made once for a session."""

from collections.abc import Iterator
from pathlib import Path

import architectures
import learning
import pytest
from lab_more import one_thread
from school import School


@pytest.fixture(scope="session")
def school(own_cache: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[School]:
    """``school(method, architecture)`` is the lesson, None where the method cannot be used."""
    folder = tmp_path_factory.mktemp("contract")
    made = School(architectures.save_all(folder / "models"), folder / "lessons")
    yield made
    made.close()


@pytest.fixture(scope="session")
def lower_half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that methods learn on."""
    return learning.save_lower_half(tmp_path_factory.mktemp("learning") / "model")


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """A tiny model is faster on one thread, and its sums are those of the other processes, which have one."""
    with one_thread():
        yield
