"""The callback that logs norms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lightning_normreg import _metrics
from lightning_normreg._tracker import NormTracker, Tracker
from lightning_normreg._watch import UnitArgument
from lightning_normreg._watched import Watched
from lightning_normreg.callbacks._monitor import Monitor, PerLayer


class WeightNormMonitor(Monitor):
    r"""Logs the norm of each weight, and of the units in it, before each logged optimizer step.

    * ``weight_norm/<parameter>``: :math:`\lVert w\rVert` of the whole tensor;
    * ``unit_norm_rms/<parameter>``: :math:`n=\lVert w\rVert/\sqrt{U}` over its U units, ``unit_norm_min/…`` and
      ``unit_norm_max/…``;
    * ``layers/unit_norm_rms_<min|median|max>``: over layers.

    When it runs: in the optimizer's step pre-hook; values are read in ``on_train_batch_end``. The first update is
    logged, then every ``every_n_steps`` batches, on the x-axis of ``LearningRateMonitor``.

    What it logs: the curves above, to every logger of the Trainer, to ``trainer.callback_metrics`` and to
    :meth:`history`.

    What it costs: one read of the watched weights and one transfer on logged steps, nothing on others.

    Args:
        every_n_steps: Batches between logged ones; by default the Trainer's ``log_every_n_steps``.
        include: Globs over clean parameter names; by default weights and embeddings are watched. A glob that matches
            nothing is an error.
        exclude: Globs of parameters to leave out.
        unit: ``"auto"``: the units that are scale-invariant, and the whole tensor where none is; ``"neuron"``: one
            output row; ``"column"``: what one input feeds into all neurons; ``"layer"``: the whole tensor.
        invariance: Which units are scale-invariant, as a file of ``save_verdict`` or what is in it; by default the
            model is probed at the first batch (:func:`find_scale_invariance`), once for all callbacks. Where that
            fails, the gradients of the first 33 optimizer steps are observed, and curves begin after them.
        per_layer: ``True``: curves of every layer; ``False``: only the summaries; ``"auto"``: every layer up to 32,
            above that the summaries and 8 layers spread over the depth.
        logging_interval: ``"step"``, or ``"epoch"`` for the mean over an epoch's logged steps.

    Raises:
        ValueError: For an argument out of its range, before training starts.

    Examples:
        >>> from pytorch_lightning import Trainer
        >>> trainer = Trainer(callbacks=[WeightNormMonitor(include=["*.weight"])], logger=False)
    """

    summaries = (_metrics.UNIT_NORM_RMS,)

    def __init__(
        self,
        every_n_steps: int | None = None,
        *,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        unit: UnitArgument = "auto",
        invariance: str | Mapping[str, Any] | None = None,
        per_layer: PerLayer = "auto",
        logging_interval: Literal["step", "epoch"] = "step",
    ) -> None:
        super().__init__(
            every_n_steps=every_n_steps,
            include=include,
            exclude=exclude,
            unit=unit,
            invariance=invariance,
            per_layer=per_layer,
            logging_interval=logging_interval,
        )

    def _make_tracker(self, watched: list[Watched]) -> Tracker:
        return NormTracker(watched)
