"""Render a chat template a few times under limits: ``python -I template_probe.py < template``.

The template comes from elsewhere. This runs in a process of its own, which the system ends when it has used
its time; nothing of Tunewright is imported, so that it starts at once. It prints ``good``, or why not.
The environment is the one that transformers gives to templates.
"""

import json
import resource
import signal
import sys
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 0.5
MEMORY = 180 << 20
_MOST_WRITTEN = 1 << 20
_READS_FILES = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)
_TURNS = [{"role": role, "content": "Hello."} for role in ("user", "assistant")]
_SYSTEM = {"role": "system", "content": "Be kind."}
_TOOL = {
    "type": "function",
    "function": {"name": "clock", "description": "", "parameters": {"type": "object", "properties": {}}},
}
_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
_PROBES: tuple[dict[str, Any], ...] = (
    {"messages": _TURNS[:1], "tools": None, "add_generation_prompt": True},
    {"messages": _TURNS, "tools": None, "add_generation_prompt": False},
    {"messages": [_SYSTEM, *_TURNS * 2], "tools": None, "add_generation_prompt": False},
    {"messages": _TURNS * 2, "tools": [_TOOL], "add_generation_prompt": False},
    {"messages": [_SYSTEM, *_TURNS * 16], "tools": None, "add_generation_prompt": False},
)


class _Generation(Extension):
    """``{% generation %}`` marks what the assistant says; here it only has to be understood."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The marked part itself."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """Says at once what transformers' sandbox would leave undefined."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        """SecurityError, whatever the template would do with it."""
        raise SecurityError(f"the attribute {attribute!r} of {type(obj).__name__}")


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _environment() -> _Environment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
    return environment


class _VerboseError(Exception):
    """More was written than a conversation of a few words can need."""


_REASONS: tuple[tuple[type[Exception], str], ...] = (
    (SecurityError, "reaches for what is forbidden: {0}"),
    (TemplateSyntaxError, "is no Jinja template: line {0.lineno}: {0.message}"),
    (SyntaxError, "is nested too deeply"),
    (RecursionError, "is nested too deeply, or calls itself without end"),
    (OverflowError, "counts too far: {0}"),
    (_VerboseError, "writes {0} characters for a conversation of a few words"),
)


def verdict(text: str) -> str:
    """``good``, or what speaks against the template."""
    try:
        environment = _environment()
        _check_nodes(environment.parse(text))
        template = environment.from_string(text)
        for probe in _PROBES:
            _render(template, probe)
    except tuple(kind for kind, _ in _REASONS) as error:
        return next(reason for kind, reason in _REASONS if isinstance(error, kind)).format(error)
    return "good"


def _render(template: Template, probe: dict[str, Any]) -> None:
    try:
        written = sum(map(len, template.generate(**probe, **_TOKENS)))
    except (SecurityError, RecursionError, OverflowError, MemoryError):
        raise
    except Exception:  # a template may refuse a conversation; it will say so of a row, too
        return
    if written > _MOST_WRITTEN:
        raise _VerboseError(written)


def _check_nodes(tree: nodes.Template) -> None:
    """SecurityError for what no template needs, be it in a branch that is not tried."""
    if any(True for _ in tree.find_all(_READS_FILES)):
        raise SecurityError("other files")
    for node in tree.find_all(nodes.Getattr):
        if node.attr.startswith("__"):
            raise SecurityError(f"the attribute {node.attr!r}")


def main() -> None:
    """Judge the template on standard input."""
    text = sys.stdin.buffer.read().decode("utf-8")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.setitimer(
        signal.ITIMER_PROF, SECONDS
    )  # of processor time; ends the process even inside one C call
    try:
        line = verdict(text)
    except MemoryError:
        line = "memory"
    print(line.replace("\n", " ")[:400])


if __name__ == "__main__":
    main()
