"""``inspect`` with a model: built as ``fit`` would, asked on its first batch, and stopped before its first step."""

from __future__ import annotations

import inspect as introspection
from abc import abstractmethod
from collections.abc import Collection
from contextlib import suppress
from typing import Any

from lightning_normreg._compat import pl
from lightning_normreg._optimizers import find_rule
from lightning_normreg._param_groups import load_by_name
from lightning_normreg._reports import Checkpoint, SavedGroup, inspect_parameters, read_checkpoint, summary_table
from lightning_normreg._symmetries import Symmetries
from lightning_normreg._weights import Verdict
from lightning_normreg.callbacks._base import StepCallback
from lightning_normreg.callbacks._holding import held_norms
from lightning_normreg.callbacks._norm_projection import NormProjection
from lightning_normreg.callbacks._norm_summary import summary_of
from lightning_normreg.callbacks._run import optimizers_of, run_of
from lightning_normreg.cli._errors import ArgumentRefused, refusals_of
from lightning_normreg.cli._inspect import Report, add_output_arguments, show
from lightning_normreg.cli._namespace import namespace_of
from lightning_normreg.cli._normreg_cli import Commands, NormRegCLI
from lightning_normreg.cli._subcommands import PROGRAM

# What is looked at comes before any of it; norms are the same on every device.
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
    "limit_val_batches": 0,
    "profiler": None,
    "barebones": False,
    "plugins": None,
}


def inspect_model(words: list[str], kind: type[Inspection] | None = None) -> None:
    """Build a model as ``fit`` would, and look at it by ``kind``."""
    base: Any = NormRegCLI.of(namespace_of(None, words))
    type("InspectCLI", (kind or Inspection, base), {})(args=["fit", *words], save_config_callback=None)


class Inspection(Commands):
    """To be mixed into a :class:`NormRegCLI`: its ``fit`` looks, and does not train."""

    command = "inspect"
    kept: Collection[str] = ()  # settings of the Trainer that count
    add_output = staticmethod(add_output_arguments)
    look: type[Look]
    _checkpoint: Checkpoint | None = None

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        """Let errors name the command as it was called."""
        super().setup_parser(*args, **kwargs)
        self._subcommand_parsers["fit"].prog = self.parser.prog = f"{PROGRAM} {self.command}"

    def add_core_arguments_to_parser(self, parser: Any) -> None:
        """Those of ``fit``, and of the output."""
        super().add_core_arguments_to_parser(parser)
        self.add_output(parser)

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parse, and read the checkpoint before Lightning does."""
        super().parse_arguments(parser, args)
        if path := self.config["fit"].get("ckpt_path"):
            with refusals_of("ckpt_path"):
                self._checkpoint = read_checkpoint(path)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """A Trainer that writes nothing."""
        known = introspection.signature(self.trainer_class).parameters
        quiet = {key: value for key, value in _TRAINER.items() if key in known and key not in self.kept}
        if str(self._settings("config_init")["trainer"].get("precision")).endswith("mixed"):
            quiet["precision"] = "32-true"  # that of the weights
        return super().instantiate_trainer(**{**quiet, **kwargs})

    def _run_subcommand(self, subcommand: str) -> None:
        options = self._settings("config_init")
        with refusals_of("invariance"):
            look = self.look(options["invariance"], self._checkpoint)
        with refusals_of("symmetries"):
            look.known = None if options["symmetries"] is None else Symmetries.load(options["symmetries"])
        trainer: Any = self.trainer
        look.beside = [c for c in trainer.callbacks if isinstance(c, StepCallback)]
        trainer.callbacks = [c for c in trainer.callbacks if isinstance(c, NormProjection)] + [look]
        with suppress(Seen):
            trainer.fit(self.model, datamodule=self.datamodule)
        if not look.seen:
            raise ArgumentRefused("data", "it has no batch to train on. Give data whose train_dataloader is not empty.")
        look.show(options)


class Seen(Exception):
    """Ends a run before its first step."""


class Look(StepCallback):
    """Makes the report when all other callbacks have begun, and ends the run."""

    def __init__(self, invariance: str | None, checkpoint: Checkpoint | None) -> None:
        super().__init__(invariance)
        self._checkpoint = checkpoint
        self.known: Symmetries | None = None
        self.beside: list[StepCallback] = []  # callbacks of this package that the run would have
        self.seen = False

    @abstractmethod
    def look(self, trainer: pl.Trainer, verdict: Verdict, known: Symmetries | None) -> None:
        """Note what is to be shown; ``known`` are symmetries that were given, or are in the checkpoint."""

    @abstractmethod
    def show(self, options: Any) -> None:
        """Print it."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the weights and the state of the optimizers where they belong."""
        super().on_fit_start(trainer, pl_module)
        if self._checkpoint is None:
            return
        states, optimizers = self._checkpoint.optimizers, optimizers_of(trainer)
        try:
            pl_module.load_state_dict(self._checkpoint.state_dict)
            if states and len(states) != len(optimizers):
                raise ValueError(f"It has {len(states)} optimizers, the model {len(optimizers)}.")
            handles = load_by_name(optimizers, pl_module)
            for optimizer, state in zip(optimizers, states, strict=False):
                optimizer.load_state_dict(state)
            for handle in handles:
                handle.remove()
        except (RuntimeError, ValueError, KeyError) as error:
            why = " ".join(str(error).split())[:400]
            raise ArgumentRefused(
                "ckpt_path", f"it does not go with the model. {why} Leave --model and --config out to see it alone."
            ) from error

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule, verdict: Verdict) -> None:
        known = self.known
        if known is None and self._checkpoint is not None:
            known = self._checkpoint.symmetries
        if known is not None:
            with refusals_of("symmetries"):
                known.check_names(name for name, _, _ in run_of(trainer).named)
        self.look(trainer, verdict, known)
        self.seen = True
        raise Seen


class _LookAtNextStep(Look):
    """For ``inspect``: norms, and the next step."""

    _report: Report | None = None

    def look(self, trainer: pl.Trainer, verdict: Verdict, known: Symmetries | None) -> None:
        """Make the report."""
        summary, meaning = summary_of(trainer, verdict, known)
        rows, blanks = inspect_parameters(run_of(trainer).named, _owners(trainer), verdict, held_norms(trainer))
        more = {
            r.parameter: {"role": r.role, "evidence": r.evidence or None, "eps_share": r.eps_share, "radius": r.radius}
            | {"acts": r.acts or None, "removable": r.removable}
            for r in summary
        }
        of = "" if self._checkpoint is None else f" of a checkpoint: {self._checkpoint.about}"
        self._report = Report(
            rows, [" ".join(meaning), *blanks], verdict, f"The next step{of}", [summary_table(summary)], more
        )

    def show(self, options: Any) -> None:
        """Print it."""
        assert self._report is not None
        show(self._report, options)


Inspection.look = _LookAtNextStep


def _owners(trainer: pl.Trainer) -> dict[str, SavedGroup]:
    names = {parameter: name for name, parameter, _ in run_of(trainer).named}
    optimizers = optimizers_of(trainer)
    owners: dict[str, SavedGroup] = {}
    for number, optimizer in enumerate(optimizers):
        for index, group in enumerate(optimizer.param_groups):
            rule = find_rule(optimizer, group)
            start = f"{number}:" if len(optimizers) > 1 else ""
            rules = () if rule is None else (rule,)
            saved = SavedGroup(f"{start}{group.get('name', index)}", group, rules, type(optimizer).__name__)
            owners |= {names[p]: saved for p in group["params"] if p in names}
    return owners
