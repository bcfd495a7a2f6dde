"""What torch.compile tries at every start, kept after the first.

To tell which vectors the compiler and PyTorch have in common it builds a library for each, keeps those, and yet has each
loaded by a process of its own, every time: one second, and more on a processor with matrix units. A library's name is
made of its code, its flags and the versions of compiler and PyTorch, so what was found of it stays true.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

_LOADS = ".loads"


def keep() -> None:
    """From now on a library that was loaded once is not tried again; where PyTorch does it in other ways, as they are."""
    from torch._inductor.cpu_vec_isa import VecISA

    tried = getattr(VecISA, "_probe_load", None)
    if tried is None or hasattr(tried, "kept"):
        return

    def loads(vectors: Any, library: str) -> bool:
        found = Path(library + _LOADS)
        if not found.exists():
            if not tried(vectors, library):
                return False
            with suppress(OSError):  # what cannot be put down is tried again
                found.touch()
        return True

    loads.kept = True  # type: ignore[attr-defined]
    setattr(VecISA, "_probe_load", loads)  # noqa: B010 - a method is exchanged
