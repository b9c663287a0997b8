"""The command line: ``lightning-normreg demo``, and ``fit``, ``validate``, ``test``, ``predict`` for any model."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lightning_normreg import EffectiveLRMonitor, WeightNormMonitor
from lightning_normreg._compat import pl
from lightning_normreg._history import optional_import
from lightning_normreg.demos import DemoConvNet, DigitsDataModule
from lightning_normreg.demos._report import save_picture, summary_table

if TYPE_CHECKING:
    from pytorch_lightning import Trainer
    from pytorch_lightning.cli import LightningCLI
else:
    LightningCLI = import_module(f"{pl.__name__}.cli").LightningCLI

PROGRAM = "lightning-normreg"
DESCRIPTION = (
    "See and control what weight decay does to normalized networks. "
    f"A first run on embedded data: `{PROGRAM} demo`; the subcommands below are for any --model and --data."
)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: Arguments without the program's name; by default those of the process.
    """
    words = list(sys.argv[1:] if args is None else args)
    if words[:1] == ["demo"]:
        demo(words[1:])
    else:
        _lightning_cli(args=words, parser_kwargs={"prog": PROGRAM, "description": DESCRIPTION})


def demo(args: list[str]) -> None:
    """Train the demo network on the digits and show what happened to its layers.

    Args:
        args: LightningCLI's arguments, without a subcommand; ``--config`` takes a YAML file.
    """
    for module in ("sklearn", "matplotlib", "pandas"):
        optional_import(module)
    cli = _lightning_cli(
        model_class=DemoConvNet,
        datamodule_class=DigitsDataModule,
        args=args,
        run=False,
        seed_everything_default=0,
        trainer_defaults=_trainer_defaults(),
        parser_kwargs={"prog": f"{PROGRAM} demo", "description": "Train a small BatchNorm network on digits."},
    )
    cli.trainer.fit(cli.model, cli.datamodule)
    if cli.trainer.is_global_zero:
        _report(cli.trainer)


def _lightning_cli(**options: Any) -> LightningCLI:
    with warnings.catch_warnings():
        # It guards against a script that passes arguments of its own; here they are the command line's.
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
        return LightningCLI(**options)


def _trainer_defaults() -> dict[str, Any]:
    return {
        "max_epochs": 20,
        "log_every_n_steps": 5,
        "accelerator": "cpu",
        "enable_model_summary": False,
        "callbacks": [WeightNormMonitor(), EffectiveLRMonitor()],
    }


def _report(trainer: Trainer) -> None:
    """Print the table, save the picture, say how to look at the curves."""
    console = Console()
    monitors = [c for c in trainer.callbacks if isinstance(c, (WeightNormMonitor, EffectiveLRMonitor))]  # type: ignore[attr-defined]
    frames = [monitor.history() for monitor in monitors]
    if len(frames) < 2 or any(frame.empty for frame in frames) or trainer.log_dir is None:
        console.print("Nothing to show: a monitor or the logger was taken away, or no update was logged.")
        return
    history = frames[0].merge(frames[1], on=["step", "epoch"], how="outer")
    console.print(summary_table(history))
    directory = Path(trainer.log_dir)
    save_picture(history, directory / "curves.png")
    console.print(f"Picture of the curves:  {directory / 'curves.png'}", soft_wrap=True)
    console.print(f"All curves, live:       tensorboard --logdir {directory}", soft_wrap=True)
