"""The operations by which the store changes a disk. They are few and in one place, so that tests can record
them, replay any part of them, and let any one of them fail.
"""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path


class Disk:
    """The real disk. Every method may raise OSError."""

    def make_folder(self, path: Path) -> None:
        """Make the folder and those above it."""
        path.mkdir(parents=True, exist_ok=True)

    def write(self, path: Path, pieces: Iterable[bytes]) -> None:
        """Write a new file and flush it."""
        with path.open("wb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())

    def append(self, path: Path, data: bytes) -> None:
        """Add to a file's end, in one call to the system where it takes all."""
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            while data:
                data = data[os.write(handle, data) :]
        finally:
            os.close(handle)

    def settle(self, path: Path) -> None:
        """Flush a file that someone else wrote, or a folder's list of names."""
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def rename(self, path: Path, target: Path) -> None:
        """Rename; a file of the target's name is replaced."""
        path.replace(target)

    def remove(self, path: Path) -> None:
        """Remove a file, if it is there."""
        path.unlink(missing_ok=True)

    def remove_folder(self, path: Path) -> None:
        """Remove a folder with all it holds, if it is there."""
        if path.exists():
            shutil.rmtree(path)
