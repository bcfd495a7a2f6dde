"""C++ beside this file, for matrix units that PyTorch's own kernels leave idle: built once on a machine, kept for later.

Built by the machine's compiler without PyTorch's headers, in about three seconds; called with plain addresses.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path

from tunewright.core.paths import cache_folder

_UNITS = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "amx_tile", "amx_bf16")
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", "-mfma",
          *(f"-m{unit.replace('avx512_', 'avx512').replace('_', '-')}" for unit in _UNITS))  # fmt: skip
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


@cache
def why_not(name: str) -> str:
    """Why the code of that name cannot be run here; empty if it can. It is built for that."""
    if platform.system() != "Linux" or not cpu_flags().issuperset(_UNITS):
        return "the processor has no bf16 matrix units"
    if compiler() is None:
        return "there is no C++ compiler"
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


@cache
def library(name: str) -> ctypes.CDLL:
    """The built code.

    Raises:
        subprocess.CalledProcessError: the compiler refuses it.
        OSError: it cannot be written or loaded.
    """
    source = Path(__file__).with_name(f"{name}.cpp")
    parts = [path.read_bytes() for path in (source, *sorted(source.parent.glob("*.h")))]
    version = hashlib.sha256(b"".join(parts) + " ".join(_FLAGS + _LIBRARIES).encode()).hexdigest()
    built = cache_folder() / "native" / f"{name}-{version[:16]}.so"
    if not built.exists():
        _build(source, built)
    return ctypes.CDLL(str(built))


def _build(source: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    partial = to.with_suffix(f".{os.getpid()}")  # two processes may build at once; the last one's file stays
    try:
        command = [str(compiler()), *_FLAGS, str(source), "-o", str(partial), *_LIBRARIES]
        subprocess.run(  # noqa: S603 - the compiler that the user has
            command, check=True, capture_output=True, text=True, timeout=_BUILD_SECONDS
        )
        partial.replace(to)
    finally:
        partial.unlink(missing_ok=True)
