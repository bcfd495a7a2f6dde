"""README.md and README.zh-CN.md: their commands run and say the same. Those of the demo run where they are timed."""

import re
import subprocess

import pytest
import yaml
from readme import ROOT, blocks, commands, targets, typed

from tunewright import recipes

PAGES = ("README.md", "README.zh-CN.md")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """After every command of the README but the demo's, in order."""
    made = tmp_path_factory.mktemp("readme")
    typed(commands(of_the_demo=False), made)
    return made


def test_both_languages_have_the_same_commands():
    english, chinese = ([blocks(page, lang) for lang in ("bash", "python", "yaml")] for page in PAGES)
    assert english == chinese
    assert all(english)


def test_make_targets_exist():
    named = set().union(*(targets(b) for b in blocks("README.md", "bash")))
    assert {"demo", "test"} <= named
    for target in sorted(named):
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.xdist_group("readme")
def test_the_python_of_the_readme_runs(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for block in blocks("README.md", "python"):
        exec(compile(block, "README.md", "exec"), {})


@pytest.mark.xdist_group("readme")
def test_the_yaml_of_the_readme_is_a_recipe(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for block in blocks("README.md", "yaml"):
        recipes.load(yaml.safe_load(block))


def test_pictures_and_links_exist():
    for page in PAGES:
        links = re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text(encoding="utf-8"))
        assert links
        assert all((ROOT / link).exists() for link in links if "://" not in link)
