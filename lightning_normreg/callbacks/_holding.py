"""What the callbacks share that hold norms: selection, first projection, state, averages."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_normreg._compat import is_named
from lightning_normreg._symmetries import OwnStep, Symmetries
from lightning_normreg._weights import UnitArgument, Verdict, Watched, listed, reshard, strong
from lightning_normreg.callbacks._averaged import AveragedWeights, find_averaging
from lightning_normreg.callbacks._first_projection import Twins, keep_the_function, twins_of
from lightning_normreg.callbacks._run import batches_that_stepped, callbacks_of, log_interval, optimizers_of, run_of
from lightning_normreg.callbacks._selecting import WeightCallback
from lightning_normreg.steps._projector import Projector, Radius, check_radius_argument
from lightning_normreg.steps._targets import OnNotInvariant, note_eps_shares

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer


OnLost = Literal["stop", "keep", "raise"]


class NormHolder(WeightCallback):
    """Holds the units of some weights at a radius, in the optimizer's step hooks; the subclass says by what.

    The arguments are those of :class:`lightning_normreg.NormProjection`, which has this constructor.
    """

    def __init__(
        self,
        radius: Radius = "auto",
        *,
        unit: UnitArgument = "auto",
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        invariance: str | Mapping[str, Any] | None = None,
        symmetries: str | Mapping[str, Any] | Symmetries | None = "auto",
        on_not_invariant: OnNotInvariant = "raise",
        on_lost: OnLost = "stop",
        twins: Twins = "follow",
        project_averaged: bool = False,
    ) -> None:
        super().__init__(unit, include, exclude, invariance, symmetries)
        check_radius_argument(radius)
        if on_not_invariant not in ("raise", "skip", "allow"):
            raise ValueError(f"`on_not_invariant` must be 'raise', 'skip' or 'allow', got {on_not_invariant!r}.")
        self.radius = radius
        if on_lost not in get_args(OnLost):
            raise ValueError(f"`on_lost` must be 'stop', 'keep' or 'raise', got {on_lost!r}.")
        if twins not in get_args(Twins):
            raise ValueError(f"`twins` must be 'follow' or 'keep', got {twins!r}.")
        self.on_not_invariant = on_not_invariant
        self.twins = twins
        self.on_lost = on_lost
        self.project_averaged = project_averaged

    @abstractmethod
    def _make_projector(self, targets: list[Watched]) -> Projector:
        """What acts on the targets at each step."""

    def _reset(self) -> None:
        super()._reset()
        self._projector: Projector | None = None
        self._projected: set[str] = set()
        self._averaging: list[Any] = []
        self._averaged: list[AveragedWeights] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the selection before anything is trained."""
        super().on_fit_start(trainer, pl_module)
        named = self._selected(trainer)
        if self.include is not None and (idle := _refuse_idle(trainer, self.include, named)):
            rank_zero_info(
                f"{type(self).__name__}(include={self.include}) takes what is trained, and leaves {listed(idle, 5)}: "
                "frozen or in no optimizer."
            )
        self._averaging = find_averaging(trainer, self, self.project_averaged)

    def _begin(self, trainer: Trainer, pl_module: LightningModule, verdict: Verdict) -> None:
        held = [] if self._projector is None else self._still_held(trainer, self._projector.targets, verdict)
        try:
            targets = self._choose(trainer, strong(verdict), self.on_not_invariant, named=self.include is not None)
            note_eps_shares(targets, verdict)
        except ValueError as error:
            if not run_of(trainer).dispatcher.has_seen_updates:
                raise
            targets = []  # a run that has come this far is not ended
            if self._projector is None:
                rank_zero_warn(f"{type(self).__name__} holds nothing. {error}")
        mine = {target.parameter for target in held}
        new = [target for target in targets if target.parameter not in mine]
        self._claim(trainer, new)
        _say_rounding(new)
        if self._projector is not None:
            self._projector.aim([*held, *new])
        elif new:
            self._projector = self._subscribe(trainer, self._make_projector(new))
            # StochasticWeightAveraging copies its average into the module, and nobody looks at it before.
            swapped = [a for a in self._averaging if hasattr(a, "_swap_models")]
            self._averaged = [AveragedWeights(a, pl_module, self._projector) for a in swapped]
            for averaged in self._averaged:
                averaged.restore(self._restored.get("averaged", {}))

    def _still_held(self, trainer: Trainer, targets: list[Watched], verdict: Verdict) -> list[Watched]:
        lost = [t for t in targets if t.invariant and t.name in verdict and not verdict[t.name].holds]
        names = listed([target.name for target in lost], 5)
        if not lost or self.on_lost == "keep":
            return targets
        if self.on_lost == "raise":
            raise RuntimeError(f"`on_lost='raise'`: {names} can no longer be held without changing the function.")
        rank_zero_warn(
            f"{type(self).__name__} holds {names} no more. on_lost='keep' goes on, and changes the function."
        )
        for target in lost:
            for parameter in target.tensors():
                run_of(trainer).claims.pop(parameter, None)
        return [target for target in targets if target not in lost]

    def _claim(self, trainer: Trainer, targets: list[Watched]) -> None:
        claims = run_of(trainer).claims
        mine = f"{type(self).__name__}(include={self.include})"
        for target in targets:
            for parameter in target.tensors():
                if parameter in claims:
                    raise ValueError(
                        f"{target.name!r} must be held by one callback, but it, or its bias, is selected by two: "
                        f"{claims[parameter]} and {mine}. RotationControl projects as well, so it needs no "
                        "NormProjection beside it. Make `include` of one narrower, or use `exclude`."
                    )
                claims[parameter] = mine

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Project before the first step, and again when a finetuning callback has handed more to an optimizer."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        projector = self._projector
        if projector is None:
            return  # it is not known yet what to hold
        optimized = projector.optimized(optimizers_of(trainer))
        names = {target.name for target in optimized}
        is_new, self._projected = bool(names - self._projected), names
        if is_new:
            reshard(trainer.model or pl_module)
            moved = projector.off(optimized)  # those at their radius are not touched, so that a run resumes bit for bit
            projector.announce(moved, optimizers_of(trainer))
            if moved:
                twins = twins_of(trainer, moved, self.twins)
                start = partial(projector.start, moved, optimizers_of(trainer), twins)
                allowed = not all(target.invariant for target in moved)
                keep_the_function(trainer, pl_module, batch, OwnStep(batch_idx), start, twins=twins, allowed=allowed)
            projector.report()
        interval = log_interval(trainer)
        projector.looking = interval > 0 and (batches_that_stepped(trainer) + 1) % interval == 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report units that are not held, at the Trainer's logging interval; project what ranks have averaged."""
        projector = self._projector
        if projector is None:
            return
        if getattr(trainer.strategy, "_model_averager", None) is not None:  # DDPStrategy averages after the step
            projector.project(projector.optimized(optimizers_of(trainer)))
        if projector.looking:
            projector.report()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Project an average that was copied into the module for an epoch of BatchNorm statistics."""
        self._project_copied(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Project the average that is about to be validated."""
        for averaged in self._averaged:
            averaged.project()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the average go on as it was."""
        for averaged in self._averaged:
            averaged.restore()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the average projected where models are loaded from, and as it is beside, for a run that resumes."""
        for averaged in self._averaged:
            averaged.project()
            checkpoint["state_dict"] |= averaged.tensors()
            averaged.restore()
            checkpoint["callbacks"][self.state_key]["averaged"] = averaged.tensors()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Project the average that the module ends with."""
        super().on_train_end(trainer, pl_module)
        self._project_copied(trainer)

    def _project_copied(self, trainer: Trainer) -> None:
        if self._projector is not None and self._averaging:
            self._projector.place(self._projector.optimized(optimizers_of(trainer)))

    def held(self) -> dict[str, tuple[float, float]]:
        """For each projected parameter the norm before the last projection and the radius (root mean squares)."""
        return {} if self._projector is None else self._projector.norms_and_radii()


def held_norms(trainer: Trainer) -> dict[str, tuple[float, float]]:
    """What :meth:`NormHolder.held` says, of all callbacks of a Trainer."""
    holders = [callback for callback in callbacks_of(trainer) if isinstance(callback, NormHolder)]
    return {name: norms for holder in holders for name, norms in holder.held().items()}


def _say_rounding(targets: list[Watched]) -> None:
    narrow = {t.parameter.dtype: t.name for t in targets if torch.finfo(t.parameter.dtype).bits < 32}
    for dtype, name in narrow.items():
        rank_zero_info(
            f"{name!r} and others are of {dtype}, which rounds each entry by up to {torch.finfo(dtype).eps / 2:.1g}: "
            "norms are held to that, not to 1e-6. Keep the weights in float32 (precision='bf16-mixed') to hold them "
            "better; norms are always computed in float32 or wider."
        )


def _refuse_idle(trainer: Trainer, include: Sequence[str], targets: list[Watched]) -> list[str]:
    """Names of weights that nothing updates, which globs may match, unless a finetuning callback may thaw them.

    Raises:
        ValueError: If one is named in full, or there are no others.
    """
    if any(is_named(callback, "BaseFinetuning") for callback in callbacks_of(trainer)):
        return []
    optimized = {t.name for t in Projector(targets, "auto").optimized(optimizers_of(trainer))}
    idle = [t for t in targets if t.name not in optimized]
    named = [t.name for t in idle if {t.name, *t.role.aliases} & {*include}]
    if named or len(idle) == len(targets):
        names = listed([repr(name) for name in named or [t.name for t in idle]], 5)
        raise ValueError(
            f"`include` must name weights that are trained, but {names} is frozen or in no optimizer. Train it, leave "
            "it out by `exclude`, or thaw it by a callback derived from BaseFinetuning."
        )
    return [t.name for t in idle]
