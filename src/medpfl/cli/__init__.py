"""The command line interface."""

from medpfl.cli.app import main

__all__ = ["main"]
