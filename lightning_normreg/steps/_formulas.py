"""What an optimizer's family of formulas predicts of one watched weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from lightning_normreg import _metrics, functional
from lightning_normreg._metrics import Curve
from lightning_normreg._optimizers import Group, UpdateRule
from lightning_normreg._weights import Watched
from lightning_normreg.functional._families import FAMILIES
from lightning_normreg.functional._settings import family_of

Rates = tuple[float, float]
"""Learning rate and weight decay of one step."""

GRADIENT_AT_NORM_1 = Curve("gradient_at_norm_1", "G", "loss", "mean_u √⟨(‖g_u‖ ‖w_u‖)²⟩, smoothed over logged steps")
"""What is measured for the predictions alone, and not logged."""

_BY_TENSOR = ("sgdp", "adamp", "lamb", "adafactor")
_SAME = 0.01
"""Relative change of the learning rate below which neighbouring steps are integrated as one stretch."""


class Formulas:
    """The predictions for one weight; norms are root mean squares over its units.

    ``gradient`` is the norm of the gradient of a unit of norm 1, a mean over units; None where it was not measured.
    """

    def __init__(self, rule: UpdateRule, group: Group, watched: Watched, gradient: float | None) -> None:
        self.family = family_of(rule.family)
        if watched.members and self.family.name in _BY_TENSOR:
            raise ValueError(f"{self.family.name!r} scales the step of each tensor by its own norm, so a set has none.")
        units = watched.units()
        shapes = [(shape[:1].numel(), shape[1:].numel()) for shape in watched.shapes()]  # a scalar is 1 × 1
        shape = tuple(shapes) if watched.members else shapes[0]
        given = {"gradient_norm": gradient, "entries": watched.entries() / units, "shape": shape}
        names = [name for name in self.family.settings if name not in ("lr", "weight_decay")]
        values = {name: given.get(name, group.get(name)) for name in names}
        self.settings: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
        self._scale = math.sqrt(units) if self.family.turns_matrix else 1.0

    def at(self, norm: float, rates: Rates) -> tuple[dict[Curve, float], float]:
        """Curves of the equilibrium at a learning rate, and the rotation of a step from a given norm."""
        curves = {_metrics.EQUILIBRIUM_ROTATION: self.rotation(rates)}
        if self.family.settles:
            curves[_metrics.EQUILIBRIUM_NORM] = self.norm(rates)
            curves[_metrics.EQUILIBRIUM_HALF_LIFE] = self.half_life(rates)
        return curves, self.turn(norm, rates)

    def turn(self, norm: float, rates: Rates) -> float:
        """Rotation of a step from a given norm."""
        return functional.predicted_rotation(self.family.name, norm * self._scale, **self._with(rates))

    def rotation(self, rates: Rates) -> float:
        """Rotation per step at the equilibrium of a learning rate and decay."""
        return functional.equilibrium_rotation(self.family.name, **self._with(rates))

    def norm(self, rates: Rates) -> float:
        """Norm at that equilibrium."""
        return functional.equilibrium_norm(self.family.name, **self._with(rates)) / self._scale

    def half_life(self, rates: Rates) -> float:
        """Steps in which the norm comes half-way to it."""
        return functional.equilibrium_half_life(self.family.name, **self._with(rates))

    def advance(self, norm: float, steps: Sequence[Rates]) -> tuple[float, float]:
        """Norm after some steps, and the relaxation times that they have lasted."""
        relaxed = 0.0
        for (lr, decay), count in _stretches(steps):
            if lr > 0:
                settings = self.settings | {"weight_decay": decay, "initial_norm": norm * self._scale}
                norm = functional.predicted_norm(self.family.name, [lr] * count, **settings)[-1] / self._scale
                if self.family.settles and decay > 0:
                    relaxed += count * math.log(2) / self.half_life((lr, decay))
        return norm, relaxed

    def _with(self, rates: Rates) -> dict[str, Any]:
        return self.settings | {"lr": rates[0], "weight_decay": rates[1]}


def needs_gradient(rule: UpdateRule | None) -> bool:
    """Whether an optimizer's equilibrium depends on the size of its gradients."""
    return bool(rule and rule.family and "gradient_norm" in FAMILIES[rule.family].settings)


def _stretches(steps: Sequence[Rates]) -> list[tuple[Rates, int]]:
    """Neighbouring steps with about the same settings, as their mean and their number."""
    found = []
    for _, stretch in groupby(steps, key=lambda step: (round(math.log(max(step[0], 1e-38)) / _SAME), step[1])):
        same = list(stretch)
        found.append(((sum(lr for lr, _ in same) / len(same), same[0][1]), len(same)))
    return found
