"""A process of its own that answers questions in turn, while the tests go on."""

import os
import traceback
from collections.abc import Callable, Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from lab import serve
from safetensors.torch import save_file

from tunewright import methods
from tunewright.core import plugins
from tunewright.models.load import find, load_model

IDS = torch.tensor([[5, 77, 1030, 9, 4, 42, 640, 2], [600, 31, 8, 8, 2047, 11, 3000, 90]])
_PATIENCE = 300.0
_INHERITED = ("TUNEWRIGHT_CACHE", plugins.FOLDERS_VARIABLE)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    """The logits [B, T, V] of some fixed tokens."""
    was_training = model.training
    model.eval()
    try:
        return model(input_ids=IDS).logits.float()
    finally:
        model.train(was_training)


def keep_logits(folder: Path, manifest: Mapping[str, str], precision: str, target: Path) -> None:
    """Load what is in the folder, an adapter if it has a manifest, and save its logits."""
    if manifest:
        model, _ = methods.load_adapter(folder, manifest, precision)
    else:
        model = load_model(find(str(folder)), precision)
    save_file({"logits": logits(model)}, target)


def _serve(questions: Connection, variables: Mapping[str, str]) -> None:
    torch.set_num_threads(1)
    os.environ.update(variables)
    while question := questions.recv():
        questions.send(_tried(*question))


def _tried(function: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
    """What the function gives, or the traceback."""
    try:
        return function(*arguments), ""
    except BaseException:
        return None, traceback.format_exc()


class Elsewhere:
    """The process. It begins with everything imported, and has trained and loaded nothing."""

    def __init__(self) -> None:
        self._ours, theirs = Pipe()
        variables = {name: os.environ[name] for name in _INHERITED if name in os.environ}
        self._process = serve().Process(target=_serve, args=(theirs, variables), daemon=True)
        self._process.start()
        theirs.close()
        self._asked, self._answers = 0, list[tuple[Any, str]]()

    def ask(self, function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
        """Call a module's function there; what is returned here waits for its result."""
        number, self._asked = self._asked, self._asked + 1
        self._ours.send((function, *arguments))
        return lambda: self._answer(number)

    def _answer(self, number: int) -> Any:
        while len(self._answers) <= number:
            assert self._ours.poll(_PATIENCE), f"no answer within {_PATIENCE:.0f} s"
            self._answers.append(self._ours.recv())
        result, error = self._answers[number]
        assert not error, error
        return result

    def close(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.join()
        self._ours.close()
