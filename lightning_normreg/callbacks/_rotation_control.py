"""The callback that makes the learning rate an angle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_normreg._symmetries import Symmetries
from lightning_normreg._weights import UnitArgument, Verdict, Watched, listed
from lightning_normreg.callbacks._first_projection import Twins
from lightning_normreg.callbacks._holding import NormHolder, OnLost
from lightning_normreg.callbacks._run import batches_that_stepped, optimizers_of, run_of
from lightning_normreg.functional._rotation import Per
from lightning_normreg.steps._angles import Angles
from lightning_normreg.steps._projector import Radius
from lightning_normreg.steps._replay import Over, Replay
from lightning_normreg.steps._rotator import Hold, Rotator, check_control_arguments
from lightning_normreg.steps._targets import OnNotInvariant

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

    from lightning_normreg._plot import Source


class RotationControl(NormHolder):
    r"""Turns weights by a given angle in each optimizer step, so that the learning rate is an angle in radians.

    The optimizer gives the direction. Of its update the part :math:`t_u` across each unit is kept, and rescaled so that
    the layer's rotation, as a root mean square over its units, is the angle; then each unit is put on the great
    circle at its radius (:func:`lightning_normreg.functional.rotate_`):

    .. math:: w_u\leftarrow R\,(\hat w_u\cos\theta_u+\hat t_u\sin\theta_u),\qquad
        \theta_u=\theta\,\frac{\lVert t_u\rVert/\lVert w_u\rVert}
        {\sqrt{\operatorname{mean}_v(\lVert t_v\rVert/\lVert w_v\rVert)^2}}.

    Then nothing but the schedule decides how fast the directions of scale-invariant weights move: not the initial
    scale, not decoupled decay (nor any decay of plain SGD), with SGD and momentum not the scale of the loss. Decay
    that an optimizer adds to the gradient, and so to momentum or second moments, still turns weights; it is said.

    When to use it: to tune one learning rate for all layers, to compare optimizers at the same rotation, to go from
    one optimizer or loss scale to another without a search from scratch. When not: to reproduce a published recipe
    (:class:`NormProjection` or decay keep it), and where the size of gradients is to end the training by itself: a
    step never gets small unless the schedule does.

    How to tune: start at 0.01 to 0.03 with ``angle="lr"`` (more for a few hundred steps only), and let the schedule go
    to 0. From a recipe with decay: ``angle="equilibrium"``. All other weights keep the learning rate as it is: give
    them a group of their own where the two differ.

    When it runs: before the first step as :class:`NormProjection`, then in the optimizer's step post-hook, before the
    monitors measure the step. The optimizer's state is left as it is.

    What it logs: nothing by itself; with :class:`EffectiveLRMonitor` ``rotation/…`` is the rotation after
    control, and ``rotation_factor/…`` by what the optimizer's own was multiplied. Reported once for each weight: units
    that are zero or not finite, that were capped at π/2, or whose update is so small that rounding shows in it.

    What it costs: one copy of the controlled weights, allocated at the start and shared with EffectiveLRMonitor. For
    each tensor eight operations on a CPU, ten on a GPU, twelve without float64; on a CPU about 4 to 5½ times the
    time of NormProjection (``python -m tests.benchmarks.table_cost``). No transfer; of sharded weights one all-reduce
    per step.

    Args:
        angle: ``"lr"``: the live learning rate of the weight's parameter group, in radians; a number: that angle;
            ``"equilibrium"``: the rotation per step at which the live learning rate and decay would settle, for AdamW
            √(2ηλ(1−β₁)/(1+β₁)) (:func:`lightning_normreg.functional.equilibrium_rotation`); ``"run"``: that of
            ``replay``, which need not be said where it is given.
        replay: The log of another run: its folder or file (TensorBoard, CSV), or ``history()`` of its
            EffectiveLRMonitor. Each weight turns as its namesake did there (``rotation/…``), interpolated between
            logged steps, before the first and after the last as there; steps are those of ``self.log``. Weights without
            a namesake are left alone, and named. With ``per="unit"`` every unit turns as the layer did.
        replay_over: ``"steps"``: each step turns as the step of that number; ``"share"``: from the first step to the
            last planned one the angles go from the first to the last logged one.
        unit: ``"auto"``: the units that are scale-invariant; ``"neuron"``: one output row; ``"column"``: what one input
            feeds into all neurons; ``"layer"``: the whole tensor; ``"set"``: the units that are scale-invariant, and
            sets of tensors that are so together: one norm, by default that at the start, which changes nothing, and one
            angle.
        per: ``"layer"``: the root mean square over a weight's units has the angle, and units keep their relative
            speeds, none above π/2; ``"unit"``: every unit has it.
        hold: ``"step"``: each step has the angle; ``"mean"``: steps have it on average (the root of a decaying mean of
            squares over about 100 steps, of updates over their learning rate), so that quiet steps stay quiet.
        radius: Norm of each unit, which makes a difference only to absolute constants such as Adam's eps: ``"auto"``: 1
            for a neuron or column, √k for a layer of k neurons, √fan_in for a neuron under weight standardization;
            ``"initial"``: what it was at the start, or of a zero unit what its first update makes it; a number.
        include: Globs over clean parameter names; by default all weights and embeddings that are scale-invariant. A
            glob takes what is trained, and one that matches nothing is an error.
        exclude: Globs of parameters to leave out.
        invariance: Which units are scale-invariant, as a file of ``save_verdict`` or what is in it; by default the
            model is probed at the first batch (:func:`find_scale_invariance`), once for all callbacks.
        symmetries: For ``unit="set"``, all scaling symmetries as a file of :meth:`Symmetries.save` or what is in it; by
            default they are looked for on the first batch (:func:`find_symmetries`), where 60 passes are enough.
        on_not_invariant: What to do with a weight that ``include`` names and that is not known to be scale-invariant:
            ``"raise"``, ``"skip"`` it, or ``"allow"`` it: then the control changes what the network computes.
        on_lost: What to do when gradients of training show that a weight is no longer scale-invariant: ``"stop"``
            holding it, and say so; ``"keep"`` on, which changes the function; ``"raise"`` a RuntimeError.
        twins: What the first projection does with copies of its weights that no optimizer updates: ``"follow"`` or
            ``"keep"``, see :class:`NormProjection`.
        project_averaged: Project the weights that a WeightAveraging, EMAWeightAveraging or StochasticWeightAveraging
            callback before this one averages, for validation, checkpoints and the end of the run.

    Raises:
        ValueError: Before the first step, for what :class:`NormProjection` refuses; for a learning rate that is to be
            an angle and not in [0, π), also later in the run; for ``angle="equilibrium"`` where there is no decay, or
            its rotation depends on the gradients; for a ``replay`` that is no log of one run with rotations, in which
            no controlled weight has a namesake, or that is shorter than the run.

    Examples:
        >>> from pytorch_lightning import Trainer
        >>> trainer = Trainer(callbacks=[RotationControl()], logger=False)

    Reference:
        Kosson et al. 2024, "Rotational Equilibrium", https://arxiv.org/abs/2305.17212, whose rotational optimizers are
        ``per="unit", hold="mean"``; van Laarhoven 2017, https://arxiv.org/abs/1706.05350, section "Discussion", for
        what is left to do.
    """

    def __init__(
        self,
        angle: float | Literal["lr", "equilibrium", "run"] = "lr",
        *,
        replay: Source | None = None,
        replay_over: Over = "steps",
        unit: UnitArgument = "auto",
        per: Per = "layer",
        hold: Hold = "step",
        radius: Radius = "auto",
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        invariance: str | Mapping[str, Any] | None = None,
        symmetries: str | Mapping[str, Any] | Symmetries | None = "auto",
        on_not_invariant: OnNotInvariant = "raise",
        on_lost: OnLost = "stop",
        twins: Twins = "follow",
        project_averaged: bool = False,
    ) -> None:
        super().__init__(
            radius,
            unit=unit,
            include=include,
            exclude=exclude,
            invariance=invariance,
            symmetries=symmetries,
            on_not_invariant=on_not_invariant,
            on_lost=on_lost,
            twins=twins,
            project_averaged=project_averaged,
        )
        check_control_arguments(per, hold)
        self._replay = None if replay is None else Replay(replay, replay_over)
        if self._replay is None:
            if angle == "run":
                raise ValueError("`replay` must be the log of a run with angle='run', got None. Give its folder.")
            Angles(angle)
        elif angle not in ("lr", "run") or hold == "mean":
            raise ValueError(
                f"`angle` must be 'run' and `hold` 'step' with `replay`, whose curves have the ups and downs of single "
                f"steps, got angle={angle!r}, hold={hold!r}. Leave them out."
            )
        self.angle: float | Literal["lr", "equilibrium", "run"] = angle if replay is None else "run"
        self.replay, self.replay_over = replay, replay_over
        self.per = per
        self.hold = hold

    def _make_projector(self, targets: list[Watched]) -> Rotator:
        angle = self._logged if self.angle == "run" else self.angle
        return Rotator(targets, self.radius, angle, per=self.per, hold=self.hold)

    def _choose(self, trainer: Trainer, verdict: Verdict, otherwise: OnNotInvariant, *, named: bool) -> list[Watched]:
        targets = super()._choose(trainer, verdict, otherwise, named=named)
        if self._replay is None or not targets:
            return targets
        logged = self._replay.curves
        without = [target.name for target in targets if target.name not in logged]
        known = {name for name, _, _ in run_of(trainer).named} | {target.name for target in targets}
        unused = [name for name in logged if name not in known]
        ours, theirs = listed(without, 5), listed(unused, 5)
        if len(without) == len(targets):
            raise ValueError(
                f"`replay` must be the log of a model with weights of the same names, but it has {listed([*logged], 5)}"
                f" and none of {ours}. Rename the columns of a data frame, history(), that was logged elsewhere."
            )
        if without:
            rank_zero_warn(
                f"RotationControl leaves {ours} alone: `replay` has no rotation of that name. Log it by "
                "EffectiveLRMonitor(per_layer=True), by `include` where it is no weight of a layer."
            )
        if unused:
            rank_zero_warn(f"`replay` has rotations of {theirs}, of which no weights are here. Sets need unit='set'.")
        return [target for target in targets if target.name in logged]

    def _begin(self, trainer: Trainer, pl_module: LightningModule, verdict: Verdict) -> None:
        if self._replay is not None:
            # An optimizer steps once in a batch, whatever their number; max_steps counts the steps of all.
            planned = float(trainer.estimated_stepping_batches)
            if trainer.max_steps > 0:
                planned = min(planned, trainer.max_steps / len(trainer.optimizers))
            self._logged = partial(self._angle_of, trainer, self._replay.speed(planned))
        super()._begin(trainer, pl_module, verdict)
        if self._projector is None:
            return
        rotator = self._rotator()
        copied = sum(p.numel() * p.element_size() for t in rotator.targets for p in t.tensors())
        shared = copied - rotator.allocate(optimizers_of(trainer))
        also = f", of which {shared / 1e6:.3g} MB are those of EffectiveLRMonitor" if shared > 0 else ""
        rank_zero_info(f"RotationControl keeps a copy of the controlled weights: {copied / 1e6:.3g} MB{also}.")

    def _angle_of(self, trainer: Trainer, speed: float, name: str) -> float:
        assert self._replay is not None
        return self._replay.angle(name, batches_that_stepped(trainer) * speed)

    def _rotator(self) -> Rotator:
        assert isinstance(self._projector, Rotator)
        return self._projector

    def counts(self) -> dict[str, dict[str, int]]:
        """Of each weight, in units and steps: ``updates``, ``capped``, ``steered`` by rounding, ``still`` with all."""
        return {} if self._projector is None else self._rotator().counts()
