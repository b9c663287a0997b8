"""How far a step turned the watched weights, and what that says of its learning rate."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn.parameter import Parameter
from torch.optim import Optimizer

from lightning_normreg import _metrics
from lightning_normreg._metrics import Curve
from lightning_normreg._optimizers import Group, UpdateRule, scale_exponent, update_rule, why_no_rule
from lightning_normreg._weights import Later, SumOverShards, Watched, at_once, gradient_of
from lightning_normreg.functional import effective_lr
from lightning_normreg.functional._norms import root_mean_square
from lightning_normreg.functional._updates import Step
from lightning_normreg.steps._formulas import GRADIENT_AT_NORM_1, needs_gradient
from lightning_normreg.steps._health import Health, signs
from lightning_normreg.steps._step_hooks import Recording, of_mine
from lightning_normreg.steps._tracker import Measured, Stepping, Tracker

_MEMORY = 0.9
"""Of the average over measured steps that the size of the gradients is taken from."""


class RotationTracker(Tracker, Recording):
    """Effective learning rate, rotation and relative update of the watched weights in each update.

    Args:
        watched: The weights.
        momentum_gain: Include the gain of the optimizer's momentum in the effective learning rate.
        exponents: Measure the exponent of each step as well.
        equilibrium: Measure what the equilibrium of decay depends on as well.
        health: Judges what is measured.
    """

    def __init__(
        self,
        watched: Sequence[Watched],
        *,
        momentum_gain: bool = False,
        exponents: bool = False,
        equilibrium: bool = False,
        health: Health | None = None,
    ) -> None:
        Tracker.__init__(self, watched, health)
        Recording.__init__(self)
        self._momentum_gain = momentum_gain
        self._exponents = exponents
        self._equilibrium = equilibrium
        self.powers: dict[str, tuple[Tensor, float]] = {}
        self._gradients: dict[int, _Gradients] = {}
        self._inside: set[int] = set()

    def arm(self, due: bool) -> None:
        """Start a batch."""
        super().arm(due)
        self._inside.clear()  # a step without gradients, or a closure that raised, has had no post-hook

    def before_step(self, index: int, optimizer: Optimizer) -> None:
        """Copy the weights into buffers that are kept for the next time."""
        if not self.due:
            return
        self._inside.add(index)
        if self._gradients.get(index, _NO_GRADIENTS).inside:
            del self._gradients[index]  # of an update that never came
        self.record.copy(self._parameters(optimizer))

    def allocate(self, optimizer: Optimizer) -> int:
        """Make the buffers for an optimizer's weights, so that memory runs out at the start or never; the new bytes."""
        return self.record.allocate(self._parameters(optimizer))

    def _parameters(self, optimizer: Optimizer) -> list[Parameter]:
        return [p for watched in self.optimized(optimizer) for p in watched.tensors()]

    def record_gradients(self, index: int, optimizer: Optimizer, scale: float = 1.0) -> None:
        """Measure the gradients as they are before clipping, at the weights that the update starts from.

        Args:
            index: Index of the optimizer.
            optimizer: The optimizer, whose gradients are ready.
            scale: Loss scale that is still in the gradients.
        """
        inside = index in self._inside
        if not self.due or (inside and self._gradients.get(index, _NO_GRADIENTS).inside):
            return  # a closure that is evaluated again (LBFGS) is at other weights by now
        mine = [watched for watched, _, _ in of_mine([optimizer], self._by_parameter, ready=True)]
        measured = at_once(_norm_and_alignment, mine)
        values: dict[Parameter, dict[Curve, Tensor]] = {
            watched.parameter: {_metrics.GRADIENT_NORM: norm / scale, _metrics.GRADIENT_ALIGNMENT: aligned}
            for watched, (norm, aligned) in zip(mine, measured, strict=True)
        }
        self._gradients[index] = _Gradients(values, inside)

    def after_step(self, index: int, optimizer: Optimizer, skipped: Tensor | None) -> None:
        """Measure the update, and forget its gradients."""
        super().after_step(index, optimizer, skipped)
        self._gradients.pop(index, None)
        self._inside.discard(index)

    def measure(self, index: int, optimizer: Optimizer, stepping: Stepping) -> list[Measured]:
        """The curves of one update."""

        def ask(one: tuple[Watched, Group, Optimizer], total: SumOverShards) -> Later[tuple[Step, Tensor]]:
            watched, group, _ = one
            controlled = watched.parameter in self.record.factors
            rule = update_rule(optimizer, group)
            shrink = 0.0 if controlled or rule is None else rule.decay_share(group)
            step = watched.step_later(total, self.record.copies.__getitem__, shrink)
            gradients = watched.norms_later(total, gradient_of)
            return lambda: (step(), gradients())

        found = []
        for (watched, group, _), (step, gradients) in zip(stepping, at_once(ask, stepping), strict=True):
            rule = update_rule(optimizer, group)
            values = self._rates(watched, rule, group, step)
            if watched.parameter in self.record.factors:
                values[_metrics.ROTATION_FACTOR] = self.record.factors[watched.parameter]
            values.update(self._gradients.get(index, _NO_GRADIENTS).values.get(watched.parameter, {}))
            exponent = scale_exponent(optimizer, watched.parameter) if self._exponents else None
            if exponent is not None:
                values[_metrics.SCALE_EXPONENT] = exponent
            if self._equilibrium and watched.invariant and needs_gradient(rule):
                values[GRADIENT_AT_NORM_1] = self._gradient_at_norm_1(watched.name, gradients * step.norm)
            found.append(Measured(values, _signs(step, gradients, group)))
        return found

    def _rates(self, watched: Watched, rule: UpdateRule | None, group: Group, step: Step) -> dict[Curve, Tensor]:
        values: dict[Curve, Tensor] = {}
        norm = root_mean_square(step.norm)
        if rule is not None and rule.exponent and rule.lr_is_used:
            curve = _metrics.EFFECTIVE_LR_NOT_INVARIANT if watched.invariant is False else _metrics.EFFECTIVE_LR
            gain = rule.momentum_gain(group) if self._momentum_gain else 1.0
            values[curve] = effective_lr(rule.lr(group), norm, rule.exponent) * gain
        values[_metrics.ROTATION] = root_mean_square(step.angle())
        values[_metrics.RELATIVE_UPDATE] = root_mean_square(step.relative())
        if self._equilibrium and watched.invariant:
            values[_metrics.UNIT_NORM_RMS] = norm
        return values

    def _gradient_at_norm_1(self, name: str, products: Tensor) -> Tensor:
        """Mean over units of the gradient's norm times the unit's, each smoothed as a root mean square over steps.

        The gradient is that which the optimizer has used, clipped or not. At equilibrium the square of a unit's norm
        is proportional to this product, so is the mean square norm to its mean over units.
        """
        new = products.square()
        old, weight = self.powers.get(name, (torch.zeros_like(new), 0.0))
        old = old.to(new.device)
        smoothed = torch.where(new.isfinite(), _MEMORY * old + (1 - _MEMORY) * new, old)
        weight = _MEMORY * weight + 1 - _MEMORY
        self.powers[name] = (smoothed, weight)
        return (smoothed / weight).sqrt().mean()

    def explain_rules(self, optimizers: Iterable[Optimizer]) -> None:
        """Say once why an optimizer's weights have no curve of the effective learning rate."""
        mine = of_mine(optimizers, self._by_parameter)
        for said in dict.fromkeys(_about_rule(optimizer, group) for _, group, optimizer in mine):
            if said:
                rank_zero_warn(said)


@dataclass(frozen=True)
class _Gradients:
    values: dict[Parameter, dict[Curve, Tensor]]
    inside: bool  # recorded between pre-hook and post-hook, that is by a closure


_NO_GRADIENTS = _Gradients({}, inside=False)


def _norm_and_alignment(watched: Watched, total: SumOverShards) -> Later[tuple[Tensor, Tensor]]:
    norm, cosines = watched.whole_norm_later(total, gradient_of), watched.alignment_later(total)
    return lambda: (norm(), root_mean_square(cosines()))


def _signs(step: Step, gradients: Tensor, group: Group) -> Tensor:
    return signs(
        step.norm,
        wild=~(step.norm.isfinite() & step.update.isfinite()),
        lost=step.update == 0,
        steered=(gradients > 0) & (group.get("lr") != 0),
    )


def _about_rule(optimizer: Optimizer, group: dict[str, Any]) -> str:
    name, rule, why = type(optimizer).__name__, update_rule(optimizer, group), why_no_rule(optimizer, group)
    left_out = f"`effective_lr` is left out for the weights of {name}: "
    if why:
        return f"{left_out}it {why}. The rotation is measured all the same."
    if rule is None:
        return (
            f"{left_out}how its step depends on the weight's norm is not known. Say it by register_update_rule({name}, "
            "exponent=…, decay=…); the rotation is measured all the same."
        )
    if rule.exponent:
        return "" if rule.lr_is_used else f"{left_out}it {rule.note}."
    note = f" It {rule.note}." if rule.note else ""
    return f"{left_out}its step grows with the weight (p = 0), so the norm does not change the rotation per step.{note}"
