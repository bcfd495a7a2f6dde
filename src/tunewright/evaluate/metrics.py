"""Scores of one answer against its reference."""

import re
from collections import Counter

_CJK = r"[\u3400-\u9fff\uf900-\ufaff]"
_WORD = re.compile(rf"{_CJK}|(?:(?!{_CJK})[^\W_])+", re.UNICODE)


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall over words, as in SQuAD (Rajpurkar et al. 2016); a Chinese
    character counts as a word.
    """
    said, meant = (Counter(_WORD.findall(t.lower())) for t in (answer, reference))
    if not said or not meant:
        return float(said == meant)
    common = sum((said & meant).values())
    return 2.0 * common / (said.total() + meant.total())
