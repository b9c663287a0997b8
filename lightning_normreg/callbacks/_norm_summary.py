"""The table before training: what each parameter is, and what decay and projection will do to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lightning_normreg._reports import SummaryRow, markdown_summary, sentences, summary_rows, summary_table
from lightning_normreg._weights import Verdict
from lightning_normreg.callbacks._base import StepCallback, optimizers_of, run_of
from lightning_normreg.callbacks._holding import held_norms
from lightning_normreg.steps._step_hooks import Phase

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer
    from torch import Tensor
    from torch.optim import Optimizer


class NormSummary(StepCallback):
    """Prints one table before training: role, scale-invariant units, norm, radius and decay group of each parameter.

    Under it, in plain sentences: what share of the decayed weights is scale-invariant, so that decay only sets their
    learning rate; which weights it really regularizes; the timescale of decay; whether gradients are clipped.

    When it runs: once, just before the first optimizer step, when the model has been probed.

    What it logs: the table as text, to loggers that take text (TensorBoard); :meth:`rows` has it for machines.

    What it costs: one read of the parameters, and the probe where no other callback has asked for it.

    Args:
        invariance: Which units are scale-invariant, as a file of ``save_verdict`` or what is in it; by default the
            model is probed at the first batch (:func:`find_scale_invariance`), once for all callbacks.

    Examples:
        >>> from pytorch_lightning import Trainer
        >>> trainer = Trainer(callbacks=[NormSummary()], logger=False)
    """

    phase = Phase.MEASURE

    def __init__(self, invariance: str | Mapping[str, Any] | None = None) -> None:
        super().__init__(invariance)
        self._rows: list[SummaryRow] = []
        self._sentences: list[str] = []
        self._pending: tuple[Trainer, Verdict] | None = None

    def rows(self) -> list[dict[str, Any]]:
        """The table, one mapping of plain types for each parameter; empty before the first step."""
        return [asdict(row) for row in self._rows]

    def sentences(self) -> list[str]:
        """What stands under the table."""
        return list(self._sentences)

    def _begin(self, trainer: Trainer, pl_module: LightningModule, verdict: Verdict) -> None:
        self._pending = (trainer, verdict)
        run_of(trainer).dispatcher.subscribe(self)

    def before_step(self, index: int, optimizer: Optimizer) -> None:
        """Make the table, when all other callbacks have begun; then never again."""
        if self._pending is None:
            return
        (trainer, verdict), self._pending = self._pending, None
        self._rows, self._sentences = summary_of(trainer, verdict)
        if trainer.is_global_zero:
            self._show(trainer)

    def after_step(self, index: int, optimizer: Optimizer, skipped: Tensor | None) -> None:
        """Nothing."""

    def _show(self, trainer: Trainer) -> None:
        console = Console()
        said = " ".join(self._sentences)
        console.print(summary_table(self._rows))
        console.print(said)
        for logger in trainer.loggers:
            add_text = getattr(getattr(logger, "experiment", None), "add_text", None)
            if callable(add_text):
                add_text("norm_summary", f"{markdown_summary(self._rows)}\n\n{said}")


def summary_of(trainer: Trainer, verdict: Verdict) -> tuple[list[SummaryRow], list[str]]:
    """The table of a run whose callbacks have all begun, and what stands under it."""
    rows = summary_rows(run_of(trainer).named, optimizers_of(trainer), verdict, held_norms(trainer))
    steps = float(trainer.num_training_batches) / trainer.accumulate_grad_batches
    return rows, sentences(rows, verdict, steps, trainer.gradient_clip_val)
