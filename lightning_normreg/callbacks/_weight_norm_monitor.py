"""The callback that logs norms."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_normreg import _metrics
from lightning_normreg._weights import Verdict, Watched
from lightning_normreg.callbacks._monitor import Monitor
from lightning_normreg.callbacks._run import run_of
from lightning_normreg.callbacks._tensorboard import takes_histograms, write_histograms
from lightning_normreg.steps._products import Pair, Products, pairs_of
from lightning_normreg.steps._tracker import NormTracker, Row, Tracker

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer


class WeightNormMonitor(Monitor):
    r"""Logs the norm of each weight, and of the units in it, before each logged optimizer step.

    Behind ``prefix``, that is ``weights/``:

    * ``weight_norm/<parameter>``: :math:`\lVert w\rVert` of that tensor alone;
    * ``unit_norm_rms/<parameter>``: root mean square n of the norms of its units, ``unit_norm_min/…`` and
      ``unit_norm_max/…``. A bias that belongs to a unit counts in its norm, as in all curves of
      :class:`EffectiveLRMonitor`: ``effective_lr`` is :math:`\eta/n^p` with this n;
    * ``layers/unit_norm_rms_<min|median|max>``: over layers;
    * ``balance/<pair>``: the logarithm of the ratio of norms within pairs of which only the product counts (query and
      key, value and output, up and down of a gated layer), where scaling symmetries are known: no function sees it;
    * with ``products=True`` for such pairs ``product/<pair>``,
      :math:`\sqrt{\sum_b\lVert(A\gamma)_b\rVert^2\lVert(B\gamma)_b\rVert^2}` over blocks b and with the gain γ that
      both read, where no scaling symmetry changes it. Unlike the balance it says something of the function;
    * with ``histograms=True`` the histogram ``unit_norms/<parameter>`` of the norms of its units, to loggers that take
      histograms (TensorBoard).

    When it runs: in the optimizer's step pre-hook; values are read in ``on_train_batch_end``. The first update is
    logged, then every ``every_n_steps`` batches, on the x-axis of ``LearningRateMonitor``.

    What it logs: the curves above, to every logger of the Trainer, to ``trainer.callback_metrics`` and to
    :meth:`history`.

    What it costs: on logged steps one operation for each tensor, which reads it (on a GPU in float64), and one
    transfer, nothing on others; what EffectiveLRMonitor reads in the same step is not read again. Histograms cost a
    second transfer, of one number for each unit, and about a millisecond of the host for each weight.

    Args:
        every_n_steps: Batches between logged ones; by default the Trainer's ``log_every_n_steps``.
        every_n_updates: Instead, updates of each optimizer between logged ones, the first of which is logged: for a
            ``training_step`` that makes several. Their x-axis is the number of updates of all optimizers before.
            Without it a batch's last update is logged, with the number of each optimizer's updates in the batch as
            ``updates/<index of the optimizer>`` where a weight had more than one.
        include: Globs over clean parameter names; by default weights and embeddings are watched. A glob that matches
            nothing is an error.
        exclude: Globs of parameters to leave out.
        unit: ``"auto"``: the units that are scale-invariant, and the whole tensor where none is; ``"neuron"``: one
            output row; ``"column"``: what one input feeds into all neurons; ``"layer"``: the whole tensor; ``"set"``:
            as ``"auto"``, and an error where sets cannot be known.
        invariance: Which units are scale-invariant, as a file of ``save_verdict`` or what is in it; by default the
            model is probed at the first batch (:func:`find_scale_invariance`), once for all callbacks. Where that
            fails, the gradients of the first 33 optimizer steps are observed, and curves begin after them.
        symmetries: All scaling symmetries, as a file of :meth:`Symmetries.save` or what is in it: tensors that are
            scale-invariant only together have curves as a set. ``"auto"``: they are looked for on the first batch
            (:func:`find_symmetries`) where some weight is not scale-invariant by itself, in 60 passes at most. None: no
            sets.
        histograms: Write histograms as well, of the layers that have curves, at the steps that are logged; with
            ``logging_interval="epoch"`` of an epoch's last logged step.
        products: Log products of norms as well; of attention they have the size of queries times that of keys, gains
            included, for each head, in one number. A further read of these weights at logged steps; none of sharded
            ones.
        per_layer: ``True``: curves of every layer; ``False``: only the summaries; ``"auto"``: every layer up to 32,
            above that the summaries and 8 layers spread over the depth.
        logging_interval: ``"step"``, or ``"epoch"`` for the mean over an epoch's logged steps.
        prefix: First part of every tag.

    Raises:
        ValueError: For an argument out of its range, before training starts.

    Examples:
        >>> from pytorch_lightning import Trainer
        >>> trainer = Trainer(callbacks=[WeightNormMonitor(include=["*.weight"])], logger=False)
    """

    summaries = (_metrics.UNIT_NORM_RMS,)

    def _reset(self) -> None:
        super()._reset()
        self._units: dict[str, Tensor] = {}
        self._pairs: list[Pair] = []
        self._products: Products | None = None

    def _make_tracker(self, watched: list[Watched]) -> Tracker:
        return NormTracker(watched)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so where no logger takes histograms."""
        super().on_fit_start(trainer, pl_module)
        if self.histograms and trainer.is_global_zero and not any(map(takes_histograms, trainer.loggers)):
            names = ", ".join(type(logger).__name__ for logger in trainer.loggers) or "none"
            rank_zero_warn(
                "`histograms=True` needs a logger whose experiment has add_histogram, such as TensorBoardLogger. "
                f"The Trainer's are: {names}. No histograms are written."
            )

    def _begin(self, trainer: Trainer, pl_module: LightningModule, verdict: Verdict) -> None:
        super()._begin(trainer, pl_module, verdict)
        known = self._known_symmetries()
        self._pairs = [] if known is None else pairs_of(known)
        if self.products and known is not None and self._products is None and self._tracker is not None:
            self._products = self._subscribe(trainer, Products(known, run_of(trainer).named, self._tracker.is_due))

    def _others(self, trainer: Trainer, row: Row) -> dict[str, float]:
        """What of pairs no function sees, and what no symmetry changes."""
        found = {}
        for pair in self._pairs:
            both = [row[name].get(_metrics.WEIGHT_NORM, 0.0) for name in (pair.first, pair.second) if name in row]
            if {pair.first, pair.second} <= self._shown and len(both) == 2 and min(both) > 0:
                found[_metrics.tag(_metrics.BALANCE, pair.name, self.prefix)] = math.log(both[0] / both[1])
        products = {} if self._products is None else self._products.collect()
        return found | {_metrics.tag(_metrics.PRODUCT, name, self.prefix): v for name, v in products.items()}

    def _complete(self, trainer: Trainer, row: Row, later: int) -> None:
        if self.histograms and trainer.is_global_zero:
            tracker = self._tracker
            assert isinstance(tracker, NormTracker)
            self._units = tracker.unit_norms([name for name in row if name in self._shown])

    def _log(self, trainer: Trainer, values: dict[str, float]) -> None:
        super()._log(trainer, values)
        for logger in trainer.loggers:
            tagged = {_metrics.joined(self.prefix, "unit_norms", name): n for name, n in self._units.items()}
            write_histograms(logger, tagged, self._step)
