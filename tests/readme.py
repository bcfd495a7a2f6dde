"""The pages' code blocks, and their commands as a reader types them."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def blocks(page: str, language: str) -> list[str]:
    """The code of a language in a page, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def targets(text: str) -> set[str]:
    """What ``make`` is to make."""
    return set(re.findall(r"^\s*make ([\w-]+)", text, re.MULTILINE))


def commands(*, of_the_demo: bool) -> list[str]:
    """The README's commands: the demo with what looks at its run, or all others; none needs the other ones."""
    shell = [block for block in blocks("README.md", "bash") if not targets(block)]
    return [
        block
        for block in shell
        if bool(re.search(r"\bdemo$|\bruns/demo\b", block, re.MULTILINE)) == of_the_demo
    ]


def typed(commands: list[str], folder: Path) -> str:
    """What the commands print, one after the other in a folder that has the shipped recipes."""
    (folder / "recipes").symlink_to(ROOT / "recipes")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-eu", "-c", "\n".join(commands)], cwd=folder, env={**os.environ, "PATH": path},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout
