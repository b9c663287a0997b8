"""What is planned for a unit, and in words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

SETTLED, IDLE, STEEP = 3.0, 0.1, 1.5
"""Relaxation times after which decay has come to balance; below which it has done next to nothing; and by how much a
rotation is above its equilibrium where a slower warm-up is advised."""


@dataclass(frozen=True)
class PlannedUnit:
    """What is planned for the units of one weight, or for a set; a number for each of the steps ``Plan.at``.

    Attributes:
        norm: Root mean square of the units' norms, before the step; NaN where that cannot be planned.
        rotation: Angle of the step, in radians.
        effective_lr: lr/norm, as p is 1 for all that is planned.
        equilibrium_norm: Norm at which learning rate and decay of that step would settle; NaN where there is none.
        equilibrium_rotation: Rotation per step there.
        relaxed: Relaxation times gone through.
        timescale: 1/Σ lr·decay: the steps over which decay acts, as a share of the run; inf without decay.
    """

    norm: list[float]
    rotation: list[float]
    effective_lr: list[float]
    equilibrium_norm: list[float]
    equilibrium_rotation: list[float]
    relaxed: list[float]
    timescale: float


def words_of(unit: PlannedUnit, at: Sequence[int], steps: int) -> Iterator[str]:
    """Sentences with {} in the place of names."""
    gone = unit.relaxed[-1]
    if math.isfinite(unit.timescale):
        share = f"Decay of {{}} acts over 1/Σ(lr·decay) = {unit.timescale:.2g} of the run"
        if gone < IDLE:
            yield f"{share}: in {count(steps)} steps it does next to nothing."
        elif gone >= SETTLED:
            first = next(step for step, times in zip(at, unit.relaxed, strict=True) if times >= SETTLED)
            yield f"{share}, and reaches balance at about step {rounded(first)}."
        else:
            yield f"{share}, too long to reach balance: {gone:.1f} of the {SETTLED:.0f} relaxation times it takes."
    else:
        yield f"Without decay the norm of {{}} grows {unit.norm[-1] / unit.norm[0]:.3g}-fold."
    known = [place for place, norm in enumerate(unit.norm) if math.isfinite(norm)]
    if known[-1] + 1 < len(at):
        yield (
            f"{{}} is planned up to about step {rounded(at[known[-1]])} alone: it has several rows or tensors, and "
            "when its start is forgotten, the loss has moved norm between them."
        )
    peak = max(known, key=unit.rotation.__getitem__)
    settled = unit.equilibrium_rotation[peak]
    if settled > 0 and unit.rotation[peak] > STEEP * settled:
        ratio, norm = unit.rotation[peak] / settled, unit.equilibrium_norm[peak]
        yield (
            f"The rotation of {{}} peaks at {ratio:.1f} times its equilibrium, at about step {rounded(at[peak])}: "
            f"warm up more slowly, or start at norm {norm:.2g} in the place of {unit.norm[0]:.2g}."
        )


def rounded(step: int) -> str:
    """A step with two digits, as no plan knows it better."""
    digits = max(0, len(str(step)) - 2)
    return count(round(step, -digits))


def count(steps: int) -> str:
    return f"{steps:,}".replace(",", " ")


def sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."
