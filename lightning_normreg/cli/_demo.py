"""``lightning-normreg demo``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from lightning_normreg import _metrics
from lightning_normreg._compat import optional_import, pl
from lightning_normreg._plot import plot_curves
from lightning_normreg.callbacks._monitor import Monitor
from lightning_normreg.callbacks._run import callbacks_of
from lightning_normreg.cli._normreg_cli import NormRegCLI
from lightning_normreg.cli._subcommands import PROGRAM, epilog
from lightning_normreg.demos import DemoConvNet, DigitsDataModule

if TYPE_CHECKING:
    import pandas as pd

SHOWN = {
    "unit norm": _metrics.UNIT_NORM_RMS,
    "effective learning rate": _metrics.EFFECTIVE_LR,
    "rotation per step": _metrics.ROTATION,
}
LABEL_NOISE = 0.2
"""Share of labels that are redrawn: else the digits are learned by heart, gradients vanish, and decay alone goes on."""
TRAINER = {"max_epochs": 20, "log_every_n_steps": 5, "accelerator": "cpu", "enable_model_summary": False}


def demo(args: list[str]) -> None:
    """Train the demo network on digits, some of them mislabelled, and show what happened to its layers."""
    for module in ("sklearn", "matplotlib", "pandas"):
        optional_import(module, "demo")
    cli = NormRegCLI(
        DemoConvNet,
        DigitsDataModule,
        args=[f"--data.label_noise={LABEL_NOISE}", *args],
        run=False,
        seed_everything_default=0,
        trainer_defaults=TRAINER,
        parser_kwargs={
            "prog": f"{PROGRAM} demo",
            "description": "Train a small BatchNorm network on digits.",
            "epilog": epilog("demo"),
        },
    )
    with cli.explained_errors():
        cli.trainer.fit(cli.model, cli.datamodule)
    if cli.trainer.is_global_zero:
        _report(cli.trainer)


def _report(trainer: pl.Trainer) -> None:
    """Print the table, save the picture, say how to look at the curves."""
    console = Console()
    frames = [callback.history() for callback in callbacks_of(trainer) if isinstance(callback, Monitor)]
    if len(frames) < 2 or any(frame.empty for frame in frames) or trainer.log_dir is None:
        console.print("Nothing to show: a monitor or the logger was taken away, or no update was logged.")
        return
    history = frames[0].merge(frames[1], on=["step", "epoch"], how="outer")
    console.print(_first_and_last_table(history))
    directory = Path(trainer.log_dir)
    plot_curves(history).savefig(directory / "curves.png")
    console.print(f"Picture of the curves:  {directory / 'curves.png'}", soft_wrap=True)
    console.print(f"All curves, live:       tensorboard --logdir {directory}", soft_wrap=True)


def _first_and_last_table(history: pd.DataFrame) -> Table:
    """Per layer the first and the last value of each curve."""
    table = Table(title="What the run did to each layer, first → last logged step")
    table.add_column("layer")
    for title in SHOWN:
        table.add_column(title, justify="right")
    start = _metrics.tag(_metrics.UNIT_NORM_RMS, "")
    for column in history.columns[history.columns.str.startswith(start)]:
        layer = column.removeprefix(start)
        curves = [history.get(_metrics.tag(curve, layer)) for curve in SHOWN.values()]
        values = [None if curve is None else curve.dropna().iloc[[0, -1]] for curve in curves]
        table.add_row(layer, *("not scale-invariant" if v is None else "{:.3g} → {:.3g}".format(*v) for v in values))
    return table
