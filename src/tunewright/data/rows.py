"""What every format becomes: a row is a conversation or a text, and knows where it came from."""

from dataclasses import dataclass
from pathlib import Path

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. ``role`` is one of :data:`ROLES`."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Row:
    """One training example: ``messages`` for a conversation, else ``text``.

    ``where`` is ``file:line`` (1-based, the line on which the row begins). ``tools`` is the JSON text of the
    tool definitions a conversation was given; ``family`` names its kind of task, for scores per family.
    ``prose`` marks a paragraph of running text, which may well stand there twice.
    """

    where: str
    messages: tuple[Message, ...] = ()
    text: str = ""
    tools: str = ""
    family: str = ""
    prose: bool = False


@dataclass(frozen=True, slots=True)
class Source:
    """One file of rows. ``format`` and ``columns`` overrule what would be detected.

    ``columns`` maps our names (prompt, query, response, system, messages, text, family, tools) to the file's
    own; ``tags`` maps role_tag, content_tag, user_tag, assistant_tag, system_tag ... as LLaMA-Factory does.
    ``weight`` is how often the file's rows come up in an epoch: 2 is twice, 0.5 is every second row.
    """

    path: Path
    format: str = "auto"
    columns: tuple[tuple[str, str], ...] = ()
    tags: tuple[tuple[str, str], ...] = ()
    weight: float = 1.0
