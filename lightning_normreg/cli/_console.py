"""Where tables are printed."""

from __future__ import annotations

from rich.console import Console

WIDTH = 160
"""Columns where the output is no terminal."""


def console() -> Console:
    """The terminal, or a page that is wide enough for every table."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=WIDTH)
