"""When two answers say the same: for scores, and for rewards, which must not differ from them."""

import unicodedata


def normalised(text: str) -> str:
    """NFKC, one space for any white space, no space around, no full stop at the end."""
    text = " ".join(unicodedata.normalize("NFKC", text).split())
    return text.rstrip(".。").rstrip()


def exact_match(answer: str, reference: str) -> float:
    """1 if both say the same after :func:`normalised`, else 0."""
    return float(normalised(answer) == normalised(reference))
