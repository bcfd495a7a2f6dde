"""What no file of the project may do: run what it reads."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = {"pickle", "cPickle", "_pickle", "dill", "shelve", "marshal", "cloudpickle", "joblib"}
"""Their loaders run code that the bytes name."""
CALLS = {
    "torch.load", "torch.save", "torch.jit.load", "os.system", "os.popen", "yaml.load", "yaml.load_all",
    "yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.full_load", "yaml.full_load_all", "yaml.UnsafeLoader",
    "yaml.Loader", "yaml.FullLoader", "subprocess.getoutput", "subprocess.getstatusoutput",
    "torch.serialization.load", "torch.serialization.save", "builtins.eval", "builtins.exec", "builtins.__import__",
}  # fmt: skip
NAMES = {"eval", "exec", "__import__"}
ARGUMENTS = {"allow_pickle", "trust_remote_code", "shell"}
"""Never ``True`` as a literal, whatever is called."""


def origins(tree: ast.AST) -> dict[str, str]:
    """Names in a file and the dotted path that an import made them stand for."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def dotted(node: ast.expr, known: dict[str, str]) -> str:
    """``os.system`` for an expression that means it; empty for one that is no dotted name."""
    if isinstance(node, ast.Name):
        return known.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value, known)
        return f"{inner}.{node.attr}" if inner else ""
    return ""


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and not node.level:
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def true(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and bool(node.value) is True


def keywords(node: ast.AST) -> list[tuple[str, ast.expr]]:
    """Arguments that a call or a function gives by name, and keys of a dictionary that is written out."""
    if isinstance(node, ast.Call):
        return [(keyword.arg, keyword.value) for keyword in node.keywords if keyword.arg]
    if isinstance(node, ast.Dict):
        named = [(key.value, value) for key, value in zip(node.keys, node.values, strict=True)
                 if isinstance(key, ast.Constant)]  # fmt: skip
        return [(name, value) for name, value in named if isinstance(name, str)]
    if isinstance(node, ast.arguments):
        plain = [*node.posonlyargs, *node.args]
        given = plain[len(plain) - len(node.defaults) :] if node.defaults else []
        both = [*zip(given, node.defaults, strict=True), *zip(node.kwonlyargs, node.kw_defaults, strict=True)]
        return [(argument.arg, default) for argument, default in both if default is not None]
    return []


def faults(node: ast.AST, known: dict[str, str]) -> Iterator[str]:
    for name in imported(node):
        if name.partition(".")[0] in MODULES or name in CALLS:
            yield f"imports {name}"
    is_read = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)  # a field may be called eval
    if is_read and known.get(node.id, node.id) in NAMES:
        yield f"uses {node.id}"
    if isinstance(node, ast.Attribute) and dotted(node, known) in CALLS:
        yield f"uses {dotted(node, known)}"
    for name, value in keywords(node):
        if name in ARGUMENTS and true(value):
            yield f"gives {name}=True"


def banned(source: str) -> list[str]:
    """What a source does that is banned, as ``line: what``."""
    tree = ast.parse(source)
    known = origins(tree)
    return [
        f"{getattr(node, 'lineno', 0)}: {what}" for node in ast.walk(tree) for what in faults(node, known)
    ]


def sources() -> list[Path]:
    return sorted(path for folder in ("src", "scripts") for path in (ROOT / folder).rglob("*.py"))


def test_nothing_in_the_project_runs_what_it_reads() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{what}" for path in sources() for what in banned(path.read_text("utf-8"))
    ]
    assert not found, "\n".join(found)


def test_every_source_is_looked_at() -> None:
    looked_at = {path.relative_to(ROOT).as_posix() for path in sources()}
    assert {"src/tunewright/core/store.py", "src/tunewright/cli.py", "scripts/build_pico.py"} <= looked_at


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "import dill as d", "from shelve import open", "import marshal, json",
        "import cloudpickle.cloudpickle", "from cPickle import loads", "def f():\n    import pickle",
        "import torch\ntorch.load('x')", "import torch as t\nt.save(x, 'y')", "from torch import load",
        "from torch import save as keep", "import torch.serialization\ntorch.load('x', weights_only=True)",
        "f = __import__('torch').load", "import numpy as np\nnp.load('x', allow_pickle=True)",
        "load('x', mmap_mode='r', allow_pickle=True)", "eval('1')", "exec(code)", "run = eval",
        "import builtins\nbuiltins.exec('1')", "from builtins import eval as e", "__import__('os')",
        "import os\nos.system('ls')", "from os import popen", "import os as o\no.popen('ls')",
        "import subprocess\nsubprocess.run('ls', shell=True)", "Popen('ls', shell=True)", "run('ls', shell=1)",
        "import yaml\nyaml.load(text, Loader=yaml.SafeLoader)", "from yaml import unsafe_load",
        "import yaml as y\ny.full_load(text)", "import yaml\nclass L(yaml.Loader): ...",
        "AutoModel.from_pretrained('x', trust_remote_code=True)", "options = {'trust_remote_code': True}",
        "def f(x, trust_remote_code=True): ...", "def f(*, allow_pickle=True): ...",
    ],
)  # fmt: skip
def test_what_is_banned_is_found(source: str) -> None:
    assert banned(source), source


@pytest.mark.parametrize(
    "source",
    [
        "spec.loader.exec_module(module)", "model.eval()", "import numpy as np\nnp.load('x')",
        "np.load('x', allow_pickle=False)", "import subprocess\nsubprocess.run(['ls'], shell=False)",
        "import yaml\nyaml.safe_load(text)", "import yaml\nclass L(yaml.SafeLoader): ...",
        "from safetensors.torch import load_file, save_file", "import json\njson.load(file)",
        "AutoModel.from_pretrained('x', trust_remote_code=source.trust_remote_code)",
        "fix = 'set trust_remote_code: true'", "def f(trust_remote_code=False): ...", "find(model, True)",
        "from tunewright.runs import load", "import os\nos.write(2, b'x')", "self.model.load(path)",
        "evaluate(model)", "{True: 1, 'shell': False, **more}",
    ],
)  # fmt: skip
def test_what_only_looks_like_it_is_not(source: str) -> None:
    assert banned(source) == []
