"""The list of subcommands. One more is a file with a function that takes the arguments, and a line here."""

from __future__ import annotations

from collections.abc import Callable

from lightning_normreg.cli._convert import convert
from lightning_normreg.cli._demo import demo
from lightning_normreg.cli._examples import PROGRAM, SUMMARIES
from lightning_normreg.cli._inspect import inspect
from lightning_normreg.cli._plot import plot

COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "demo": demo,
    "inspect": inspect,
    "plot": plot,
    "convert": convert,
}
"""Subcommands by name; the first line of a function's docstring is its help."""


def overview() -> str:
    """What ``lightning-normreg --help`` shows."""
    summaries = SUMMARIES | {name: (command.__doc__ or "").splitlines()[0] for name, command in COMMANDS.items()}
    lines = [f"  {name:<10}{summary}" for name, summary in summaries.items()]
    return "\n".join(
        [
            f"usage: {PROGRAM} SUBCOMMAND [options]",
            "",
            "See and control what weight decay does to normalized networks.",
            "",
            "subcommands:",
            *lines,
            "",
            f"Each has a --help with examples. For a first run on embedded data: {PROGRAM} demo",
        ]
    )
