"""Which items the instruction data and the corpus keep apart."""

import hashlib

HELD_OUT_SHARE = 6  # one item in this many


def is_held_out(key: str) -> bool:
    """True for about one key in six, the same keys forever.

    Keys are ``kind:part:part`` such as ``add:37:45``; they hold no language, so that an entity is
    on the same side in English and in Chinese.
    """
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_SHARE == 0
