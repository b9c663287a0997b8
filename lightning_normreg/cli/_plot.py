"""``lightning-normreg plot``."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from lightning_normreg.cli._meant import meant_options
from lightning_normreg.cli._subcommands import PROGRAM, epilog

if TYPE_CHECKING:
    import pandas as pd

SUFFIXES = (".png", ".svg", ".pdf")


class _Parser(argparse.ArgumentParser):
    """Errors as the other subcommands have them."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        meant = meant_options(message, self._option_string_actions)
        self.exit(2, f"error: {message}\n" + (f"  {meant}\n" if meant else ""))


def plot(args: list[str]) -> None:
    """Draw the curves of one run, or of several side by side, on one page."""
    parser = make_parser()
    given = parser.parse_args(args)
    from lightning_normreg._plot import plot_curves, read_runs, shortened  # noqa: PLC0415, its help needs no torch

    output: Path = given.output
    if output.suffix.lower() not in SUFFIXES:
        parser.error(f"--output: must end in {', '.join(SUFFIXES)}, got {str(output)!r}.")
    if not output.parent.is_dir():
        parser.error(f"--output: there is no folder {str(output.parent)!r}. Make it first.")
    try:
        runs = {name: run.reset_index() for path in given.runs for name, run in read_runs(path).items()}
        title = given.title if given.title is not None or len(runs) > 1 else shortened(next(iter(runs)), 80)
        planned, said = _beside(given.plan, runs)
        figure = plot_curves(runs, layers=given.layers, title=title, plan=planned)
        figure.savefig(output)
    except (ValueError, ModuleNotFoundError, OSError) as error:
        keys = {f"`{key}`": f"--{key}" for key in ("layers", "plan")}
        key = "--output" if isinstance(error, OSError) else "RUN"
        parser.error(f"{next((k for word, k in keys.items() if word in str(error)), key)}: {error}")
    print("\n".join([f"{output}: {', '.join(runs)}", *said]))


def _beside(path: Path | None, runs: Mapping[str, pd.DataFrame]) -> tuple[pd.DataFrame | None, list[str]]:
    """What was planned, and where each run parts from it."""
    if path is None:
        return None, []
    from lightning_normreg._reports import Comparison, Plan  # noqa: PLC0415, as above

    try:
        plan = Plan.load(path)
    except OSError as error:
        raise ValueError(f"`plan`: there is no file {str(path)!r}.") from error
    said = []
    for name, run in runs.items():
        compared = Comparison(plan)
        for row in run.to_dict("records"):
            for unit in plan.units:
                values = [row.get(f"{key}/{unit}", math.nan) for key in ("rotation", "unit_norm_rms", "effective_lr")]
                compared.add(row["step"], unit, *values)
        said += [f"{name}: {words}" if len(runs) > 1 else words for words in compared.sentences()]
    return plan.to_frame(), said


def make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=f"{PROGRAM} plot",
        description="Draw effective learning rates, norms and rotations of all layers over the steps, coloured\n"
        "by depth, with what decay settles at; for deep models also heat maps. One run fills the page,\n"
        "several stand side by side.",
        epilog=epilog("plot"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN",
        help="folder of a TensorBoardLogger or CSVLogger, or of several such folders; or a file of theirs",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, default=Path("curves.png"), metavar="FILE", help="png, svg or pdf (default: curves.png)"
    )
    parser.add_argument(
        "--layers", action="append", metavar="GLOB", help="only layers whose names match; may be given several times"
    )
    parser.add_argument("--plan", type=Path, metavar="FILE", help="of plan --save: drawn beside, with where they part")
    parser.add_argument("--title", help="of the page; by default the name of the run")
    return parser
