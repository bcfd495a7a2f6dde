"""The tables of the results' page."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks import targets
from benchmarks.wording import SYSTEMS, WORDS

Tree = dict[str, Any]
_GB = 1e9
_UNITS = {"peak_memory": " GB", "seconds": " s", "first_step": " s", "time_to_loss": " s"}


def of_targets(language: str, results: Tree, plan: Tree, meant: bool) -> str:
    """What was asked and what was reached. If this is the machine that targets are meant for, all of them, with the reasons
    that workloads give for what falls short; else those of the workloads that were run.
    """
    words = WORDS[language]
    lines, notes = [words["targets_head"]], []
    for target in targets.judged(plan, results):
        if not meant and target["workload"] not in results["workloads"]:
            continue
        aim, reached, met = _aim(language, target), words["unmeasured"], ""
        if target["met"] is not None:
            reached, met = _number(target, target["reached"]), words["yes" if target["met"] else "no"]
        lines.append(f"| {target['workload']} | {aim} | {_bound(target)} | {reached} | {met} |")
        note = target.get("note", {}).get(language)
        if meant and note and target["met"] is False:
            notes.append(f"- {target['workload']}, {aim}: {note}")
    return "\n".join([*lines, *(["", *notes] if notes else [])])


def _aim(language: str, target: Tree) -> str:
    words, case = WORDS[language], target.get("case")
    what = words["what"][target["what"]] + (f" ({case})" if case else "")
    others = [SYSTEMS[language][target["against"]]] if "against" in target else []
    others += [f"`{target['against_case']}`"] if "against_case" in target else []
    kind = "off_by" if "within" in target else "against"
    return str(words[kind].format(what=what, other=", ".join(others))) if others else what


def _bound(target: Tree) -> str:
    if "within" in target:
        return f"≤ {target['within']:.0%}"
    sign, bound = ("≥", target["at_least"]) if "at_least" in target else ("≤", target["at_most"])
    return f"{sign} {_number(target, bound)}"


def _number(target: Tree, value: float) -> str:
    if "within" in target:
        return f"{value:.2%}"
    if target["what"] == "utilisation":
        return f"{value:.0%}"
    return f"{value:.1f} s" if target["what"] == "first_step" else f"{value:.2f}x"


def of_workload(language: str, about: Tree, cases: Tree) -> Iterator[str]:
    """What its rows are, then a line for each system and case."""
    words = WORDS[language]
    found = [(case, system, one) for case, systems in cases.items() for system, one in systems.items()]
    if list(cases) == [""]:
        facts = {**found[0][2]["facts"], "epochs": about["epochs"], "lr": about["lr"]}
        yield words["rows"].format(**facts)
    goals = {one["figures"]["goal"]["median"] for _, _, one in found if "goal" in one["figures"]}
    if goals:
        yield words["goal"].format(goal=max(goals))
    columns = [key for key in words["columns"] if any(key in one["figures"] for _, _, one in found)]
    yield _table(language, columns, found)


def commits(cases: Tree) -> dict[str, str]:
    """What was run at each commit, the last first."""
    found: dict[str, Counter[str]] = {}
    days: dict[str, str] = {}
    for systems in cases.values():
        for system, one in systems.items():
            for commit, at in one["measured"].items():
                found.setdefault(commit, Counter())[system] += at["runs"]
                days[commit] = max(at["when"], days.get(commit, ""))
    newest = sorted(found, key=lambda commit: days[commit], reverse=True)
    return {commit: f"{commit} ({days[commit]}) {_counted(found[commit])}" for commit in newest}


def _counted(runs: Counter[str]) -> str:
    return ", ".join(f"{system} ×{count}" for system, count in runs.items())


def _table(language: str, columns: Sequence[str], found: Sequence[tuple[str, str, Tree]]) -> str:
    words = WORDS[language]
    by_case = [words["case"]] if any(case for case, _, _ in found) else []
    heads = [*by_case, words["system"], words["runs"]]
    rule = "|" + "---|" * len(heads) + "---:|" * len(columns)
    lines = [f"| {' | '.join([*heads, *(words['columns'][key] for key in columns)])} |", rule]
    for case, system, one in found:
        cells = [*([case] if by_case else []), SYSTEMS[language][system], str(one["runs"])]
        lines.append(f"| {' | '.join([*cells, *_cells(words, columns, one)])} |")
    return "\n".join(lines)


def _cells(words: Tree, columns: Sequence[str], one: Tree) -> list[str]:
    if one["runs"]:
        return [_cell(key, one["figures"].get(key, {})) for key in columns]
    why = one["failed"][-1].replace("|", "\\|") if one["failed"] else ""
    return [words["failed"].format(why=why), *[""] * (len(columns) - 1)]


def _cell(key: str, found: dict[str, float]) -> str:
    if not found:
        return ""
    middle, low, high = (_shown(key, found[name]) for name in ("median", "low", "high"))
    unit = _UNITS.get(key, "")
    return f"{middle}{unit}" if low == high else f"{middle}{unit} ({low}–{high})"


def _shown(key: str, value: float) -> str:
    if key == "peak_memory":
        return f"{value / _GB:.2f}"
    if key == "held_out_loss":
        return f"{value:.4f}"
    if key == "utilisation":
        return f"{value:.1%}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def of_settings(language: str, results: Tree) -> str:
    """Every variant's settings and libraries; workloads and processors with the same ones share a line."""
    named: dict[tuple[str, str, str], dict[str, list[str]]] = {}
    for place, device in results.items():
        for workload, system, one in _each(device):
            libraries = ", ".join(f"{name} {version}" for name, version in one["versions"].items())
            where = named.setdefault((system, json.dumps(one["settings"]), libraries), {})
            listed = where.setdefault(place.split()[-1], [])
            listed += [workload] if workload not in listed else []
    order = list(SYSTEMS[language])
    lines = [
        f"| {SYSTEMS[language][system]} | {_where(where)} | `{told}` | {libraries} |"
        for (system, told, libraries), where in sorted(
            named.items(), key=lambda item: order.index(item[0][0])
        )
    ]
    return "\n".join([WORDS[language]["settings_head"], *lines])


def _where(workloads: dict[str, list[str]]) -> str:
    return "; ".join(f"{place}: {', '.join(listed)}" for place, listed in workloads.items())


def _each(device: Tree) -> Iterator[tuple[str, str, Tree]]:
    for workload, cases in device["workloads"].items():
        for systems in cases.values():
            for system, one in systems.items():
                yield workload, system, one
