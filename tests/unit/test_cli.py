"""What every verb of the command line does, whatever it is for."""

import subprocess
import sys

_RING = """
import os

from tunewright import cli

class Ring:
    def __init__(self):
        self.own = self

    def __del__(self, write=os.write):  # by then names and streams are gone
        write(1, b"garbage")

ring = Ring()
cli.main()
"""


def test_a_process_that_ends_is_not_searched_for_garbage() -> None:
    """It took a second of every command."""
    command = [sys.executable, "-c", _RING, "list", "models"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "builtin:pico" in said
    assert "garbage" not in said
