"""The callback that holds norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_normreg._projector import Projector, Radius, check_radius_argument
from lightning_normreg._watched import UnitArgument, Watched, check_selection, watch
from lightning_normreg.callbacks._base import StepCallback, batches_that_stepped, log_interval, optimizers_of, run_of

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer
    from torch import Tensor


class NormProjection(StepCallback):
    r"""Holds the norm of weights: after each optimizer step, :math:`w_u \leftarrow R\,w_u/\lVert w_u\rVert`.

    For scale-invariant weights this leaves the network's function alone and removes a hyperparameter: the effective
    learning rate is then lr/R^p for the whole run, whatever the weight decay.

    When it runs: before the first step, then in the optimizer's step post-hook, after the monitors have measured the
    step. It is a rescale, not a parametrization: no gradient goes through it, and the optimizer's state is left alone.

    What it logs: nothing; units that cannot be projected (zero, infinite, NaN) are reported once.

    What it costs: one read and one write of the projected weights per step, no transfer.

    Args:
        radius: ``"auto"``: 1 for a neuron, √k for a layer of k neurons; ``"initial"``: the norm that each unit had at
            the start (kept in checkpoints; a unit that was zero stays free); a number: that norm for every unit.
        unit: ``"neuron"``: one output row; ``"layer"``: the whole tensor; ``"auto"``: neuron.
        include: Globs over clean parameter names. A glob that matches nothing is an error.
        exclude: Globs of parameters to leave out.

    Raises:
        ValueError: For an argument out of its range, a missing ``include``, a weight that no optimizer updates
            (unless a finetuning callback is there to thaw it), or one that another NormProjection holds; before
            training starts.

    Example:
        >>> from pytorch_lightning import Trainer
        >>> trainer = Trainer(callbacks=[NormProjection(include=["*.conv.weight"])], logger=False)

    Reference:
        van Laarhoven 2017, section "Normalizing Weights", https://arxiv.org/abs/1706.05350.
    """

    def __init__(
        self,
        radius: Radius = "auto",
        *,
        unit: UnitArgument = "auto",
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
    ) -> None:
        super().__init__()
        check_radius_argument(radius)
        check_selection(unit, include, exclude)
        if not include:
            raise ValueError(
                f"`include` must name the weights to project, got {include!r}: which weights are scale-invariant is "
                "not found out by itself yet. Use for example include=['*.conv*.weight'] for convolutions that "
                "BatchNorm follows."
            )
        self.radius = radius
        self.unit = unit
        self.include = include
        self.exclude = exclude
        self._restored: dict[str, Tensor] = {}
        self._projector: Projector | None = None
        self._projected = 0

    @property
    def state_key(self) -> str:
        """Key of the callback's state; two projections of different weights have different ones."""
        return self._generate_state_key(include=self.include, exclude=self.exclude, unit=self.unit)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start afresh; a checkpoint's state is loaded after this."""
        if stage == "fit":
            self._restored = {}
            self._projected = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Select the weights to project, and claim them."""
        super().on_fit_start(trainer, pl_module)
        targets = watch(pl_module, self.include, self.exclude, self.unit)
        self._projector = Projector(targets, self.radius, self._restored)
        _refuse_idle(trainer, targets, self._projector)
        self._claim(trainer, targets)
        run_of(trainer).dispatcher.subscribe(self._projector)

    def _claim(self, trainer: Trainer, targets: list[Watched]) -> None:
        claims = run_of(trainer).claims
        for target in targets:
            if target.parameter in claims:
                raise ValueError(
                    f"{target.name!r} must be held by one NormProjection, but `include` of two match it: "
                    f"{claims[target.parameter]} and {self.include}. Make one narrower, or use `exclude`."
                )
            claims[target.parameter] = str(self.include)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Project before the first step, and again when a finetuning callback has handed more to an optimizer."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        projector = self._held()
        optimized = projector.optimized(optimizers_of(trainer))
        if len(optimized) != self._projected:
            self._projected = len(optimized)
            projector.project(optimized)  # those already at their radius do not change a bit
            projector.report()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report units that became zero or non-finite, at the Trainer's logging interval."""
        interval = log_interval(trainer)
        if interval and (batches_that_stepped(trainer) + 1) % interval == 0:
            self._held().report()

    def _held(self) -> Projector:
        assert self._projector is not None
        return self._projector

    def state_dict(self) -> dict[str, Any]:
        """The radii that were measured at the start, as plain tensors."""
        initial = self._restored if self._projector is None else self._projector.initial
        return {"initial": {name: radius.cpu() for name, radius in initial.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Hold the radii of the run that is resumed."""
        self._restored = dict(state_dict["initial"])


def _refuse_idle(trainer: Trainer, targets: list[Watched], projector: Projector) -> None:
    """Refuse weights that nothing updates, unless a finetuning callback may thaw them."""
    thaws = any("BaseFinetuning" in [c.__name__ for c in type(cb).__mro__] for cb in trainer.callbacks)  # type: ignore[attr-defined]
    optimized = {t.name for t in projector.optimized(optimizers_of(trainer))}
    idle = [t.name for t in targets if t.name not in optimized or not t.parameter.requires_grad]
    if idle and not thaws:
        raise ValueError(
            f"`include` must name weights that are trained, but {', '.join(map(repr, idle))} is frozen or in no "
            "optimizer. Train it, leave it out by `exclude`, or thaw it by a callback derived from BaseFinetuning."
        )
