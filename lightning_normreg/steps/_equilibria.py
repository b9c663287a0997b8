"""Where decay takes each watched weight, beside where it is: equilibrium, and the norm along the schedule so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import Parameter
from torch.optim import Optimizer

from lightning_normreg import _metrics
from lightning_normreg._metrics import Curve
from lightning_normreg._optimizers import Group, group_of, unequal, update_rule
from lightning_normreg._weights import Watched
from lightning_normreg.steps._formulas import GRADIENT_AT_NORM_1, Formulas, Rates
from lightning_normreg.steps._step_hooks import by_parameter, of_mine
from lightning_normreg.steps._subscriber import StepSubscriber

_Written = tuple[float | Tensor, float, int]
"""Learning rate and decay of a step as the optimizer has them, a tensor is not read at once; and its number."""
RELAXATION_TIMES = 3.0
"""Relaxation times after which a twentieth is left of the initial norm."""
LAST, INSIDE = 10, 8
"""Logged steps that the words are about, and how many of their ratios must be inside the family's tolerance."""
_CONSTANT = ("momentum", "betas", "dampening", "nesterov")


@dataclass
class Course:
    """One weight's way to equilibrium, in plain numbers."""

    norm: float  # what the norm equation gives for the schedule run so far
    relaxed: float = 0.0  # relaxation times since the start
    ratios: list[float] = field(default_factory=list)  # measured over predicted rotation at the last logged steps
    since: int | None = None  # logged step from which on it has been consistent with equilibrium, None while it is not
    steps: int = 0  # optimizer steps that were followed

    def compare(self, ratio: float, tolerance: float, step: int) -> None:
        """Note measured over predicted rotation of a logged step."""
        self.ratios = [*self.ratios, ratio][-LAST:]
        apart = [abs(math.log(ratio)) / math.log1p(tolerance) if ratio > 0 else math.inf for ratio in self.ratios]
        near = sum(a <= 1 for a in apart) >= INSIDE and max(apart) <= 2
        # Near the course that is predicted: it is at equilibrium only when its start is forgotten.
        if not near or self.relaxed < RELAXATION_TIMES:
            self.since = None
        elif self.since is None:
            self.since = step

    def words(self) -> str:
        """The state in words."""
        if self.since is not None:
            return f"consistent with equilibrium since step {self.since:,}".replace(",", " ")
        if self.relaxed < RELAXATION_TIMES:
            gone = f"{self.relaxed:.1f} of the {RELAXATION_TIMES:.0f} relaxation times that it takes"
            return f"too short to settle: {gone}, in {self.steps} steps up to the last logged one"
        if len(self.ratios) < INSIDE:
            return f"not known to be at equilibrium: {len(self.ratios)} logged steps are too few to tell"
        low, high = min(self.ratios), max(self.ratios)
        return f"not at equilibrium: rotation {low:.2f} to {high:.2f} times what is predicted, in the last logged steps"


class Equilibria(StepSubscriber):
    """Follows the norm equation of every scale-invariant weight that decays, along the schedule actually run.

    At each step the learning rate is written down; everything else happens at logged steps, on the host.
    """

    def __init__(self, watched: Sequence[Watched], is_held: Callable[[Parameter], bool]) -> None:
        super().__init__()
        self._is_held = is_held
        self._count = 0
        self._steps: dict[str, list[_Written]] = {}
        self._failed: dict[str, str] = {}
        self._constants: dict[str, dict[str, Any]] = {}  # momentum at the start; the formulas know no scheduled one
        self.courses: dict[str, Course] = {}
        self.watch(watched)

    def watch(self, watched: Sequence[Watched]) -> None:
        """Follow these weights from now on."""
        self._watched = {w.name: w for w in watched if w.invariant}
        self._by_parameter = by_parameter(self._watched.values())
        self._steps = {name: steps for name, steps in self._steps.items() if name in self._watched}
        self.courses = {name: course for name, course in self.courses.items() if name in self._watched}

    def after_step(self, index: int, optimizer: Optimizer, skipped: Tensor | None) -> None:
        """Write down learning rate and decay, which a scheduler may change before anything else is asked."""
        self._count += 1
        made: dict[int, _Written | None] = {}
        for watched, group, _ in of_mine([optimizer], self._by_parameter, ready=True):
            if id(group) not in made:
                rule = update_rule(optimizer, group)
                lr = rule.lr(group) if rule is not None and rule.family else None
                lr = lr.detach().clone() if isinstance(lr, Tensor) else lr
                made[id(group)] = None if lr is None else (lr, float(group.get("weight_decay", 0.0)), self._count)
            if (step := made[id(group)]) is not None:
                self._steps.setdefault(watched.name, []).append(step)

    def update(
        self, row: Mapping[str, dict[Curve, float]], optimizers: Sequence[Optimizer], step: int, later: int = 0
    ) -> None:
        """Add what is predicted to a row of measured values, and compare the two.

        Args:
            row: Measured values of an update.
            optimizers: All optimizers.
            step: Number of the row.
            later: How many updates of all optimizers there were since.
        """
        for optimizer in optimizers:
            for name in [name for name in row if name in self._steps]:
                parameter, tensors = self._watched[name].parameter, self._watched[name].tensors()
                group = group_of(optimizer, parameter)
                apart = unequal(optimizer, tensors, "lr", "weight_decay") if self._watched[name].members else []
                if apart and group is not None:
                    self._failed[name] = f"Its tensors have unequal {' and '.join(apart)}, and a set needs the same."
                    del self._steps[name][:-1]
                    continue
                if sum(group_of(each, parameter) is not None for each in optimizers) > 1:
                    self._failed[name] = "It is updated by several optimizers, and the formulas are of one."
                    del self._steps[name][:-1]
                    continue
                rule = None if group is None else update_rule(optimizer, group)
                if group is None or rule is None or any(map(self._is_held, tensors)) or not self._steps[name][-1][1]:
                    if name not in self.courses:
                        del self._steps[name][:-1]  # nothing is followed that they would count for
                    continue
                gradient = row[name].get(GRADIENT_AT_NORM_1)
                if gradient is not None and not gradient > 0:
                    continue  # none has reached it yet
                try:
                    if rule.family == "nadam_decoupled" and _warms_up(group, self._count):
                        raise ValueError("NAdam's own warm-up of its momentum is not over, and formulas are of later.")
                    formulas = Formulas(rule, group, self._watched[name], gradient)
                    self._compare(name, row[name], formulas, group, step=step, last=self._count - later)
                    self._failed.pop(name, None)
                except ValueError as error:  # tried anew from the next logged step on
                    self._failed[name] = str(error)
                    self.courses.pop(name, None)
                    del self._steps[name][:-1]

    def _compare(
        self, name: str, values: dict[Curve, float], formulas: Formulas, group: Group, *, step: int, last: int
    ) -> None:
        written = [one for one in self._steps[name] if one[2] <= last]
        *done, present = _read(written)
        self._steps[name] = [(*present, last), *self._steps[name][len(written) :]]
        norm, rotation = values[_metrics.UNIT_NORM_RMS], values[_metrics.ROTATION]
        constant = {key: group[key] for key in _CONSTANT if key in group}
        if constant != self._constants.setdefault(name, constant):
            raise ValueError("Its momentum is scheduled, and the formulas take it to be constant.")
        course = self.courses.setdefault(name, Course(norm))
        if course.steps:
            course.norm, relaxed = formulas.advance(course.norm, done)
            course.relaxed += relaxed
            course.steps += len(done)
        else:
            course.steps = 1
        if present[0] > 0 and norm > 0:
            curves, predicted = formulas.at(course.norm, present)
            values.update(curves)
            values[_metrics.EQUILIBRIUM_RATIO] = rotation / predicted
            course.compare(rotation / predicted, formulas.family.tolerance, step)

    def words(self) -> dict[str, list[str]]:
        """What there is to say → the weights that it is said of."""
        found: dict[str, list[str]] = {}
        for name, course in self.courses.items():
            found.setdefault(course.words(), []).append(name)
        if self._failed:
            count = f"{len(self._failed)} of {len(self._watched)}"
            why = next(iter(self._failed.values())).rstrip(".")
            found[f"no equilibrium is predicted, which is {count} layers. {why}"] = list(self._failed)
        return found

    def state_dict(self) -> dict[str, Any]:
        """All courses so far."""
        courses = {name: asdict(course) for name, course in self.courses.items()}
        steps = {name: _read(steps) for name, steps in self._steps.items()}
        return {"equilibria": {"courses": courses, "steps": steps, "constants": dict(self._constants)}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Follow them on."""
        if "equilibria" in state:
            kept = state["equilibria"]
            known = {f.name for f in fields(Course)}  # older versions had others as well
            courses = {
                n: {key: v for key, v in course.items() if key in known} for n, course in kept["courses"].items()
            }
            self.courses = {name: Course(**course) for name, course in courses.items()}
            self._constants = dict(kept.get("constants", {}))
            self._steps = {name: [(*step, 0) for step in steps] for name, steps in kept["steps"].items()}


def _warms_up(group: Group, steps: int) -> bool:
    """Whether NAdam's μ_t = β₁(1 − 0.96^(t·momentum_decay)/2) is more than 5 % below β₁, and turns weights further."""
    return bool(0.96 ** (steps * group.get("momentum_decay", 4e-3)) > 0.1)


def _read(steps: Sequence[_Written]) -> list[Rates]:
    """The steps in plain numbers; learning rates that are tensors are read at once."""
    tensors = [lr.reshape(()) for lr, _, _ in steps if isinstance(lr, Tensor)]
    numbers = iter(torch.stack(tensors).tolist() if tensors else ())
    return [(next(numbers) if isinstance(lr, Tensor) else lr, decay) for lr, decay, _ in steps]
