"""How far a step turned the watched weights, and what that says of its learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_normreg import _metrics
from lightning_normreg._metrics import Curve
from lightning_normreg._optimizers import Group, UpdateRule, scale_exponent, unequal, update_rule, why_no_rule
from lightning_normreg._weights import Table, Watched
from lightning_normreg.functional import effective_lr
from lightning_normreg.functional._lengths import Lengths
from lightning_normreg.steps._formulas import GRADIENT_AT_NORM_1, needs_gradient
from lightning_normreg.steps._health import Health, signs
from lightning_normreg.steps._record import Look, SeenGradients
from lightning_normreg.steps._step_hooks import of_mine
from lightning_normreg.steps._tracker import Measured, Stepping, Tracker, as_column

_SMOOTH = 0.9
"""Of the average over measured steps that the size of the gradients is taken from."""


class RotationTracker(Tracker):
    """Effective learning rate, rotation and relative update of the watched weights in each update.

    Args:
        watched: The weights.
        momentum_gain: Include the gain of the optimizer's momentum in the effective learning rate.
        exponents: Measure the exponent of each step as well.
        equilibrium: Measure what the equilibrium of decay depends on as well.
        gradient: Measure the gradients before clipping as well, when a loop says that they are ready
            (``dispatcher.gradients_ready``).
        radial: Say what part of the update is along the weight, and whose doing that is.
        health: Judges what is measured.
    """

    def __init__(
        self,
        watched: Sequence[Watched],
        *,
        momentum_gain: bool = False,
        exponents: bool = False,
        equilibrium: bool = False,
        gradient: bool = False,
        radial: bool = False,
        health: Health | None = None,
    ) -> None:
        super().__init__(watched, health)
        self._momentum_gain = momentum_gain
        self._exponents = exponents
        self._equilibrium = equilibrium
        self._gradient = gradient
        self._radial = radial
        self._explained: set[str] = set()
        self._powers: dict[str, tuple[Tensor, float]] = {}

    def before_step(self, index: int, optimizer: Optimizer) -> None:
        """Ask for copies of the weights."""
        if self.is_due(index):
            self.record.want(self.optimized(optimizer), updates=True, gradients=True)

    def allocate(self, optimizer: Optimizer) -> int:
        """Make the buffers for an optimizer's weights, so that memory runs out at the start or never; the new bytes."""
        return self.record.allocate(p for watched in self.optimized(optimizer) for p in watched.tensors())

    def gradients_ready(self, index: int, optimizer: Optimizer, scale: float | None) -> None:
        """Measure the gradients as they are before clipping, at the weights that the update starts from."""
        if self.is_due(index) and self._gradient and scale is not None and (mine := self.optimized(optimizer)):
            table = self.record.table(mine)
            self.record.seen[index, self] = SeenGradients(table, table.gradients(), scale)

    def after_step(self, index: int, optimizer: Optimizer, skipped: Tensor | None) -> None:
        """Measure the update, and forget its gradients."""
        super().after_step(index, optimizer, skipped)
        self.record.seen.pop((index, self), None)

    def measure(self, look: Look, stepping: Stepping) -> tuple[list[Measured], Tensor]:
        """The curves of one update."""
        assert look.lengths is not None
        assert look.gradients is not None
        table, lengths = look.table, look.lengths
        by_key = {watched.key: (watched, group, optimizer) for watched, group, optimizer in stepping}
        mine = [by_key.get(w.key) for w in table.watched]
        rules = [None if one is None or _has_many_rates(one) else update_rule(one[2], one[1]) for one in mine]
        everything = frozenset(watched.name for watched, _, _ in stepping)
        norm = table.root_mean_squares(lengths.norm)
        reached = table.reached(look.gradients)
        found = [
            Measured(_metrics.ROTATION, table, table.root_mean_squares(lengths.rotation(), reached), everything),
            Measured(_metrics.RELATIVE_UPDATE, table, table.root_mean_squares(lengths.relative(), reached), everything),
            *self._rates(table, mine, rules, norm),
            *_shares(table, lengths.norm),
        ]
        factors = [self.record.factors.get(w.key) for w in table.watched]
        found += _stacked(_metrics.ROTATION_FACTOR, table, factors)
        if self in look.seen:
            seen, gradient, norms = look.seen[self]
            found.append(Measured(_metrics.GRADIENT_NORM, seen, norms, everything))
            aligned = seen.root_mean_squares(gradient.cosine(), seen.reached(gradient.update()))
            found.append(Measured(_metrics.GRADIENT_ALIGNMENT, seen, aligned, everything))
        if self._radial:
            found += _radial_shares(table, lengths, mine, rules)
        if self._exponents:
            exponents = [None if one is None else scale_exponent(one[2], one[0].parameter) for one in mine]
            found += _stacked(_metrics.SCALE_EXPONENT, table, exponents)
        if self._equilibrium:
            invariant = [one is not None and bool(one[0].invariant) for one in mine]
            found.append(Measured(_metrics.UNIT_NORM_RMS, table, norm, _names(mine, invariant)))
            needed = [is_it and needs_gradient(rule) for is_it, rule in zip(invariant, rules, strict=True)]
            if any(needed):
                size = self._gradients_at_norm_1(table, needed, look.gradients * lengths.norm)
                found.append(Measured(GRADIENT_AT_NORM_1, table, size, _names(mine, needed)))
        still = table.column([one is not None and one[1].get("lr") == 0 for one in mine]) > 0
        return found, signs(table, lengths.norm, lengths, (look.gradients > 0) & ~still)

    def _rates(
        self, table: Table, mine: Sequence[_Mine], rules: Sequence[UpdateRule | None], norm: Tensor
    ) -> list[Measured]:
        """Effective learning rates, of weights that are scale-invariant and of others apart."""
        found = []
        for exponent in (1, 2):
            known = [rule is not None and rule.exponent == exponent and rule.lr_is_used for rule in rules]
            if not any(known):
                continue
            lrs: list[float | Tensor] = [
                rule.lr(one[1]) * (rule.momentum_gain(one[1]) if self._momentum_gain else 1.0)
                if is_known and rule is not None and one is not None
                else 0.0
                for is_known, rule, one in zip(known, rules, mine, strict=True)
            ]
            rates = effective_lr(as_column(lrs, norm), norm, exponent)
            odd = [
                is_known and one is not None and one[0].invariant is False
                for is_known, one in zip(known, mine, strict=True)
            ]
            usual = [is_known and not is_odd for is_known, is_odd in zip(known, odd, strict=True)]
            found.append(Measured(_metrics.EFFECTIVE_LR, table, rates, _names(mine, usual)))
            found.append(Measured(_metrics.EFFECTIVE_LR_NOT_INVARIANT, table, rates, _names(mine, odd)))
        return found

    def _gradients_at_norm_1(self, table: Table, needed: Sequence[bool], products: Tensor) -> Tensor:
        """Mean over units of the gradient's norm times the unit's, each smoothed as a root mean square over steps.

        The gradient is that which the optimizer has used, clipped or not. At equilibrium the square of a unit's norm
        is proportional to this product, so is the mean square norm to its mean over units.
        """
        new = products.square()
        names = [w.name for w in table.watched]
        kept = [self._powers.get(name) for name in names]
        old = torch.cat(
            [
                new.new_zeros(size) if one is None else one[0].to(new)
                for one, size in zip(kept, table.sizes, strict=True)
            ]
        )
        smoothed = torch.where(new.isfinite(), _SMOOTH * old + (1 - _SMOOTH) * new, old)
        weights = [_SMOOTH * (0.0 if one is None else one[1]) + 1 - _SMOOTH for one in kept]
        for name, is_needed, power, weight in zip(names, needed, table.split(smoothed), weights, strict=True):
            if is_needed:
                self._powers[name] = (power, weight)
        counts = table.column([float(size) for size in table.sizes])
        return table.totals((smoothed / table.column(weights)).sqrt() / counts)

    def state_dict(self) -> dict[str, Any]:
        """Sizes of gradients, which are smoothed over steps, and of the last updates."""
        powers = {name: (power.cpu(), weight) for name, (power, weight) in self._powers.items()}
        return super().state_dict() | {"powers": powers, "sizes": dict(self.health.sizes)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from them."""
        super().load_state_dict(state)
        self._powers |= state.get("powers", {})
        self.health.sizes |= state.get("sizes", {})

    def _explain(self, name: str, values: dict[Curve, float]) -> None:
        super()._explain(name, values)
        rate = values.get(_metrics.EFFECTIVE_LR, values.get(_metrics.EFFECTIVE_LR_NOT_INVARIANT, 0.0))
        size = values.get(_metrics.ROTATION, 0.0) / rate if 0 < rate < math.inf else 0.0
        if 0 < size < math.inf and (spike := self.health.spike(name, size)) is not None:
            values[_metrics.ROTATION_SPIKE] = spike

    def explain_rules(self, optimizers: Iterable[Optimizer]) -> None:
        """Say once why an optimizer's weights have no curve of the effective learning rate."""
        mine = of_mine(optimizers, self._by_parameter)
        for said in dict.fromkeys(_about_rule(optimizer, group) for _, group, optimizer in mine):
            if said and said not in self._explained:
                self._explained.add(said)
                rank_zero_warn(said)


_Mine = tuple[Watched, Group, Optimizer] | None


def _has_many_rates(one: tuple[Watched, Group, Optimizer]) -> bool:
    watched, _, optimizer = one
    return bool(watched.members and unequal(optimizer, watched.tensors(), "lr"))


def _radial_shares(
    table: Table, lengths: Lengths, mine: Sequence[_Mine], rules: Sequence[UpdateRule | None]
) -> list[Measured]:
    """The signed part of the update along the weight; what decoupled decay did of it, and what the gradients did."""
    updates = lengths.update()
    over = torch.where(updates > 0, 1 / torch.where(updates > 0, updates, 1.0), 0.0)
    counts = table.column([float(size) for size in table.sizes])
    everything = _names(mine, [True] * len(mine))
    share = table.totals(lengths.radial * over / counts)
    found = [Measured(_metrics.RADIAL_SHARE, table, share, everything)]
    split = [rule is not None and rule.decay == "decoupled" for rule in rules]
    if any(split):
        rates = [
            rule.lr(one[1]) * one[1].get("weight_decay", 0.0)
            if is_split and rule is not None and one is not None
            else 0.0
            for is_split, rule, one in zip(split, rules, mine, strict=True)
        ]
        decay = -as_column(rates, share) * table.totals(lengths.norm * over / counts)
        names = _names(mine, split)
        found.append(Measured(_metrics.RADIAL_SHARE_DECAY, table, decay, names))
        found.append(Measured(_metrics.RADIAL_SHARE_GRADIENT, table, share - decay, names))
    return found


def _shares(table: Table, norms: Tensor) -> list[Measured]:
    """Of the square of a set's norm, what its members have."""
    numbers = {w.key: number for number, w in enumerate(table.watched)}
    within = {numbers[m.key]: n for n, w in enumerate(table.watched) for m in w.members if m.key in numbers}
    if not within:
        return []
    squares = table.totals(norms.square())
    sets = squares[torch.tensor([within.get(n, n) for n in range(len(squares))], device=squares.device)]
    names = frozenset(table.watched[n].name for n in within)
    return [Measured(_metrics.SET_SHARE, table, squares / torch.where(sets > 0, sets, 1.0), names)]


def _names(mine: Sequence[_Mine], flags: Sequence[bool]) -> frozenset[str]:
    return frozenset(one[0].name for one, flag in zip(mine, flags, strict=True) if flag and one is not None)


def _stacked(curve: Curve, table: Table, values: Sequence[Tensor | None]) -> list[Measured]:
    """Numbers that only some weights have."""
    known = [value for value in values if value is not None]
    if not known:
        return []
    names = frozenset(w.name for w, value in zip(table.watched, values, strict=True) if value is not None)
    none = known[0].new_zeros(())
    return [Measured(curve, table, torch.stack([none if v is None else v.to(none).reshape(()) for v in values]), names)]


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
