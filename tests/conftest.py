"""Tiny real models and a Trainer on them. No test reaches for the network or the user's own cache."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gc
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

Talk = Sequence[str]
"""A conversation: what the user and the assistant say in turn."""

PICO = Path(__file__).parents[1] / "src" / "tunewright" / "models" / "pico"
TALKS: tuple[Talk, ...] = (
    ("What is two and two?", "Four."),
    ("Name a colour.", "Blue is a colour."),
    ("Say hello.", "Hello there, how are you?"),
    ("And now?", "Now it is evening.", "Where is the cat?", "The cat sleeps on the chair."),
    ("How many legs has a dog?", "A dog has four legs."),
    ("What falls from the sky?", "Rain and snow."),
    ("Spell cat.", "C, a, t."),
    ("Who are you?", "A small model, made for tests."),
)


def _seed() -> None:
    """As ``torch.manual_seed``, which notes the whole stack for each kind of device that is not here: half a millisecond."""
    if torch := sys.modules.get("torch"):
        torch.default_generator.manual_seed(0)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(0)


def pytest_collection_finish() -> None:
    """What is loaded stays: a search of all that for garbage takes 0.3 s."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup() -> None:
    """What a fixture draws does not depend on the tests before it; nor, below, what a test draws."""
    _seed()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    _seed()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[Path]:
    """Tokenized data goes into a folder of this test session; C++, which takes seconds to build, into one that lasts."""
    folder = tmp_path_factory.mktemp("cache")
    assert pytestconfig.cache
    (folder / "native").symlink_to(pytestconfig.cache.mkdir("native"))
    before = os.environ.get("TUNEWRIGHT_CACHE")
    os.environ["TUNEWRIGHT_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["TUNEWRIGHT_CACHE"]
    else:
        os.environ["TUNEWRIGHT_CACHE"] = before


@pytest.fixture(scope="session")
def shared_fixtures() -> Path:
    """Real models, tokenizers and data beside the project."""
    folder = Path(__file__).parents[2] / "shared" / "fixtures"
    if not folder.is_dir():
        pytest.skip(f"real models and data are not here: {folder}")
    return folder


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: a Llama of two layers with random weights and the built-in tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(PICO / name, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.1,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer(tiny_model_folder: Path) -> Any:
    """The built-in tokenizer, a fresh one for each test since a codec may change its template."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model_folder)


@pytest.fixture
def make_model(tiny_model_folder: Path) -> Callable[..., Any]:
    """``make_model()`` is the tiny model, freshly loaded."""
    from tunewright.models.load import find, load_model

    def make(precision: str = "fp32") -> Any:
        return load_model(find(str(tiny_model_folder)), precision)

    return make


@pytest.fixture
def make_mixture(tmp_path: Path, tokenizer: Any) -> Callable[..., Any]:
    """``make_mixture([(user, assistant), ...])`` is those conversations, tokenized for sft."""
    from tunewright.data import tokens
    from tunewright.data.rows import Message, Row
    from tunewright.data.template import ChatCodec
    from tunewright.objectives.sft import Config, Sft

    def make(talks: Sequence[Talk], name: str = "train") -> Any:
        roles = ("user", "assistant")
        turns = [tuple(Message(roles[i % 2], words) for i, words in enumerate(talk)) for talk in talks]
        objective = Sft(Config(), ChatCodec(tokenizer))
        folder = tmp_path / f"table-{name}"
        samples = objective.encode(Row(f"{name}:{i}", turn) for i, turn in enumerate(turns, 1))
        tokens.write(folder, samples, lambda: {"rows": len(turns)})
        return tokens.Mixture([tokens.TokenTable(folder)], [1.0])

    return make


@pytest.fixture
def make_trainer(
    tmp_path: Path, tokenizer: Any, make_model: Any, make_mixture: Any
) -> Iterator[Callable[..., Any]]:
    """``make_trainer(lr=1e-2, ...)`` is a Trainer of the tiny model; other keywords are ``train``'s.

    Speed techniques are off: tests of the loop look at logits, which some of them never make.

    Trainers of the same ``folder`` share their checkpoints, as a run that is killed and started again does.
    """
    import torch

    from tunewright import methods
    from tunewright.core.events import EventLog
    from tunewright.data.template import ChatCodec
    from tunewright.objectives.sft import Config, Sft
    from tunewright.recipes import TrainConfig, plugin_config
    from tunewright.train.loop import Trainer

    logs: list[EventLog] = []

    def make(
        talks: Sequence[Talk] = TALKS,
        *,
        valid: Sequence[Talk] = (),
        method: Any = "full",
        precision: str = "fp32",
        folder: str = "run",
        readers: Sequence[Any] = (),
        fast: Any = False,
        **train: Any,
    ) -> Trainer:
        choice = {"name": method} if isinstance(method, str) else method
        torch.manual_seed(0)
        chosen = methods.create(choice, plugin_config("methods", choice))
        model = chosen.apply(make_model(precision))
        config = TrainConfig(**{"tokens_per_batch": 64, "warmup": 0.0, **train})
        logs.append(EventLog(tmp_path / folder / "events.jsonl", *readers))
        return Trainer(
            model, chosen, Sft(Config(), ChatCodec(tokenizer)), make_mixture(talks),
            make_mixture(valid, "valid") if valid else (), config, precision, logs[-1], tmp_path / folder,
            switches=fast,
        )  # fmt: skip

    yield make
    torch.set_flush_denormal(False)  # training may set it, and it holds for the whole process
    for log in logs:
        log.close()
