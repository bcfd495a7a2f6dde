"""Our own text: a bilingual pretraining corpus and the instruction rows that go with it."""

from collections.abc import Callable, Iterator
from pathlib import Path

from tunewright.core import store
from tunewright.data.builtin import instructions, polite
from tunewright.data.builtin.corpus import documents

__all__ = ["SOURCES", "rows", "version"]

CORPUS_SIZE = 400_000  # documents
CORPUS_VALID_SIZE = 1_000
DEMO_TRAIN_SIZE = 4_000  # rows
DEMO_VALID_SIZE = 400
MANNERS_SIZE = 4_000
POLITE_TRAIN_SIZE = 1_000
POLITE_VALID_SIZE = 200
SUMS = ("arithmetic.en", "arithmetic.zh")
SUMS_TRAIN_SIZE = 1_000
SUMS_VALID_SIZE = 200


def _corpus(seed: int, count: int) -> Iterator[dict[str, object]]:
    for text in documents(seed, count):
        yield {"text": text}


SOURCES: dict[str, Callable[[], Iterator[dict[str, object]]]] = {
    "pico-corpus": lambda: _corpus(0, CORPUS_SIZE),
    "pico-corpus-valid": lambda: _corpus(1, CORPUS_VALID_SIZE),
    "demo-train": lambda: instructions.rows("train", 0, DEMO_TRAIN_SIZE),
    "demo-valid": lambda: instructions.rows("valid", 0, DEMO_VALID_SIZE),
    "manners-train": lambda: polite.manners("train", 3, MANNERS_SIZE),
    "polite-train": lambda: polite.pairs("train", 2, POLITE_TRAIN_SIZE),
    "polite-valid": lambda: polite.pairs("valid", 2, POLITE_VALID_SIZE),
    "sums-train": lambda: instructions.rows("train", 1, SUMS_TRAIN_SIZE, SUMS),
    "sums-valid": lambda: instructions.rows("valid", 1, SUMS_VALID_SIZE, SUMS),
}


def rows(name: str) -> Iterator[dict[str, object]]:
    """The rows of the source called ``name``; KeyError where there is none."""
    return SOURCES[name]()


def version() -> str:
    """Changes whenever the generator or its facts do."""
    files = sorted(p for p in Path(__file__).parent.iterdir() if p.suffix in (".py", ".json"))
    return store.sha256_json([store.sha256_file(p) for p in files])[:16]
