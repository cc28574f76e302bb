"""The command line: `spectrim`. Thin: it reads arguments, shows progress, and calls the library."""

from spectrim.cli.app import main

__all__ = ["main"]
