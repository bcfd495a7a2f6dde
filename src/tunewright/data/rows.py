"""What every format becomes: a row is a conversation or a text, and knows where it came from."""

import hashlib
from dataclasses import dataclass, replace
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
    ``prose`` marks a paragraph of running text, which may well stand there twice. ``task`` is what the recipe
    says that its file is for. ``chosen`` and ``rejected`` are a better and a worse answer to the conversation, which
    may end with an answer of its own besides; ``liked`` says whether that was judged good. ``margin`` is how much
    better the chosen one is, where a file says so; ``label`` names the class that the text or conversation is of.
    """

    where: str
    messages: tuple[Message, ...] = ()
    text: str = ""
    tools: str = ""
    family: str = ""
    prose: bool = False
    task: str = ""
    chosen: str = ""
    rejected: str = ""
    liked: bool | None = None
    margin: float = 0.0
    label: str = ""

    @property
    def compares(self) -> bool:
        """Whether there are two answers to choose from."""
        return bool(self.chosen or self.rejected)

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The turns before the last answer."""
        return self.messages[:-1] if self.answered else self.messages

    @property
    def answered(self) -> bool:
        """Whether the conversation ends with an answer of its own."""
        return bool(self.messages) and self.messages[-1].role == "assistant"

    def answering(self, answer: str) -> "Row":
        """A plain conversation: the same question with this answer."""
        turns = (*self.prompt, Message("assistant", answer))
        return replace(self, messages=turns, chosen="", rejected="", liked=None)


@dataclass(frozen=True, slots=True)
class Source:
    """One file of rows. ``format`` and ``columns`` overrule what would be detected.

    ``columns`` maps our names (prompt, query, response, system, messages, text, family, tools) to the file's
    own; ``tags`` maps role_tag, content_tag, user_tag, assistant_tag, system_tag ... as LLaMA-Factory does.
    ``weight`` is how often the file's rows come up in an epoch: 2 is twice, 0.5 is every second row. ``task``
    names what the rows are for, where adapters differ by it.
    """

    path: Path
    format: str = "auto"
    columns: tuple[tuple[str, str], ...] = ()
    tags: tuple[tuple[str, str], ...] = ()
    weight: float = 1.0
    task: str = ""


def task_id(task: str) -> int:
    """A task's number in a batch, 63 bits that follow from its name: no list of tasks needs to be shared.

    0 is that of no task.
    """
    return int.from_bytes(hashlib.sha256(task.encode()).digest()[:8], "little") >> 1 if task else 0
