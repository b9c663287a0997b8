"""A run beside its plan: where it parts from it."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from lightning_normreg import _metrics
from lightning_normreg._metrics import EQUILIBRIUM_TOLERANCE, Curve
from lightning_normreg._reports._plan import Plan
from lightning_normreg._reports._plan_words import rounded
from lightning_normreg._weights import listed

LAST, OUTSIDE = 10, 8
"""Logged steps of which so many have to be outside the tolerance, all on one side, for a run to part from its plan."""
_SAME_LR = 0.02


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


class Comparison:
    """A run beside its plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._partings: dict[str, Parting] = {}

    def add(self, step: int, name: str, rotation: float, norm: float, effective_lr: float) -> dict[Curve, float]:
        """Note what was measured at a step; what was planned."""
        if name not in self.plan.units or step > self.plan.steps - 1:
            return {}
        planned = [self.plan.at_step(name, key, step) for key in ("rotation", "norm", "effective_lr")]
        parting = self._partings.setdefault(name, Parting())
        parting.add(step, (rotation, norm, effective_lr * norm), (planned[0], planned[1], planned[2] * planned[1]))
        if not math.isfinite(planned[1]):
            return {}
        return {_metrics.PLANNED_ROTATION: planned[0], _metrics.PLANNED_NORM: planned[1]}

    def sentences(self) -> list[str]:
        """Where it parts from the plan, and when; or that it does not."""
        said: dict[str, list[str]] = {}
        for name, parting in self._partings.items():
            said.setdefault(parting.words or "{} did as planned.", []).append(name)
        return [words.format(listed(names, 3)) for words, names in said.items()]

    def check_names(self, names: Collection[str]) -> list[str]:
        """What is planned and not there.

        Raises:
            ValueError: If that is all of it.
        """
        missing = [name for name in self.plan.units if name not in names]
        if self.plan.units and len(missing) == len(self.plan.units):
            raise ValueError(
                f"`plan` must be one of this model, but is of {listed(missing, 3)}, which are not watched here. Make "
                "it by `lightning-normreg plan` with the arguments of this run."
            )
        return missing
