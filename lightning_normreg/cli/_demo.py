"""``lightning-normreg demo``."""

from __future__ import annotations

import re
import sys
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
from lightning_normreg.cli._parser import parser_of
from lightning_normreg.cli._subcommands import PROGRAM, epilog
from lightning_normreg.demos import DemoConvNet, DemoTransformer, DigitsDataModule, TextDataModule

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
MODELS = {
    "convnet": (DemoConvNet, DigitsDataModule, [f"--data.label_noise={LABEL_NOISE}"], TRAINER),
    "transformer": (DemoTransformer, TextDataModule, [], TRAINER | {"max_epochs": 8, "log_every_n_steps": 10}),
}
"""By the name that ``--model`` takes: model, data, first arguments, settings of the Trainer."""
DESCRIPTION = """Train a small network on embedded data: one with BatchNorm on digits, some of them mislabelled
(--model convnet, the default), or a transformer on text (--model transformer)."""


def demo(args: list[str]) -> None:
    """Train a demo network, and show what happened to its layers."""
    try:
        for module in ("sklearn", "matplotlib", "pandas"):
            optional_import(module, "demo")
    except ModuleNotFoundError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    name, rest = _model_of(args)
    model, data, first, trainer = MODELS[name]
    cli = NormRegCLI(
        model,
        data,
        args=[*first, *rest],
        run=False,
        seed_everything_default=0,
        trainer_defaults=trainer,
        parser_kwargs={"prog": f"{PROGRAM} demo", "description": DESCRIPTION, "epilog": epilog("demo")},
    )
    with cli.explained_errors():
        cli.trainer.fit(cli.model, cli.datamodule)
    if cli.trainer.is_global_zero:
        _report(cli.trainer)


def _model_of(args: list[str]) -> tuple[str, list[str]]:
    """The name of the model, and the arguments for it. A ``--model`` that is no word is a file with some of these."""
    name, rest, words = "convnet", [], iter(args)
    for word in words:
        key, equals, value = word.partition("=")
        if key != "--model":
            rest.append(word)
            continue
        value = value if equals else next(words, "")
        if value in MODELS:
            name = value
        elif re.fullmatch(r"[\w-]*", value):
            parser_of("demo", DESCRIPTION).error(f"--model: must be one of {', '.join(MODELS)}, got {value!r}.")
        else:
            rest.append(f"--model={value}")
    return name, rest


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
    table = Table(title="What the run did to each layer, first → last logged step", show_edge=False)
    table.add_column("layer", overflow="fold")
    for title in SHOWN:
        table.add_column(title, justify="right")
    starts = [
        _metrics.tag(curve, "") for curve in (*SHOWN.values(), *(c for c in _metrics.CURVES if c.of == "parameter"))
    ]
    layers = [c.removeprefix(start) for start in starts for c in history.columns if c.startswith(start)]
    for layer in dict.fromkeys(layers):
        cells = []
        for curve in SHOWN.values():
            tag = _metrics.tag(curve, layer)
            values = history.reindex(columns=[tag])[tag].dropna()
            missing = "not scale-invariant" if curve is _metrics.EFFECTIVE_LR else ""
            cells.append(missing if values.empty else "{:.3g} → {:.3g}".format(*values.iloc[[0, -1]]))
        table.add_row(layer, *cells)
    return table
