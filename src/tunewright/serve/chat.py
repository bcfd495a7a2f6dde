"""A conversation in the terminal."""

from collections.abc import Callable

from tunewright.data.rows import Message
from tunewright.serve.speaker import Speaker

_HELP = "/new forgets the conversation, /quit leaves"


def converse(
    speaker: Speaker,
    ask: Callable[[], str],
    tell: Callable[[str], None],
    system: str = "",
    max_new_tokens: int = 256,
) -> None:
    """Answer what ``ask`` returns until it raises EOFError or says /quit."""
    tell(_HELP)
    opening = (Message("system", system),) if system else ()
    messages = opening
    while True:
        try:
            words = ask().strip()
        except EOFError:
            return
        if words == "/quit":
            return
        if words == "/new":
            messages = opening
        elif words:
            reply = speaker.reply((*messages, Message("user", words)), max_new_tokens)
            messages = (*messages, Message("user", words), Message("assistant", reply))
            tell(reply)
