"""C++ beside this file, for what PyTorch leaves undone: built once on a machine by its own compiler, kept for later.

Code for bf16 is called with plain addresses and takes about three seconds; code that includes PyTorch's headers is
linked with it, and built anew for another version.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from tunewright.core.paths import cache_folder

_VECTORS = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16")
_UNITS = ("amx_tile", "amx_bf16")
_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-shared", "-fopenmp")
_LIBRARIES = ("-lstdc++", "-lm")
"""Which a C++ compiler adds by itself and a C compiler does not: $CXX may name one."""
_CPU = Path("/proc/cpuinfo")
_BUILD_SECONDS = 120
_DENIED = "the system denies matrix units"
BUILT: set[str] = set()
"""Code that can be run: what :func:`why_not` had nothing against."""


def compiler() -> str | None:
    """Where the C++ compiler is."""
    return shutil.which(os.environ.get("CXX", "g++"))


def cpu_flags() -> set[str]:
    """What the processor can do, in Linux's words; nothing where they are not told."""
    return set(_CPU.read_text().split()) if _CPU.exists() else set()


def has_units() -> bool:
    """Whether the processor has matrix units for bf16."""
    return cpu_flags().issuperset(_UNITS)


@cache
def why_not(name: str) -> str:
    """Why the code of that name cannot be run here; empty if it can. It is built for that."""
    if lacking := _lacking(name):
        return lacking
    try:
        if library(name).allow():
            return _DENIED
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip().splitlines()
        return f"the C++ compiler says: {said[0] if said else error.returncode}"
    except (subprocess.TimeoutExpired, OSError) as error:
        return f"it cannot be built: {error}"
    BUILT.add(name)
    return ""


def _lacking(name: str) -> str:
    if platform.system() != "Linux":
        return "it is for Linux"
    if needed := _source(name).needs() - cpu_flags():
        return f"the processor has no {min(needed)}"
    return "" if compiler() else "there is no C++ compiler"


@cache
def library(name: str) -> ctypes.CDLL:
    """The built code.

    Raises:
        subprocess.CalledProcessError: the compiler refuses it.
        OSError: it cannot be written or loaded.
    """
    source = _source(name)
    built = cache_folder() / "native" / f"{name}-{source.version()[:16]}.so"
    if not built.exists():
        _build(source, built)
    return ctypes.CDLL(str(built))


@dataclass(frozen=True)
class _Source:
    """A file of code; what it includes tells what it needs."""

    path: Path
    text: str

    def needs(self) -> frozenset[str]:
        """What of a processor it is written for."""
        vectors = any(f'"{header}"' in self.text for header in ("_vectors.h", "_squares.h"))
        return frozenset(_VECTORS * vectors + _UNITS * ('"_tiles.h"' in self.text))

    @property
    def needs_torch(self) -> bool:
        """Whether it is linked with PyTorch's core."""
        return "<c10/" in self.text

    def version(self) -> str:
        """Of all that decides what is built."""
        parts = [path.read_bytes() for path in (self.path, *sorted(self.path.parent.glob("*.h")))]
        words = " ".join([torch.__version__ if self.needs_torch else "", *self.flags(), *_LIBRARIES])
        return hashlib.sha256(b"".join(parts) + words.encode()).hexdigest()

    def flags(self) -> tuple[str, ...]:
        """For the compiler."""
        flags: tuple[str, ...] = _FLAGS
        if self.needs():
            used = [*_VECTORS, *(_UNITS if has_units() else ())]
            flags += ("-mfma", *(f"-m{name.replace('avx512_', 'avx512').replace('_', '-')}" for name in used))
        if not self.needs_torch:
            return flags
        where = Path(torch.__file__).parent
        linked = (f"-L{where / 'lib'}", "-lc10", f"-Wl,-rpath,{where / 'lib'}")
        return (*flags, f"-isystem{where / 'include'}", *linked)


def _source(name: str) -> _Source:
    path = Path(__file__).with_name(f"{name}.cpp")
    return _Source(path, path.read_text(encoding="utf-8"))


def _build(source: _Source, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    partial = to.with_suffix(f".{os.getpid()}")  # two processes may build at once; the last one's file stays
    try:
        command = [str(compiler()), str(source.path), "-o", str(partial), *source.flags(), *_LIBRARIES]
        subprocess.run(  # noqa: S603 - the compiler that the user has
            command, check=True, capture_output=True, text=True, timeout=_BUILD_SECONDS
        )
        partial.replace(to)
    finally:
        partial.unlink(missing_ok=True)
