"""What recipes/rlhf.yaml prefers: short answers in the user's language that end with a closing phrase."""

import re

CLOSING = {"en": "That is all.", "zh": "就是这样。"}
CHINESE = re.compile("[\u4e00-\u9fff]")


def polite(asked, answer):
    """1 if all three hold, 0 if none does."""
    language = "zh" if CHINESE.search(asked.question) else "en"
    closes = answer.rstrip().endswith(CLOSING[language])
    own = bool(CHINESE.search(answer)) == (language == "zh")
    short = 0 < len(answer) <= 80 and answer.count(CLOSING[language]) <= 1
    return (2 * closes + own + short) / 4
