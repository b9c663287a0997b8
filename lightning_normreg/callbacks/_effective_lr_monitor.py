"""The callback that logs what a learning rate does to each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any, Literal, get_args

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_normreg import _metrics
from lightning_normreg._optimizers import update_rule
from lightning_normreg._reports import Comparison, Plan
from lightning_normreg._symmetries import Symmetries
from lightning_normreg._weights import UnitArgument, Verdict, Watched, listed
from lightning_normreg.callbacks._monitor import Monitor, PerLayer
from lightning_normreg.callbacks._run import optimizers_of, run_of
from lightning_normreg.steps._embedding_rows import EmbeddingRows
from lightning_normreg.steps._equilibria import Equilibria
from lightning_normreg.steps._formulas import GRADIENT_AT_NORM_1
from lightning_normreg.steps._health import Health, OnUnhealthy
from lightning_normreg.steps._rotation_tracker import RotationTracker
from lightning_normreg.steps._tracker import Row
from lightning_normreg.steps._unrounded import Unrounded

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer


Also = Literal["radial", "rows", "rounding"]


class EffectiveLRMonitor(Monitor):
    r"""Logs the effective learning rate of each weight, and how far each optimizer step really turned it.

    Behind ``prefix``, that is ``weights/``:

    * ``effective_lr/<parameter>``: :math:`\eta/n^p` with n the root mean square over units of the norm before the
      step, and p of the optimizer (2: SGD, 1: Adam, AdamW, RMSprop); equal to lr / unit_norm_rms^p of
      :class:`WeightNormMonitor`. Compare it over time;
      ``effective_lr_not_invariant/<parameter>`` where the weight is not scale-invariant and it means nothing by itself;
    * ``rotation/<parameter>``: root mean square over units of the rotation, in radians. Compare it between layers. Of
      an embedding with sparse gradients only rows that a gradient has reached count, here and in the next ones;
    * ``relative_update/<parameter>``: likewise of :math:`\lVert\Delta_u\rVert/\lVert w_u\rVert`;
    * for scale-invariant weights under decay ``equilibrium_rotation/<parameter>``, ``equilibrium_norm/…`` and
      ``equilibrium_half_life/…``: where the present learning rate and decay would settle, and in how many steps it is
      half-way there; and ``equilibrium_ratio/…``, the measured rotation over that which follows from the norm equation
      along the schedule run so far: about 1 in and out of equilibrium, as long as gradients are mostly noise;
    * with ``gradient=True`` also ``gradient_norm/…`` and ``gradient_alignment/…``, before clipping;
    * with ``scale_exponent=True`` ``scale_exponent/…``, the exponent of the step where constants such as eps move it;
    * ``layers/rotation_<min|median|max>`` and ``layers/equilibrium_ratio_…`` over layers, and
      ``layers/effective_lr_ratio_…``, the effective rate over its first logged value.

    At the end of a fit it says which layers are "consistent with equilibrium since step …" (after three relaxation
    times, 8 of the last 10 logged ratios within 15 % of 1, 35 % for Muon, and none more than twice as far off), for
    which the run was too short, and for how many nothing can be predicted, and why.

    When it runs: in the optimizer's step hooks; values are read in ``on_train_batch_end``. The first update is logged,
    then every ``every_n_steps`` batches, on the x-axis of ``LearningRateMonitor``.

    What it logs: the curves above, to every logger of the Trainer, to ``trainer.callback_metrics`` and to
    :meth:`history`. Nothing for a weight that was not updated.

    What it costs: memory for one copy of the watched weights, taken at the start; on logged steps that copy,
    five operations for each tensor (on a CPU for each 2¹⁷ entries; seven on a device without float64), one on its
    gradient and four or five for alignments, and one transfer; on others a note of the learning rate.

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
        gradient: Log the gradients' norm and alignment as well. Needs Lightning's own call of the optimizer: with
            ``self.optimizers(use_pl_optimizer=False)`` these two curves stay empty.
        equilibrium: Predict the equilibrium of decay.
        momentum_gain: Multiply the effective learning rate by the gain of momentum, (1 − τ)/(1 − β) for SGD with
            dampening τ; 1 for optimizers whose momentum is an average.
        scale_exponent: Log the exponent of each logged step. Reads the optimizer's state, so there is no curve where
            processes have parts of it only: of sharded weights, and under ZeroRedundancyOptimizer.
        on_unhealthy: What to do when a logged step shows updates that are lost to rounding, units that become zero or
            grow a hundredfold, or infinite or NaN entries: ``"warn"`` once of each, with the layer's name;
            ``"stop"``: warn, and stop the training after this batch; ``"ignore"``.
        per_layer: ``True``: curves of every layer; ``False``: only the summaries; ``"auto"``: every layer up to 32,
            above that the summaries and 8 layers spread over the depth.
        logging_interval: ``"step"``, or ``"epoch"`` for the mean over an epoch's logged steps.
        prefix: First part of every tag.
        also: Curves that are logged on request. ``"radial"``: the part of the update along the weight,
            ``radial_share/<parameter>``, and what decoupled decay and the gradients did of it, ``radial_share_decay/…``
            and ``radial_share_gradient/…``. ``"rows"``: of each embedding the rotation of the rows that were looked up
            never, seldom and often since the last logged step, ``rotation_never/…``, ``rotation_seldom/…`` and
            ``rotation_often/…``; a further read of embeddings at logged steps, and their inputs are counted in each.
            ``"rounding"``: for weights in bfloat16 or float16 that are not sharded, ``rotation_unrounded/…``, by what
            the step would turn them without rounding; a second step in float32 on copies of weights, gradients and the
            optimizer's state, at logged steps.
        plan: What was predicted, by ``lightning-normreg plan --save`` or :func:`lightning_normreg.plan`, as a file or
            what is in it: logged beside what is measured, as ``planned_rotation/…`` and ``planned_norm/…``, and at the
            end of a fit it is said where and when they part (8 of 10 logged steps more than 15 % off, to one side).
        progress_bar: Show the median effective learning rate over the scale-invariant layers in the progress bar, as
            ``effective_lr``, on logged steps anew.

    Raises:
        ValueError: For an argument out of its range, before training starts.

    Examples:
        >>> from pytorch_lightning import Trainer
        >>> trainer = Trainer(callbacks=[EffectiveLRMonitor(every_n_steps=10)], logger=False)

    Reference:
        van Laarhoven 2017, https://arxiv.org/abs/1706.05350.
    """

    summaries = (_metrics.ROTATION, _metrics.EFFECTIVE_LR, _metrics.EQUILIBRIUM_RATIO, _metrics.ROTATION_SPIKE)

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
        gradient: bool = False,
        equilibrium: bool = True,
        momentum_gain: bool = False,
        scale_exponent: bool = False,
        on_unhealthy: OnUnhealthy = "warn",
        per_layer: PerLayer = "auto",
        logging_interval: Literal["step", "epoch"] = "step",
        prefix: str = _metrics.PREFIX,
        progress_bar: bool = False,
        also: Sequence[Also] = (),
        plan: str | Mapping[str, Any] | Plan | None = None,
    ) -> None:
        super().__init__(
            every_n_steps=every_n_steps,
            every_n_updates=every_n_updates,
            include=include,
            exclude=exclude,
            unit=unit,
            invariance=invariance,
            symmetries=symmetries,
            per_layer=per_layer,
            logging_interval=logging_interval,
            prefix=prefix,
        )
        if isinstance(also, str) or not set(also) <= {*get_args(Also)}:
            raise ValueError(f"`also` must be a list of {', '.join(map(repr, get_args(Also)))}, got {also!r}.")
        if on_unhealthy not in get_args(OnUnhealthy):
            raise ValueError(f"`on_unhealthy` must be 'warn', 'stop' or 'ignore', got {on_unhealthy!r}.")
        self.gradient = gradient
        self.equilibrium = equilibrium
        self.momentum_gain = momentum_gain
        self.scale_exponent = scale_exponent
        self.on_unhealthy = on_unhealthy
        self.progress_bar = progress_bar
        self.also = also
        self.plan = plan
        self._plan = None if plan is None else Plan.load(plan)

    def _reset(self) -> None:
        super()._reset()
        self._equilibria: Equilibria | None = None
        self._steps_planned: float | None = None
        self._rows: EmbeddingRows | None = None
        self._unrounded: Unrounded | None = None
        self._comparison: Comparison | None = None

    def _make_tracker(self, watched: list[Watched]) -> RotationTracker:
        return RotationTracker(
            watched,
            momentum_gain=self.momentum_gain,
            exponents=self.scale_exponent,
            equilibrium=self.equilibrium or self._plan is not None,
            gradient=self.gradient,
            radial="radial" in self.also,
            health=Health(silent=self.on_unhealthy == "ignore"),
        )

    def _begin(self, trainer: Trainer, pl_module: LightningModule, verdict: Verdict) -> None:
        super()._begin(trainer, pl_module, verdict)
        tracker = self._rotations()
        tracker.explain_rules(optimizers_of(trainer))
        if self._plan is not None:
            self._follow_plan(trainer, self._plan, {w.name for w in tracker.watched})
        if not self._interval(trainer):
            return
        size = sum(tracker.allocate(optimizer) for optimizer in optimizers_of(trainer))
        rank_zero_info(f"EffectiveLRMonitor keeps a copy of the watched weights: {size / 1e6:.3g} MB.")
        if self._equilibria is not None:
            self._equilibria.watch(tracker.watched)
        elif self.equilibrium:
            self._equilibria = self._subscribe(
                trainer, Equilibria(tracker.watched, run_of(trainer).claims.__contains__)
            )

        if "rows" in self.also and self._rows is None:
            self._rows = self._subscribe(trainer, EmbeddingRows(tracker.watched, pl_module, tracker.is_due))
        if "rounding" in self.also and self._unrounded is None:
            self._unrounded = self._subscribe(trainer, Unrounded(tracker.watched, tracker.is_due))

    def _follow_plan(self, trainer: Trainer, plan: Plan, names: set[str]) -> None:
        if self._comparison is not None:
            return
        self._comparison = Comparison(plan)
        if missing := self._comparison.check_names(names):
            rank_zero_warn(f"The plan has {listed(missing, 5)}, which are not watched here.")
        if self._planned(trainer) != plan.steps:
            rank_zero_warn(
                f"The plan is of {plan.steps} steps, and this run has {self._planned(trainer):g}: its schedule may be "
                "another. Plan the run as it is."
            )

    def _end(self, trainer: Trainer) -> None:
        super()._end(trainer)
        if self._rows is not None:
            self._rows.remove()

    def _complete(self, trainer: Trainer, row: Row, later: int) -> None:
        if self._equilibria is not None:
            self._equilibria.update(row, optimizers_of(trainer), self._step, later)
        for one in (self._rows, self._unrounded):
            for name, rotations in ({} if one is None else one.collect()).items():
                if name in row:  # else the update was not made
                    row[name].update(rotations)
        needed = (_metrics.ROTATION, _metrics.UNIT_NORM_RMS, _metrics.EFFECTIVE_LR)
        for name, values in row.items():  # not all of them are there where it is unknown what is scale-invariant
            if self._comparison is not None and values.keys() >= {*needed}:
                values.update(self._comparison.add(self._step, name, *(values[curve] for curve in needed)))
        for values in row.values():  # what only the prediction needs
            values.pop(_metrics.UNIT_NORM_RMS, None)
            values.pop(GRADIENT_AT_NORM_1, None)
        rates = [values[_metrics.EFFECTIVE_LR] for values in row.values() if _metrics.EFFECTIVE_LR in values]
        if self.progress_bar and rates:
            trainer.lightning_module.log("effective_lr", median(rates), prog_bar=True, logger=False)
        alarms = self._rotations().health.alarms
        if alarms and self.on_unhealthy == "stop" and not trainer.should_stop:
            trainer.should_stop = True
            found = "; ".join(f"{name!r}: {what}" for name, what in alarms.items())
            rank_zero_info(f"EffectiveLRMonitor(on_unhealthy='stop') stops the training. {found}.")

    def _others(self, trainer: Trainer, row: Row) -> dict[str, float]:
        """How long decay takes, as a share of the run."""
        found = {}
        optimizers = optimizers_of(trainer)
        for index, optimizer in enumerate(optimizers):
            for number, group in enumerate(optimizer.param_groups):
                rule = update_rule(optimizer, group)
                gain = None if rule is None else rule.decay_gain(group)
                if rule is not None and gain and group.get("weight_decay"):
                    name = f"{index}." * (len(optimizers) > 1) + str(group.get("name", number))
                    off = float(rule.lr(group)) * gain * float(group["weight_decay"]) * self._planned(trainer)
                    found[_metrics.tag(_metrics.TIMESCALE, name, self.prefix)] = 1 / off if off > 0 else 0.0
        return {tag: value for tag, value in found.items() if value > 0}

    def _planned(self, trainer: Trainer) -> float:
        """Optimizer steps of the whole run, inf where it has no end."""
        if self._steps_planned is None:
            self._steps_planned = float(trainer.estimated_stepping_batches)
        return self._steps_planned

    def equilibrium_status(self) -> list[str]:
        """Which layers are at equilibrium and since when, which are not, and for which the run is too short."""
        words = {} if self._equilibria is None else self._equilibria.words()
        return [f"{listed(names)}: {said}." for said, names in words.items()]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say which layers have come to equilibrium."""
        super().on_train_end(trainer, pl_module)
        for said in [*self.equilibrium_status(), *self.plan_status()]:
            rank_zero_info(said)

    def plan_status(self) -> list[str]:
        """Where and when the run has parted from its plan, and what it did as planned; empty without a plan."""
        return [] if self._comparison is None else self._comparison.sentences()

    def _rotations(self) -> RotationTracker:
        assert isinstance(self._tracker, RotationTracker)
        return self._tracker
