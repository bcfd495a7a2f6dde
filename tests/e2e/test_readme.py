"""README.md and README.zh-CN.md: their commands run, say the same, and the demo gains what they promise."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tunewright import cli, demo

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "README.zh-CN.md")


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def targets(text: str) -> set[str]:
    return set(re.findall(r"^\s*make ([\w-]+)", text, re.MULTILINE))


@pytest.fixture(scope="session")
def ran(tmp_path_factory):
    """Every command of the README, in order, in a fresh folder with the shipped recipes."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    script = "\n".join(b for b in blocks("README.md", "bash") if not targets(b))
    done = subprocess.run(
        ["bash", "-eu", "-c", script], cwd=folder, env={**os.environ, "PATH": path},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder, done.stdout


def test_both_languages_have_the_same_commands():
    english, chinese = ([blocks(page, lang) for lang in ("bash", "python", "yaml")] for page in PAGES)
    assert english == chinese
    assert all(english)


def test_make_targets_exist():
    named = set().union(*(targets(b) for b in blocks("README.md", "bash")))
    assert {"demo", "test"} <= named
    for target in sorted(named):
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


def test_the_demo_gains_sixty_points_in_ninety_seconds(ran):
    folder, out = ran
    stage = json.loads((folder / "runs/demo/results.json").read_text())["stages"][0]
    assert stage["after"]["exact_match"] - stage["before"]["exact_match"] >= 0.60
    assert stage["after"]["loss"] < stage["before"]["loss"]
    assert stage["data"]["train"]["samples"] >= 2000
    assert stage["after"]["count"] >= 300
    assert len(stage["after"]["families"]) == 10
    seconds = float(re.search(r"; (\d+) s in all", out)[1])
    assert seconds < 90
    page = (folder / "runs/demo/report.html").read_text()
    assert "<svg" in page
    assert "Samples side by side" in page


def test_the_python_of_the_readme_runs(ran, monkeypatch):
    folder, _ = ran
    monkeypatch.chdir(folder)
    for block in blocks("README.md", "python"):
        exec(compile(block, "README.md", "exec"), {})


def test_the_yaml_of_the_readme_is_a_recipe(ran, monkeypatch):
    import yaml

    from tunewright import recipes

    monkeypatch.chdir(ran[0])
    for block in blocks("README.md", "yaml"):
        recipes.load(yaml.safe_load(block))


def test_pictures_and_links_exist():
    for page in PAGES:
        links = re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text(encoding="utf-8"))
        assert links
        assert all((ROOT / link).exists() for link in links if "://" not in link)


def test_the_demo_is_the_shipped_recipe():
    from tunewright import recipes

    shipped = recipes.load(ROOT / "recipes/lora.yaml", {"output": "x"})
    assert recipes.load({**demo.RECIPE, "output": "x"}) == shipped


def test_demo_json(tmp_path, tiny_model_folder, monkeypatch, capsys):
    monkeypatch.setattr(
        demo, "RECIPE",
        {**demo.RECIPE, "model": str(tiny_model_folder), "train": {"max_steps": 2, "tokens_per_batch": 256},
         "evaluate": {"limit": 20, "max_new_tokens": 2}},
    )  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["tunewright", "demo", "--output", str(tmp_path / "d"), "--json"])
    with pytest.raises(SystemExit):
        cli.main()
    result = json.loads(capsys.readouterr().out)
    assert result.keys() == {"before", "after", "seconds", "report"}
    assert Path(result["report"]).is_file()
    monkeypatch.setattr(sys, "argv", ["tunewright", "demo", "--output", str(tmp_path / "d")])
    with pytest.raises(SystemExit):
        cli.main()
    said = capsys.readouterr().out
    assert "Report:" in said
    assert said.count("    tunewright ") == 3


def test_help_answers_in_under_a_third_of_a_second():
    import time

    def once() -> float:
        began = time.monotonic()
        subprocess.run(
            [Path(sys.executable).parent / "tunewright", "--help"], check=True, capture_output=True
        )
        return time.monotonic() - began

    assert min(once() for _ in range(3)) < 0.3
