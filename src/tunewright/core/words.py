"""Text for people, in both of the program's languages."""

from typing import NamedTuple


class Words(NamedTuple):
    """One thing said in English and in Chinese."""

    en: str
    zh: str
