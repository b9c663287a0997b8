"""The table before training: what each parameter is, and what decay and projection will do to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lightning_normreg._reports import SummaryRow, markdown_summary, sentences, summary_rows, summary_table, with_audit
from lightning_normreg._symmetries import Symmetries
from lightning_normreg._weights import Verdict
from lightning_normreg.callbacks._base import StepCallback
from lightning_normreg.callbacks._holding import held_norms
from lightning_normreg.callbacks._run import optimizers_of, run_of
from lightning_normreg.steps._subscriber import StepSubscriber

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer
    from torch.optim import Optimizer


class NormSummary(StepCallback):
    """Prints one table before training: role, scale-invariant units, norm, radius and decay group of each parameter.

    Under it, in plain sentences: what share of the decayed weights is scale-invariant, so that decay only sets their
    learning rate; on which weights it may do more; the timescale of decay; whether gradients are clipped.

    When it runs: once, just before the first optimizer step, when the model has been probed.

    What it logs: the table as text, to loggers that take text (TensorBoard); :meth:`rows` has it for machines.

    What it costs: a norm of each parameter, and the probe where no other callback has asked for it; for the symmetries
    at most 60 forward and backward passes of a few samples more.

    Args:
        invariance: Which units are scale-invariant, as a file of ``save_verdict`` or what is in it; by default the
            model is probed at the first batch (:func:`find_scale_invariance`), once for all callbacks.
        symmetries: All scaling symmetries, as a file of :meth:`Symmetries.save` or what is in it. ``"auto"``: they are
            looked for (:func:`find_symmetries`) where that takes 60 passes at most, and else it is said how. None: not.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no file of symmetries, or one of another model.

    Examples:
        >>> from pytorch_lightning import Trainer
        >>> trainer = Trainer(callbacks=[NormSummary()], logger=False)
    """

    def __init__(
        self,
        invariance: str | Mapping[str, Any] | None = None,
        symmetries: str | Mapping[str, Any] | Symmetries | None = "auto",
    ) -> None:
        super().__init__(invariance, symmetries)
        self._rows: list[SummaryRow] = []
        self._sentences: list[str] = []

    def rows(self) -> list[dict[str, Any]]:
        """The table, one mapping of plain types for each parameter; empty before the first step."""
        return [asdict(row) for row in self._rows]

    def sentences(self) -> list[str]:
        """What stands under the table."""
        return list(self._sentences)

    def _begin(self, trainer: Trainer, pl_module: LightningModule, verdict: Verdict) -> None:
        if self._subscribers:
            return
        known, why = self._all_symmetries(trainer) if verdict else (self._given_symmetries, [])
        self._subscribe(trainer, _BeforeFirstStep(lambda: self._make(trainer, verdict, known, why)))

    def _make(self, trainer: Trainer, verdict: Verdict, known: Symmetries | None, why: list[str]) -> None:
        self._rows, self._sentences = summary_of(trainer, verdict, known, why)
        if trainer.is_global_zero:
            self._show(trainer)

    def _show(self, trainer: Trainer) -> None:
        console = Console()
        said = " ".join(self._sentences)
        console.print(summary_table(self._rows))
        console.print(said)
        for logger in trainer.loggers:
            add_text = getattr(getattr(logger, "experiment", None), "add_text", None)
            if callable(add_text):
                add_text("norm_summary", f"{markdown_summary(self._rows)}\n\n{said}")


class _BeforeFirstStep(StepSubscriber):
    """Acts once, when all callbacks have begun."""

    def __init__(self, act: Callable[[], None]) -> None:
        super().__init__()
        self._act: Callable[[], None] | None = act

    def before_step(self, index: int, optimizer: Optimizer) -> None:
        """Act, and never again."""
        act, self._act = self._act, None
        if act is not None:
            act()


def summary_of(
    trainer: Trainer, verdict: Verdict, symmetries: Symmetries | None = None, why: Sequence[str] = ()
) -> tuple[list[SummaryRow], list[str]]:
    """The table of a run whose callbacks have all begun, and what stands under it."""
    rows = summary_rows(run_of(trainer).named, optimizers_of(trainer), verdict, held_norms(trainer))
    audited: list[str] = []
    if symmetries is not None:
        rows, audited = with_audit(rows, symmetries)
    steps = float(trainer.num_training_batches) / trainer.accumulate_grad_batches
    planned = float(trainer.estimated_stepping_batches)
    return rows, [*sentences(rows, verdict, steps, trainer.gradient_clip_val, audited, planned=planned), *why]
