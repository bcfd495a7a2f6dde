"""One file is one plugin: in the room's own folder, or in a folder of the user's."""

import textwrap
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from tunewright.core import plugins
from tunewright.core.errors import RecipeError
from tunewright.methods import Method
from tunewright.methods.full import Full
from tunewright.methods.lora import Lora
from tunewright.recipes import load

BITFIT = '''
    """Trains the biases only."""

    from pydantic import Field

    from tunewright.core.config import Config as BaseConfig
    from tunewright.methods.full import Full


    class Config(BaseConfig):
        """One option."""

        depth: int = Field(3, ge=1)
        """How deep."""


    class {name}(Full):
        """Marked by its rate."""

        default_lr = 0.125
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of methods that $TUNEWRIGHT_PLUGINS names."""
    monkeypatch.setenv("TUNEWRIGHT_PLUGINS", str(tmp_path))
    (tmp_path / "methods").mkdir()
    return tmp_path / "methods"


def write(path: Path, text: str) -> None:
    path.write_text(textwrap.dedent(text), encoding="utf-8")


def test_the_files_of_a_room_are_its_plugins() -> None:
    assert {"full", "lora", "scratch"} <= set(plugins.names("methods"))
    assert {"pretrain", "sft"} <= set(plugins.names("objectives"))
    assert not any(name.startswith("_") for room in plugins.ROOMS for name in plugins.names(room))


def test_one_file_in_a_folder_is_a_method_that_a_recipe_can_name(folder: Path) -> None:
    write(folder / "bias_only.py", BITFIT.format(name="BiasOnly"))
    assert "bias_only" in plugins.names("methods")
    module = plugins.load("methods", "bias_only")
    assert plugins.summary("methods", "bias_only") == "Trains the biases only."
    assert plugins.implementation(module, Method).default_lr == 0.125
    recipe = load({"model": "builtin:pico", "data": "a.jsonl", "method": "bias_only"})
    assert recipe.stages[0].method == {"name": "bias_only", "depth": 3}


def test_loading_twice_gives_the_same_class(folder: Path) -> None:
    write(folder / "loaded_twice.py", BITFIT.format(name="Twice"))
    assert plugins.load("methods", "loaded_twice") is plugins.load("methods", "loaded_twice")


def test_several_folders_may_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "methods").mkdir(parents=True)
        write(tmp_path / name / "methods" / f"method_{name}.py", BITFIT.format(name=name.title()))
    monkeypatch.setenv("TUNEWRIGHT_PLUGINS", f"{tmp_path / 'one'}:{tmp_path / 'two'}")
    assert {"method_one", "method_two"} <= set(plugins.names("methods"))


def test_listing_imports_nothing(folder: Path) -> None:
    write(folder / "explodes.py", "raise RuntimeError('imported')")
    assert "explodes" in plugins.names("methods")
    with pytest.raises(RuntimeError, match="imported"):
        plugins.load("methods", "explodes")


def test_a_file_that_failed_to_import_fails_again(folder: Path) -> None:
    write(folder / "explodes_again.py", "raise RuntimeError('imported')")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="imported"):
            plugins.load("methods", "explodes_again")


def test_files_with_an_underscore_are_no_plugins(folder: Path) -> None:
    write(folder / "_helper.py", "")
    assert "_helper" not in plugins.names("methods")
    with pytest.raises(RecipeError):
        plugins.load("methods", "_helper")


@pytest.mark.parametrize(
    ("room", "name", "message"),
    [
        ("methods", "lroa", "method.name: no method is called 'lroa'; fix: did you mean 'lora'?"),
        ("objectives", "stf", "objective.name: no objective is called 'stf'; fix: did you mean 'sft'?"),
    ],
)
def test_a_misspelt_name_is_told_the_nearest(room: str, name: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        plugins.load(room, name)
    assert str(caught.value) == message


def test_a_file_with_two_methods_is_refused(folder: Path) -> None:
    write(folder / "pair.py", BITFIT.format(name="One") + "\n\n    class Other(Full):\n        pass\n")
    with pytest.raises(RecipeError) as caught:
        plugins.implementation(plugins.load("methods", "pair"), Method)
    assert (
        str(caught.value)
        == f"{folder / 'pair.py'}: a plugin has exactly one subclass of Method, found One, Other"
    )


def test_a_file_without_a_method_is_refused(folder: Path) -> None:
    write(folder / "bare.py", "from tunewright.methods.full import Config, Full\n")
    with pytest.raises(RecipeError, match="found none"):
        plugins.implementation(plugins.load("methods", "bare"), Method)


def test_a_file_without_a_config_is_refused(folder: Path) -> None:
    write(
        folder / "optionless.py",
        "from tunewright.methods.full import Full\n\nclass Optionless(Full):\n    pass\n",
    )
    with pytest.raises(RecipeError, match="Config"):
        load({"model": "builtin:pico", "data": "a.jsonl", "method": "optionless"})


def test_what_a_file_imports_is_not_its_own() -> None:
    assert plugins.implementation(plugins.load("methods", "scratch"), Method) is not Full
    assert plugins.implementation(plugins.load("methods", "lora"), Method) is Lora


def test_a_package_offers_methods_through_an_entry_point_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "elsewhere-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[tunewright.methods]\nelsewhere = elsewhere_method\n")
    write(tmp_path / "elsewhere_method.py", BITFIT.format(name="Elsewhere"))
    monkeypatch.syspath_prepend(tmp_path)
    assert [point.value for point in entry_points(group="tunewright.methods")] == ["elsewhere_method"]
    assert "elsewhere" in plugins.names("methods")
    assert plugins.implementation(plugins.load("methods", "elsewhere"), Method).__name__ == "Elsewhere"
