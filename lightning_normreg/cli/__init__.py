"""The command line, ``lightning-normreg``: a few subcommands of its own, and LightningCLI's for any model."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import lightning_normreg
from lightning_normreg.cli._meant import did_you_mean
from lightning_normreg.cli._subcommands import COMMANDS, PROGRAM, SUMMARIES, overview

if TYPE_CHECKING:
    from lightning_normreg.cli._normreg_cli import NormRegCLI as NormRegCLI
    from lightning_normreg.cli._schedulers import SchedulerChain as SchedulerChain
    from lightning_normreg.cli._schedulers import SchedulerSequence as SchedulerSequence


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: Arguments without the program's name; by default those of the process.
    """
    words = list(sys.argv[1:] if args is None else args)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does: models are named by class path
    first = words[0] if words else "--help"
    if first in ("-h", "--help"):
        print(overview())
        sys.exit(0)
    elif first == "--version":
        print(_versions())
        sys.exit(0)
    elif first in COMMANDS:
        getattr(import_module(f"{__name__}.{COMMANDS[first]}"), first)(words[1:])
    elif first.startswith("-") or first in SUMMARIES:
        __getattr__("NormRegCLI")(args=words, parser_kwargs={"prog": PROGRAM})
    else:
        meant = did_you_mean(first, SUMMARIES) or "Use one of those above."
        sys.stderr.write(f"{overview()}\n\nerror: {first!r} is no subcommand. {meant}\n")
        sys.exit(2)


def _versions() -> str:
    """The package's, and of what its numbers depend on; read from metadata, which takes no import."""
    installed = [f"Python {platform.python_version()}"]
    for name in ("torch", "pytorch-lightning", "lightning"):
        with suppress(PackageNotFoundError):
            installed.append(f"{name} {version(name)}")
    return f"{PROGRAM} {lightning_normreg.__version__} ({', '.join(installed)})"


def __getattr__(name: str) -> Any:
    homes = {"NormRegCLI": "_normreg_cli", "SchedulerChain": "_schedulers", "SchedulerSequence": "_schedulers"}
    if name not in homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{homes[name]}"), name)
