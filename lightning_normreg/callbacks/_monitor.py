"""What both monitors share: when a step is logged, and where its values go."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_normreg import _metrics
from lightning_normreg._compat import is_named
from lightning_normreg._metrics import Curve
from lightning_normreg._plot import History
from lightning_normreg._symmetries import Symmetries
from lightning_normreg._weights import UnitArgument, Verdict, Watched
from lightning_normreg.callbacks._epoch_means import EpochMeans
from lightning_normreg.callbacks._hyperparameters import MERGING, hyperparameters
from lightning_normreg.callbacks._norm_projection import NormProjection
from lightning_normreg.callbacks._run import batches_that_stepped, callbacks_of, log_interval, optimizers_of, run_of
from lightning_normreg.callbacks._selecting import WeightCallback
from lightning_normreg.callbacks._tensorboard import write_beside
from lightning_normreg.steps._tracker import Row, Tracker

if TYPE_CHECKING:
    import pandas as pd
    from pytorch_lightning import LightningModule, Trainer
    from torch.optim import Optimizer

PerLayer = bool | Literal["auto"]

MANY_LAYERS, SHOWN_LAYERS = 32, 8


class Monitor(WeightCallback):
    """A callback that measures updates and logs them; the subclass says which curves.

    The arguments are those of :class:`lightning_normreg.WeightNormMonitor`, which has this constructor.
    """

    waits_for_observer = True
    summaries: tuple[Curve, ...] = ()

    def __init__(
        self,
        every_n_steps: int | None = None,
        *,
        every_n_updates: int | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        unit: UnitArgument = "auto",
        invariance: str | Mapping[str, Any] | None = None,
        symmetries: str | Mapping[str, Any] | Symmetries | None = "auto",
        histograms: bool = False,
        products: bool = False,
        per_layer: PerLayer = "auto",
        logging_interval: Literal["step", "epoch"] = "step",
        prefix: str = _metrics.PREFIX,
    ) -> None:
        super().__init__(unit, include, exclude, invariance, symmetries)
        for name, every in {"every_n_steps": every_n_steps, "every_n_updates": every_n_updates}.items():
            if every is not None and not (isinstance(every, int) and every > 0):
                raise ValueError(f"`{name}` must be a positive integer or None, got {every!r}. "
                                 "Use None for the Trainer's `log_every_n_steps`.")  # fmt: skip
        if every_n_updates and (every_n_steps or histograms):
            raise ValueError("`every_n_updates` must be None with `every_n_steps`, which counts batches, and with "
                             f"`histograms`, which are of a batch's last update; got {every_n_updates!r}.")  # fmt: skip
        if per_layer not in (True, False, "auto"):
            raise ValueError(f"`per_layer` must be True, False or 'auto', got {per_layer!r}.")
        if logging_interval not in ("step", "epoch"):
            raise ValueError(f"`logging_interval` must be 'step' or 'epoch', got {logging_interval!r}.")
        if not isinstance(prefix, str) or prefix != prefix.strip("/"):
            raise ValueError(f"`prefix` must be the first part of tags, without a slash around it, got {prefix!r}. "
                             "Use for example 'generator', or '' for none.")  # fmt: skip
        self.every_n_steps, self.every_n_updates = every_n_steps, every_n_updates
        self.histograms, self.products = histograms, products
        self.per_layer = per_layer
        self.logging_interval = logging_interval
        self.prefix = prefix

    def _reset(self) -> None:
        super()._reset()
        self._tracker: Tracker | None = None
        self._beside: frozenset[str] = frozenset()
        self._history = History()
        self._means = EpochMeans()
        self._first: dict[str, float] = {}
        self._logged_once = False
        self._step = 0

    @abstractmethod
    def _make_tracker(self, watched: list[Watched]) -> Tracker:
        """The tracker that measures this monitor's curves."""

    def history(self) -> pd.DataFrame:
        """What was logged in this process, as a data frame with one row per logged update (at most 10 000, thinned).

        :func:`plot_curves` draws it.

        Raises:
            ModuleNotFoundError: If pandas is not installed.
        """
        if not self._history:
            rank_zero_warn(
                f"This {type(self).__name__} has logged nothing in this process. If a fit did log, it ran in processes "
                "that the strategy started (ddp_spawn, ddp_fork, ddp_notebook) and that took their histories with "
                "them: read the logger, or use strategy='ddp'."
            )
        return self._history.to_frame()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the selection before anything is trained."""
        super().on_fit_start(trainer, pl_module)
        self._choose_layers(self._selected(trainer))
        if not trainer.loggers:
            rank_zero_warn(
                f"The Trainer has no logger, so the curves of {type(self).__name__} go to `trainer.callback_metrics` "
                "and `history()` only. Give it one, for example Trainer(logger=TensorBoardLogger('logs'))."
            )

    def _begin(self, trainer: Trainer, pl_module: LightningModule, verdict: Verdict) -> None:
        watched = self._known(trainer, verdict)
        sets, beside = self._sets(trainer, watched, verdict)
        self._beside = frozenset(w.name for w in beside)
        if sets and self.per_layer is not False:
            self._shown |= {one.name for one in sets}
        watched = [*watched, *sets, *beside]
        if self._tracker is None:
            self._tracker = self._subscribe(trainer, self._make_tracker(watched))
            self._tracker.every = self.every_n_updates
        else:
            self._tracker.watch(watched)

    def _choose_layers(self, watched: list[Watched]) -> None:
        names = [w.name for w in watched]
        if self.per_layer is False:
            names = []
        elif self.per_layer == "auto" and len(names) > MANY_LAYERS:
            spread = [round(i * (len(names) - 1) / (SHOWN_LAYERS - 1)) for i in range(SHOWN_LAYERS)]
            rank_zero_info(
                f"{type(self).__name__} watches {len(names)} weights: it logs summaries over all of them and the "
                f"curves of {SHOWN_LAYERS}. Use per_layer=True for all curves."
            )
            names = [names[i] for i in spread]
        self._shown = frozenset(names)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the TensorBoard layout and the hyperparameters, once for all monitors."""
        super().on_train_start(trainer, pl_module)
        if not run_of(trainer).layout_written and trainer.is_global_zero:
            run_of(trainer).layout_written = True
            radii = [callback.radius for callback in callbacks_of(trainer) if isinstance(callback, NormProjection)]
            found = hyperparameters(optimizers_of(trainer), radii)
            for logger in trainer.loggers:
                write_beside(logger, self.prefix, found)
                if is_named(logger, *MERGING):
                    logger.log_hyperparams(found)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Decide whether the updates of this batch are measured."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._tracker is None:
            return
        self._step = batches_that_stepped(trainer)
        interval = self._interval(trainer)
        first = not self._logged_once and not _stand_still(optimizers_of(trainer))
        in_turn = self.every_n_updates is not None or (interval > 0 and (self._step + 1) % interval == 0)
        self._tracker.arm(interval > 0 and (first or in_turn))

    def _interval(self, trainer: Trainer) -> int:
        return self.every_n_updates or self.every_n_steps or log_interval(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read the values of this batch's last updates, or of all that are due, and log them."""
        if self._tracker is None:  # it has not begun yet
            return
        updates = self._tracker.collect_updates()
        if self.every_n_updates:
            for update in updates:
                self._step = update.number
                self._take(trainer, update.row, {}, self._tracker.total - 1 - update.number)
            return
        row: Row = {}
        times: Counter[str] = Counter()
        for update in updates:
            row |= update.row
            times.update(dict.fromkeys(update.row, update.count))
        counts: Counter[int] = Counter()
        if max(times.values(), default=1) > 1:  # the row is of the last update only
            for update in updates:
                counts[update.index] += update.count
        if row:
            self._take(trainer, row, {_metrics.updates_tag(i, self.prefix): float(n) for i, n in counts.items()})

    def _take(self, trainer: Trainer, row: Row, beside: dict[str, float], later: int = 0) -> None:
        self._logged_once = True
        self._complete(trainer, row, later)
        row = {name: layer for name, layer in row.items() if name not in self._beside}
        values = {
            _metrics.tag(curve, name, self.prefix): value
            for name, layer in row.items()
            if name in self._shown
            for curve, value in layer.items()
            if curve.of != "layers"
        }
        values |= self._summary_values(row) | self._others(trainer, row) | beside
        if self.logging_interval == "step":
            self._log(trainer, values)
        else:
            self._means.update(values)

    def _complete(self, trainer: Trainer, row: Row, later: int) -> None:
        """Add what follows from the measured values, since which there were some later updates."""

    def _others(self, trainer: Trainer, row: Row) -> dict[str, float]:
        """Values of other things than weights, by tag, beside those of weights."""
        return {}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the epoch's means."""
        if self._means.update_called:
            total = 0 if self._tracker is None else self._tracker.total
            # Where `self.log` puts what it has over an epoch.
            self._step = (total if self.every_n_updates else batches_that_stepped(trainer)) - 1
            self._log(trainer, self._means.compute())
            self._means.reset()

    def _summary_values(self, row: Row) -> dict[str, float]:
        """Minimum, median and maximum over layers; of effective rates only the ratios, see the word's definition."""
        found: dict[str, float] = {}
        for curve in self.summaries:
            values = {name: layer[curve] for name, layer in row.items() if curve in layer}
            if curve is _metrics.EFFECTIVE_LR:
                values = {name: v / first for name, v in values.items() if (first := self._reference(name, v)) > 0}
            if values:
                numbers = [*values.values()]
                shown = (min(numbers), median(numbers), max(numbers))
                for statistic, value in zip(_metrics.STATISTICS, shown, strict=True):
                    found[_metrics.summary_tag(curve, statistic, self.prefix)] = value
        return found

    def _reference(self, name: str, value: float) -> float:
        # A warm-up starts at lr 0, which nothing can be compared with: then the first positive value counts.
        if not self._first.get(name) and value > 0:
            self._first[name] = value
        return self._first.get(name, 0.0)

    def _log(self, trainer: Trainer, values: dict[str, float]) -> None:
        assert self._tracker is not None
        for logger in trainer.loggers:
            named = {tag.replace("/", logger.group_separator): value for tag, value in values.items()}
            logger.log_metrics(named, step=self._step)
        entries = torch.tensor(list(values.values()), dtype=self._tracker.dtype).unbind()
        trainer.callback_metrics.update(zip(values, entries, strict=True))
        self._history.add({"step": self._step, "epoch": trainer.current_epoch, **values})

    def state_dict(self) -> dict[str, Any]:
        """Plain types only, so that the checkpoint loads with ``weights_only=True``."""
        own = {"logged_once": self._logged_once, "first": dict(self._first), "sums": self._means.sums()}
        return super().state_dict() | own

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was written."""
        super().load_state_dict(state_dict)
        self._logged_once = state_dict["logged_once"]
        self._first = dict(state_dict["first"])
        self._means.add_sums({_metrics.retagged(tag, self.prefix): s for tag, s in state_dict["sums"].items()})


def _stand_still(optimizers: Iterable[Optimizer]) -> bool:
    """Whether a warm-up that starts at 0 lets the coming update do nothing; the device is not read."""
    rates = [group.get("lr") for optimizer in optimizers for group in optimizer.param_groups]
    return all(not isinstance(rate, torch.Tensor) and rate == 0 for rate in rates)
