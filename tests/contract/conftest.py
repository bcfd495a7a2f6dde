"""The tiny models of the contract tests and the lessons on them, made once for a session."""

from collections.abc import Callable, Iterator

import architectures
import learning
import pytest
from elsewhere import Elsewhere
from lab_more import one_thread
from school import School

Wait = Callable[[], tuple[float, float]]


@pytest.fixture(scope="session")
def school(own_cache: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[School]:
    """``school(method, architecture)`` is the lesson, None where the method cannot be used."""
    folder = tmp_path_factory.mktemp("contract")
    made = School(architectures.save_all(folder / "models"), folder / "lessons")
    yield made
    made.close()


@pytest.fixture(scope="session", autouse=True)
def learned(request: pytest.FixtureRequest, own_cache, tmp_path_factory) -> Iterator[dict[str, Wait]]:
    """What comes of each method that test_learning.py is to look at; all are begun now, in another process."""
    items = (item for item in request.session.items if item.path.stem == "test_learning")
    wanted = [item.callspec.params["method"] for item in items]
    if not wanted:
        yield {}
        return
    folder = tmp_path_factory.mktemp("learning")
    model, process = learning.save_lower_half(folder / "model"), Elsewhere()
    yield {method: process.ask(learning.losses, method, model, folder) for method in wanted}
    process.close()


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """A tiny model is faster on one thread, and its sums are those of the other processes, which have one."""
    with one_thread():
        yield
