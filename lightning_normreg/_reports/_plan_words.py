"""What is planned for a unit, in words, and where a run parts from it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from lightning_normreg._metrics import EQUILIBRIUM_TOLERANCE

SETTLED, IDLE, STEEP = 3.0, 0.1, 1.5
"""Relaxation times after which decay has come to balance; below which it has done next to nothing; and by how much a
rotation is above its equilibrium where a slower warm-up is advised."""
LAST, OUTSIDE = 10, 8
"""Logged steps of which so many have to be outside the tolerance, all on one side, for a run to part from its plan."""
_SAME_LR = 0.02


@dataclass(frozen=True)
class PlannedUnit:
    """What is planned for the units of one weight, or for a set; a number for each of the steps ``Plan.at``.

    Attributes:
        norm: Root mean square of the units' norms, before the step.
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
    peak = max(range(len(at)), key=unit.rotation.__getitem__)
    settled = unit.equilibrium_rotation[peak]
    if settled > 0 and unit.rotation[peak] > STEEP * settled:
        ratio, norm = unit.rotation[peak] / settled, unit.equilibrium_norm[peak]
        yield (
            f"The rotation of {{}} peaks at {ratio:.1f} times its equilibrium, at about step {rounded(at[peak])}: "
            f"warm up more slowly, or start at norm {norm:.2g} in the place of {unit.norm[0]:.2g}."
        )


@dataclass
class Parting:
    """Compares what was measured of one weight with its plan, at one logged step after the other."""

    seen: list[tuple[int, float, float, float]] = field(default_factory=list)  # step, log ratios of rotation, norm, lr
    words: str = ""  # once it has parted, with {} in the place of the name

    def add(self, step: int, measured: tuple[float, float, float], planned: tuple[float, float, float]) -> None:
        """Note rotation, norm and learning rate of a step."""
        if self.words or not all(0 < x < math.inf for x in (*measured, *planned)):
            return
        ratios = [math.log(m / p) for m, p in zip(measured, planned, strict=True)]
        self.seen = [*self.seen, (step, ratios[0], ratios[1], ratios[2])][-LAST:]
        edge = math.log1p(EQUILIBRIUM_TOLERANCE)
        for place, what in ((1, "rotation"), (2, "norm")):
            for sign in (1, -1):
                outside = [one for one in self.seen if sign * float(one[place]) > edge]
                if len(outside) >= OUTSIDE and not self.words:
                    self.words = _parted(what, outside, place)


def _parted(what: str, outside: Sequence[tuple[int, float, float, float]], place: int) -> str:
    middle = sorted(outside, key=lambda one: one[place])[len(outside) // 2]
    start = f"{{}} parts from the plan at about step {rounded(outside[0][0])}: its {what} is "
    start += f"{math.exp(float(middle[place])):.2g} times what was planned"
    if abs(middle[3]) > _SAME_LR:
        return f"{start}, at a learning rate {math.exp(middle[3]):.3g} times the planned one."
    return f"{start}, at the planned learning rate: its decay is another, or its gradients are mostly signal."


def rounded(step: int) -> str:
    """A step with two digits, as no plan knows it better."""
    digits = max(0, len(str(step)) - 2)
    return count(round(step, -digits))


def count(steps: int) -> str:
    return f"{steps:,}".replace(",", " ")


def sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."
