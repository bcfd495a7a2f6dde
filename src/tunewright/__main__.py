"""``python -m tunewright``."""

from tunewright.cli import main

main()
