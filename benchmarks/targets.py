"""The targets that ours is held to, and how each is judged."""

from typing import Any

Tree = dict[str, Any]
OURS = "tunewright"


def judged(plan: Tree, results: Tree) -> list[Tree]:
    """Every target of the workloads with what was ``reached`` (a ratio, or the figure itself) and whether it is ``met``.

    A ratio is ours to the other's; of times to a loss it is how many times sooner ours was. Both are None where
    something was not measured.
    """
    return [
        {"workload": name, **target, **_judged(target, results["workloads"].get(name, {}))}
        for name, workload in plan["workloads"].items()
        for target in workload.get("targets", ())
    ]


def _judged(target: Tree, cases: Tree) -> Tree:
    what, case = target["what"], target.get("case", "")
    own = _median(cases, case, OURS, what)
    other_case, other_system = target.get("against_case") or case, target.get("against", OURS)
    other = _median(cases, other_case, other_system, what)
    if own is None or other is None:
        return {"reached": None, "met": None}
    if "against" not in target and "against_case" not in target:
        other = 1.0
    reached = other / own if what == "time_to_loss" else own / other
    if "within" in target:
        return {"reached": abs(reached - 1), "met": abs(reached - 1) <= target["within"]}
    met = reached >= target["at_least"] if "at_least" in target else reached <= target["at_most"]
    return {"reached": reached, "met": met}


def _median(cases: Tree, case: str, system: str, what: str) -> float | None:
    found: Tree = cases.get(case, {}).get(system, {}).get("figures", {}).get(what, {})
    median: float | None = found.get("median")
    return median
