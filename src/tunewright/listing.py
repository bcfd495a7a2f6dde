"""What there is of a kind, with a line on each. Only methods are loaded for it, since what they cost is computed."""

from typing import Any

from tunewright.core import plugins

Tree = dict[str, Any]


def listed(what: str) -> list[Tree]:
    """Names with a line on each."""
    if what == "methods":
        from tunewright import catalogue

        return catalogue.method_rows()
    if what in plugins.ROOMS:
        rows = [(name, plugins.summary(what, name)) for name in plugins.names(what)]
    elif what == "models":
        from tunewright.models.load import BUILTIN

        rows = [(f"builtin:{name}", str(folder)) for name, folder in BUILTIN.items()]
    elif what == "data":
        from tunewright.data import builtin

        rows = [(f"builtin:{name}", "") for name in builtin.SOURCES]
    else:
        from tunewright.data.template import template_names

        rows = [(name, "") for name in ["auto", *template_names()]]
    return [{"name": name, "summary": summary} for name, summary in rows]


def lines(rows: list[Tree]) -> list[str]:
    """For people, all but methods."""
    width = max(len(row["name"]) for row in rows)
    return [f"{row['name']:<{width}}  {row['summary']}".rstrip() for row in rows]
