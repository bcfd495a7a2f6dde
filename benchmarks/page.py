"""docs/benchmarks.md and its Chinese twin, from results.json and the workloads' own words."""

import json
from pathlib import Path
from typing import Any

from benchmarks import tables
from benchmarks.plan import HERE
from benchmarks.wording import WORDS

Tree = dict[str, Any]
RESULTS = HERE / "results.json"
DOCS = HERE.parent / "docs"
PAGES = {"en": "benchmarks.md", "zh": "benchmarks.zh-CN.md"}
_TERA = 1e12
_ORDER = ("cpu amx_bf16", "cpu avx512_bf16", "cpu", "gpu")
"""Of places. The first is what targets are set for, and what the reasons are of where one is missed."""


def load(path: Path = RESULTS) -> Tree:
    """Results by :func:`figures.place`; none if nothing was measured yet."""
    found: Tree = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def write(results: Tree, plan: Tree, at: Path = HERE, docs: Path = DOCS) -> None:
    """Results, if there are any, and both pages."""
    if results:
        told = json.dumps(results, indent=1, ensure_ascii=False)
        (at / RESULTS.name).write_text(told + "\n", encoding="utf-8")
    for language, name in PAGES.items():
        (docs / name).write_text(text(language, results, plan), encoding="utf-8")


def text(language: str, results: Tree, plan: Tree) -> str:
    """The page in one language."""
    words, places = WORDS[language], [place for place in _ORDER if place in results]
    caches = next((results[place]["caches"] for place in places), "cold")
    parts = [words["title"], words["intro"], words["how"].format(caches=words["caches"][caches])]
    for place in places:
        parts += _place(language, place, results[place], plan)
    if results:
        parts += [words["utilisation"], words["settings"], tables.of_settings(language, results)]
    else:
        parts.append(words["none"])
    return "\n\n".join(parts) + "\n"


def _place(language: str, place: str, results: Tree, plan: Tree) -> list[str]:
    words, machine = WORDS[language], results["machine"]
    device, _, kind = place.partition(" ")
    told = {
        **machine, "memory": f"{machine['memory'] / 2**30:.0f} GB", "commit": results["commit"],
        "when": results["when"], "extensions": "".join(f", {name}" for name in machine["extensions"]),
    }  # fmt: skip
    parts = [
        words[device].format(threads=machine["threads"], kind=kind or words["no_bf16"], name=results["gpu"]),
        words["machine"].format(**told),
    ]
    if results["rates"]["square"]:
        rates = {key: f"{value['median'] / _TERA:.2f} TFLOP/s" for key, value in results["rates"].items()}
        parts.append(words["rates"].format(**rates))
    if device == "cpu":
        meant = place == _ORDER[0]
        parts += [words["targets"], tables.of_targets(language, results, plan, meant)]
        parts += [] if meant else [words["elsewhere"]]
    for name, cases in results["workloads"].items():
        about = plan["workloads"][name]
        parts += [f"### {name}: {about['title'][language]}", *tables.of_workload(language, about, cases)]
        commits = tables.commits(cases)
        if list(commits) != [results["commit"]]:
            parts.append(words["commits"].format(told="; ".join(commits.values())))
    return parts
