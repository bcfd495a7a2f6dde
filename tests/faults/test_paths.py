"""Names that lead astray, in every field that names a path: what files say stays in its folder, what users say
is told.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tunewright import examine, pipeline
from tunewright.compress import merge as merging
from tunewright.core import store
from tunewright.core.errors import DamagedError, DataError, TunewrightError, UserError
from tunewright.core.paths import inside
from tunewright.data import formats
from tunewright.data.rows import Row, Source
from tunewright.serve import speaker

CANARY = "the canary sings at midnight"
ROW = json.dumps({"prompt": "What does it do?", "completion": CANARY}) + "\n"
OWN = json.dumps({"prompt": "Whose is it?", "completion": "Mine."}) + "\n"
SECONDS = 10
MEMORY = 4 << 30

TRAVERSALS = (
    *("../secret.jsonl", "../../outside/secret.jsonl", "./../secret.jsonl", "sub/../../secret.jsonl", "../", "..", ".", ""),
    *("....//secret.jsonl", "..//..//outside//secret.jsonl", "..././secret.jsonl", "sub/./../../secret.jsonl", "/", "//", " "),
    *("../" * 40 + "etc/passwd", "../" * 2000 + "etc/passwd", "/etc/passwd", "//etc/passwd", "/proc/self/environ"),
    *("/proc/self/root/etc/passwd", "/proc/self/fd/0", "/dev/zero", "/dev/stdin", "/dev/random", "/dev/fd/0", "/dev/tty"),
    *("~/secret.jsonl", "~root/secret.jsonl", "~nobody-of-this-name/secret.jsonl", "~", "file:///etc/passwd", "$HOME/x"),
    *("..\\secret.jsonl", "..\\..\\outside\\secret.jsonl", "C:\\Windows\\win.ini", "\\\\host\\share", "C:secret.jsonl"),
    *("．．/secret.jsonl", "‥/secret.jsonl", "..∕secret.jsonl", "..⁄secret.jsonl", "..／secret.jsonl", "․․/secret.jsonl"),
    *("%2e%2e/secret.jsonl", "%2e%2e%2fsecret.jsonl", "..%2fsecret.jsonl", "..%c0%afsecret.jsonl", "%252e%252e%252f"),
    *("\0", "own.jsonl\0../secret.jsonl", "../secret.jsonl\0.jsonl", "../secret.jsonl\n", "a\nb", "\r", "\x1b[31m", "\x7f"),
    *("x" * 300, "x/" * 3000 + "y", "secret.jsonl.", "...", "....", ".. ", " ..", "../secret.jsonl ", "\ud800", "\udcff"),
)  # fmt: skip
LINKS = {
    **{
        "link.jsonl": "../secret.jsonl",
        "absolute.jsonl": "{outside}/secret.jsonl",
        "chain.jsonl": "link.jsonl",
    },
    **{"folder": "..", "far": "{outside}", "loop.jsonl": "loop.jsonl", "ping": "pong", "pong": "ping"},
    **{"null.jsonl": "/dev/null", "zero.jsonl": "/dev/zero", "stdin.jsonl": "/proc/self/fd/0", "root": "/"},
    **{"environ.jsonl": "/proc/self/environ", "gone.jsonl": "{outside}/gone.jsonl"},
}
LINKED = (
    *(*LINKS, "folder/secret.jsonl", "far/secret.jsonl", "far/../secret.jsonl", "root/etc/passwd", "ping/x"),
    *("folder/outside/secret.jsonl", "loop.jsonl/x", "sub/far/secret.jsonl", "pipe.jsonl", "sub/pipe.jsonl"),
)
PAYLOADS = (*TRAVERSALS, *LINKED)


@contextmanager
def soon(seconds: int = SECONDS) -> Iterator[None]:
    """TimeoutError for what hangs, as opening a pipe does, MemoryError for what reads without end."""

    def ring(number: int, frame: object) -> None:
        raise TimeoutError("it hangs")

    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, ring)
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, limits[1]))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, before)


def error_of(act: Callable[[], object]) -> BaseException | None:
    """What it raises, if anything."""
    try:
        with soon():
            act()
    except (Exception, SystemExit) as error:
        return error
    return None


class World:
    """A folder to stay in, ``root``, and all that is around it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root, self.outside = folder, folder / "root", folder / "outside"
        for place in (self.folder, self.outside):
            place.mkdir(exist_ok=True)
            (place / "secret.jsonl").write_text(ROW)
        (self.outside / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": CANARY}))
        self.root.mkdir()

    def plant(self, folder: Path) -> None:
        """The links and pipes that payloads name."""
        (folder / "sub").mkdir()
        (folder / "sub" / "far").symlink_to(self.outside)
        for name, target in LINKS.items():
            (folder / name).symlink_to(target.format(outside=self.outside))
        for name in ("pipe.jsonl", "sub/pipe.jsonl"):
            os.mkfifo(folder / name)

    def around(self) -> dict[str, tuple[int, int, bytes]]:
        """Everything outside of the root: sizes, times and contents."""
        found = {}
        for at, folders, names in os.walk(self.folder):
            folders[:] = [name for name in folders if Path(at, name) != self.root]
            for path in [Path(at), *(Path(at, name) for name in names)]:
                facts, is_file = path.lstat(), path.is_file() and not path.is_symlink()
                if path != self.folder:
                    found[str(path)] = (
                        facts.st_size,
                        facts.st_mtime_ns,
                        path.read_bytes() if is_file else b"",
                    )
        return found


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """A world that must be the same afterwards."""
    made = World(tmp_path / "world")
    before = made.around()
    yield made
    assert made.around() == before


def stays(path: Path, root: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


def holds_canary(folder: Path) -> bool:
    """Whether a file that was written, and is no link, says what is told outside."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return any(CANARY.encode() in path.read_bytes() for path in files)


@pytest.mark.row(17)
def test_a_name_stays_inside_or_is_refused(world: World, tally: Any) -> None:
    world.plant(world.root)
    (world.root / "own.jsonl").write_text(OWN)
    absolute = (
        str(world.root / "own.jsonl"),
        str(world.outside / "secret.jsonl"),
        f"../{world.root.name}-not/x",
    )
    for name in (*PAYLOADS, *absolute):
        try:
            found = inside(world.root, name, "here")
        except UserError as error:
            tally.add(error.problems[0].where == "here" and str(error).isprintable(), ascii(name[:80]))
        else:
            tally.add(stays(found, world.root) and "\0" not in name, ascii(name[:80]))
    assert inside(world.root, "own.jsonl", "here").read_text() == OWN
    assert inside(world.root, "sub/../own.jsonl", "here").read_text() == OWN


@pytest.mark.row(17)
def test_a_list_of_data_sets_reads_no_file_elsewhere(world: World, tally: Any) -> None:
    world.plant(world.root)
    (world.root / "own.jsonl").write_text(OWN)
    for name in PAYLOADS:
        columns = {"prompt": "prompt", "response": "completion"}
        entries = {
            "d": {"file_name": name, "columns": columns},
            "own": {"file_name": "own.jsonl", "columns": columns},
        }
        (world.root / "dataset_info.json").write_text(json.dumps(entries))
        for asked in (f"{world.root}:d", str(world.root)):
            rows: list[object] = []

            def read(asked: str = asked, rows: list[object] = rows) -> None:
                for source in formats.sources([Source(Path(asked))]):
                    rows.extend(formats.read(source))

            error = error_of(read)
            said = " ".join(map(str, [*rows, error]))
            tally.add(error is None or isinstance(error, DataError), f"{name[:80]!a}: {error!r}")
            assert CANARY not in said and "root:" not in said, (name, said)
            assert error is None or said.isprintable(), (name, said)
    (own,) = formats.sources([Source(Path(f"{world.root}:own"))])
    assert isinstance(next(formats.read(own)), Row)


@pytest.fixture
def adapter(world: World) -> Path:
    """A finished artifact of a run, with links and pipes put into it afterwards."""
    folder = world.root / "stages" / "sft" / "adapter"
    with store.artifact(folder, base="nowhere", method="lora", precision="fp32") as partial:
        (partial / "adapter_config.json").write_text("{}")
    world.plant(folder)
    return folder


def manifest_with(folder: Path, /, names: dict[str, str], **facts: Any) -> None:
    """Another manifest, sealed as ours are."""
    own = {k: v for k, v in store.facts(folder).items() if k != "files"}
    store.write_record(folder / store.MANIFEST, {**own, **facts, "files": names})


@pytest.mark.row(17)
def test_an_artifact_with_names_that_lead_out_is_not_trusted_nor_copied(
    world: World, adapter: Path, tally: Any
) -> None:
    good = dict(store.facts(adapter)["files"])
    secret = store.sha256_file(world.outside / "secret.jsonl")
    for name in (*PAYLOADS, str(world.outside / "secret.jsonl")):
        if "\ud800" <= name[:1] <= "\udfff":  # JSON of ours is UTF-8 and cannot hold it
            continue
        manifest_with(adapter, {**good, name: secret})
        out = world.root / "out"
        errors = [
            error_of(act)
            for act in (lambda: store.verify(adapter), lambda: merging.copy(adapter, world.root / "out"))
        ]
        told = all(isinstance(error, TunewrightError) and CANARY not in str(error) for error in errors)
        tally.add(told and not out.exists() and not holds_canary(world.root), f"{name[:80]!a}: {errors}")
    manifest_with(adapter, good, folder="taken")  # a fact of the same name as an argument
    merging.copy(adapter, world.root / "out")
    assert sorted(path.name for path in (world.root / "out").iterdir()) == [
        "adapter_config.json",
        store.MANIFEST,
    ]


@pytest.mark.row(17)
def test_a_run_answers_only_with_what_is_in_its_folder(world: World, adapter: Path, tally: Any) -> None:
    run = world.root
    world.plant(run)
    odd: tuple[Any, ...] = (None, 5, [], {}, [{}], [{"artifact": 5}], [{"artifact": None}], [[]], "x")
    named = [
        [{"artifact": name}]
        for name in (*PAYLOADS, str(world.outside), "../outside", "folder/outside", "far")
    ]
    for stages in (*odd, *named):
        (run / "results.json").write_text(json.dumps({"stages": stages}))
        errors = [error_of(act) for act in (lambda: speaker.load(str(run)), lambda: stays_or_raises(run))]
        ok = isinstance(errors[0], TunewrightError) and (
            errors[1] is None or isinstance(errors[1], TunewrightError)
        )
        tally.add(ok and CANARY not in str(errors), f"{stages!a:.100}: {errors}")
    (run / "results.json").write_text(json.dumps({"stages": [{"artifact": "stages/sft/adapter"}]}))
    assert speaker.artifact_of(str(run)) == adapter


def stays_or_raises(run: Path) -> None:
    found = speaker.artifact_of(str(run))
    assert found and stays(found, run), found


# What users and adapters may point anywhere


def other_tools_adapter(folder: Path, base: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": base, "peft_type": "LORA"})
    )
    return folder


@pytest.mark.row(17)
def test_an_adapter_of_a_base_that_is_none_is_told(world: World, adapter: Path, tally: Any) -> None:
    world.plant(world.root)
    special = [
        str(world.root / name) for name in ("pipe.jsonl", "zero.jsonl", "loop.jsonl", "gone.jsonl", "sub")
    ]
    for base in (*PAYLOADS, *special, None, 5, [], {}, True):
        folder = other_tools_adapter(world.root / "adapter", base)
        error = error_of(lambda folder=folder: speaker.load(str(folder)))
        tally.add(
            isinstance(error, TunewrightError) and CANARY not in str(error), f"theirs {base!a:.80}: {error!r}"
        )
    for facts in (
        {"base": str(world.root / "pipe.jsonl")},
        {"base": 5},
        {"method": "../lora"},
        {"method": []},
        {"precision": "x"},
    ):
        manifest_with(adapter, {}, **facts)
        error = error_of(lambda: speaker.load(str(adapter)))
        tally.add(isinstance(error, TunewrightError), f"ours {facts}: {error!r}")


@pytest.mark.row(17)
def test_pipes_and_devices_in_place_of_a_models_files(
    world: World, tiny_model_folder: Path, tally: Any
) -> None:
    files = [path.name for path in tiny_model_folder.iterdir()]
    for make in (
        os.mkfifo,
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.symlink_to(path),
        os.mkdir,
    ):
        for name in files:
            folder = world.root / "model"
            shutil.copytree(tiny_model_folder, folder)
            (folder / name).unlink()
            make(folder / name)
            error = error_of(lambda folder=folder: speaker.load(str(folder)))
            needed = name in ("config.json", "model.safetensors", "tokenizer.json")
            ok = isinstance(error, TunewrightError) or (error is None and not needed)
            tally.add(ok, f"{name}, {make}: {error!r}")
            shutil.rmtree(folder)
    folder = other_tools_adapter(world.root / "adapter", str(tiny_model_folder))
    for name in ("adapter_model.safetensors", "adapter_model.bin", "tokenizer.json"):
        os.mkfifo(folder / name)
        error = error_of(lambda: speaker.load(str(folder)))
        tally.add(isinstance(error, UserError), f"adapter's {name}: {error!r}")
        (folder / name).unlink()


UNUSABLE = ("\0", "a\0b", "a\nb", "\x1b[2J", "x" * 300, "x/" * 3000, "~nobody-of-this-name/x", "\ud800", "")
SPECIAL = (
    "pipe.jsonl",
    "zero.jsonl",
    "null.jsonl",
    "loop.jsonl",
    "own.jsonl/x",
    "pipe.jsonl/x",
    "zero.jsonl/x",
)


def recipe_with(world: World, model: Path, /, **choice: Any) -> dict[str, Any]:
    """A recipe that is right but for one choice, and would be quick."""
    tree = {"model": str(model), "data": {"train": str(world.root / "own.jsonl"), "valid_share": 0},
            "precision": "fp32", "train": {"max_steps": 1}, "output": str(world.root / "run")}  # fmt: skip
    name, value = next(iter(choice.items()))
    if name in ("train", "template"):
        tree["data"] = {**tree["data"], name: value}  # type: ignore[dict-item]
    elif name == "stage":
        tree["stages"] = [{"name": value}]
    else:
        tree[name] = value
    return tree


@pytest.mark.row(17)
@pytest.mark.parametrize("field", ["output", "train", "model", "template", "stage"])
def test_a_recipes_paths_are_told_before_anything_runs(
    world: World, tiny_model_folder: Path, tally: Any, field: str
) -> None:
    world.plant(world.root)
    (world.root / "own.jsonl").write_text(OWN)
    odd = [str(world.root / name) for name in SPECIAL]
    odd += {"output": ["own.jsonl"], "train": [".", "sub", "run"], "model": [".", "own.jsonl"]}.get(
        field, ["own.jsonl"]
    )
    if field == "output":
        odd[-1] = str(world.root / "own.jsonl")
        odd += ["/proc/self/x", "/dev/null", "/dev/null/x"]
    else:
        odd += ["/dev/zero", "/dev/null", "../x/", "/proc/self/environ"]
    cwd = Path.cwd()
    os.chdir(world.root)
    try:
        for value in (*UNUSABLE[: -1 if field == "stage" else None], *odd):
            tree = recipe_with(world, tiny_model_folder, **{field: value})
            error = error_of(lambda tree=tree: pipeline.run(pipeline.load(tree), quiet=True))
            ok = isinstance(error, UserError) and not (world.root / "run").exists()
            tally.add(ok and str(error).replace("\n", "").isprintable(), f"{value[:60]!a}: {error!r:.300}")
    finally:
        os.chdir(cwd)


@pytest.mark.row(17)
def test_the_command_line_tells_odd_paths(world: World, adapter: Path, tally: Any) -> None:
    world.plant(world.root)
    odd_name = os.fsdecode(b"\xff.jsonl")
    (world.root / odd_name).write_text(OWN)
    (world.root / "empty.csv").touch()
    names = [
        "pipe.jsonl",
        "zero.jsonl",
        "loop.jsonl",
        "x" * 300,
        "a\nb",
        "~nobody-of-this-name/x",
        odd_name,
        "empty.csv",
    ]
    for arguments in (["--json"], []):
        command = [sys.executable, "-m", "tunewright", "lint", *names, *arguments]
        told = subprocess.run(command, cwd=world.root, capture_output=True, timeout=60, check=False)
        output = told.stdout + told.stderr
        ok = told.returncode == 2 and b"Traceback" not in output and CANARY.encode() not in output
        tally.add(ok, f"{arguments}: exit {told.returncode}, {output[-600:].decode()}")
    for out in (
        "/dev/null/x",
        "/dev/zero",
        "a\0b",
        "x" * 300,
        str(world.root / "pipe.jsonl"),
        str(world.root / "loop.jsonl"),
    ):
        error = error_of(lambda out=out: examine.export(str(adapter), merge=False, out=Path(out)))
        tally.add(isinstance(error, UserError), f"--out {out[:40]!a}: {error!r}")


def test_a_damaged_manifest_is_no_mistake_of_the_users(world: World, adapter: Path) -> None:
    manifest_with(adapter, {"../secret.jsonl": "0"})
    with pytest.raises(DamagedError, match="leads out of"):
        store.verify(adapter)
