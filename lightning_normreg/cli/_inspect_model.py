"""``inspect`` with a model: built as ``fit`` would, asked on its first batch, and stopped before its first step."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_normreg._checkpoint import Checkpoint, read_checkpoint
from lightning_normreg._inspection import inspect_parameters
from lightning_normreg._optimizers import find_rule
from lightning_normreg._regroup import load_by_name
from lightning_normreg._roles import named_roles
from lightning_normreg._saved_optimizers import SavedGroup
from lightning_normreg._summary import sentences, summary_rows, summary_table
from lightning_normreg.callbacks._base import StepCallback, optimizers_of, run_of
from lightning_normreg.callbacks._norm_projection import NormProjection
from lightning_normreg.callbacks._verdict import Verdict
from lightning_normreg.cli._errors import ArgumentRefused, refusals_of
from lightning_normreg.cli._examples import PROGRAM, epilog
from lightning_normreg.cli._inspect import Report, add_output_arguments, show
from lightning_normreg.cli._namespace import namespace_of
from lightning_normreg.cli._normreg_cli import NormRegCLI

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

# What is looked at happens before any of it; a model's norms are the same on every device.
_TRAINER = {
    "accelerator": "cpu",
    "devices": 1,
    "num_nodes": 1,
    "strategy": "auto",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "max_epochs": -1,
    "max_steps": -1,
    "max_time": None,
    "fast_dev_run": False,
    "num_sanity_val_steps": 0,
    "limit_val_batches": 0,
    "profiler": None,
    "barebones": False,
    "plugins": None,
}


def inspect_model(words: list[str]) -> None:
    """Inspect what arguments of ``fit`` name.

    Args:
        words: Those arguments, with those of the output.
    """
    base: Any = NormRegCLI.of(namespace_of(None, words))
    trainer_class = import_module(base.namespace).Trainer
    stand_in = type("Trainer", (trainer_class,), {"inspect": _Inspection.inspect})
    kwargs = {"prog": PROGRAM, "inspect": {"prog": f"{PROGRAM} inspect", "epilog": epilog("inspect")}}
    cli = type("InspectCLI", (_Inspection, base), {})
    cli(args=["inspect", *words], parser_kwargs=kwargs, trainer_class=stand_in, save_config_callback=None)


class _Inspection:
    """Changes a :class:`NormRegCLI` to look at what it would train."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {"inspect": {"self", "model", "datamodule"}}

    def inspect(self: Any, model: Any, datamodule: Any = None, ckpt_path: str | None = None, **options: Any) -> None:
        """Show norms and effective learning rates before the first step, or before the next one of a checkpoint.

        Args:
            model: The module.
            datamodule: Its data.
            ckpt_path: Checkpoint with weights, and with the state of the optimizers.
            options: Others that a YAML of ``fit`` may have.
        """
