"""Where decay takes each watched weight, beside where it is: equilibrium, and the norm along the schedule so far."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn.parameter import Parameter
from torch.optim import Optimizer

from lightning_normreg import _metrics
from lightning_normreg._metrics import Curve
from lightning_normreg._optimizers import Group, UpdateRule, group_of, update_rule
from lightning_normreg._weights import Watched, whole_shape
from lightning_normreg.functional import (
    equilibrium_half_life,
    equilibrium_norm,
    equilibrium_rotation,
    predicted_norm,
    predicted_rotation,
)
from lightning_normreg.functional._families import FAMILIES
from lightning_normreg.steps._step_hooks import Phase

Step = tuple[float, float]
"""Learning rate and weight decay of one step."""
_Written = tuple[float | Tensor, float]

GRADIENT_AT_NORM_1 = Curve("gradient_at_norm_1", "G", "loss", "mean_u √⟨(‖g_u‖ ‖w_u‖)²⟩, smoothed over logged steps")
"""What is measured for the predictions alone, and not logged."""

SETTLED = 3.0
"""Relaxation times after which a twentieth is left of the initial norm."""
_SAME = 0.01
"""Relative change of the learning rate below which neighbouring steps are integrated as one stretch."""
_MEMORY = 0.9
"""Of the average over logged steps that measured rotations are smoothed by."""
_CONSTANT = ("momentum", "betas", "dampening", "nesterov")


class Formulas:
    """The predictions of an optimizer's family for one weight; norms are root mean squares over its units.

    Args:
        rule: Of the weight's optimizer.
        group: Parameter group of the weight.
        watched: The weight.
        gradient: Norm of the gradient of a unit of norm 1, a mean over units; None where it was not measured.
    """

    def __init__(self, rule: UpdateRule, group: Group, watched: Watched, gradient: float | None) -> None:
        units = watched.units()
        entries = sum(whole_shape(p).numel() for p in watched.tensors()) / units
        shape = (watched.shape[0], watched.shape.numel() // watched.shape[0])
        given = {"gradient_norm": gradient, "entries": entries, "shape": shape}
        known = inspect.signature(FAMILIES[rule.family]).parameters if rule.family else {}
        values = {name: given.get(name, group.get(name)) for name in known if name not in ("lr", "weight_decay")}
        self.settings: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
        self.family: Any = rule.family
        self._scale = math.sqrt(units) if rule.family == "muon" else 1.0  # Muon turns the matrix as a whole

    def at(self, norm: float, step: Step) -> tuple[dict[Curve, float], float]:
        """Curves of the equilibrium at a learning rate, and the rotation of a step from a given norm."""
        settings = self.settings | {"lr": step[0], "weight_decay": step[1]}
        curves = {_metrics.EQUILIBRIUM_ROTATION: self.rotation(step)}
        if self.family != "adafactor":  # its log-norm drifts
            curves[_metrics.EQUILIBRIUM_NORM] = self.norm(step)
            curves[_metrics.EQUILIBRIUM_HALF_LIFE] = equilibrium_half_life(self.family, **settings)
        return curves, predicted_rotation(self.family, norm * self._scale, **settings)

    def rotation(self, step: Step) -> float:
        """Rotation per step at the equilibrium of a learning rate and decay."""
        return equilibrium_rotation(self.family, **self.settings, lr=step[0], weight_decay=step[1])

    def norm(self, step: Step) -> float:
        """Norm at that equilibrium."""
        return equilibrium_norm(self.family, **self.settings, lr=step[0], weight_decay=step[1]) / self._scale

    def advance(self, norm: float, steps: Sequence[Step]) -> tuple[float, float]:
        """Norm after some steps, and the relaxation times that they have lasted."""
        relaxed = 0.0
        for (lr, decay), count in _stretches(steps):
            if lr > 0:
                settings = self.settings | {"weight_decay": decay}
                after = predicted_norm(self.family, [lr] * count, initial_norm=norm * self._scale, **settings)
                norm = after[-1] / self._scale
                if self.family != "adafactor" and decay > 0:
                    relaxed += count * math.log(2) / equilibrium_half_life(self.family, lr=lr, **settings)
        return norm, relaxed


def _stretches(steps: Sequence[Step]) -> list[tuple[Step, int]]:
    """Neighbouring steps with about the same settings, as their mean and their number."""
    found = []
    for _, stretch in groupby(steps, key=lambda step: (round(math.log(max(step[0], 1e-38)) / _SAME), step[1])):
        same = list(stretch)
        found.append(((sum(lr for lr, _ in same) / len(same), same[0][1]), len(same)))
    return found


@dataclass
class Course:
    """One weight's way to equilibrium, in plain numbers.

    Attributes:
        norm: What the norm equation gives for the schedule run so far.
        constant: Momentum of its group at the start; the formulas do not know a scheduled one.
        relaxed: Relaxation times since the start.
        half_life: Steps in which the excess over equilibrium halves, at the last learning rate.
        norm_ratio: Measured over predicted norm at the last logged step.
        rotation_sq: Smoothed square of measured over predicted rotation.
        since: Logged step from which on it has been consistent with equilibrium, None while it is not.
        steps: Optimizer steps that were followed.
    """

    norm: float
    constant: dict[str, Any]
    relaxed: float = 0.0
    half_life: float = math.inf
    norm_ratio: float = 1.0
    rotation_sq: float | None = None
    since: int | None = None
    steps: int = 0

    def compare(self, norm: float, rotation: float, tolerance: float, step: int) -> None:
        """Note measured over predicted norm and rotation of a logged step."""
        self.norm_ratio = norm
        old = rotation**2 if self.rotation_sq is None else self.rotation_sq
        self.rotation_sq = _MEMORY * old + (1 - _MEMORY) * rotation**2
        near = all(abs(math.log(ratio)) <= math.log1p(tolerance) for ratio in (norm, math.sqrt(self.rotation_sq)))
        if not near or self.relaxed < SETTLED:
            self.since = None
        elif self.since is None:
            self.since = step

    def words(self) -> str:
        """The state in words, where there is something to say."""
        if self.since is not None:
            return f"consistent with equilibrium since step {self.since:,}".replace(",", " ")
        if self.relaxed < SETTLED:
            run = f"{self.steps} were run up to the last logged one"
            return f"too short to settle: half-life of {self.half_life:.3g} steps, {run}"
        rotation = math.sqrt(self.rotation_sq or 0.0)
        return f"not at equilibrium: norm {self.norm_ratio:.2f} and rotation {rotation:.2f} times what is predicted"


class Equilibria:
    """Follows the norm equation of every scale-invariant weight that decays, along the schedule actually run.

    At each step the learning rate is written down; everything else happens at logged steps, on the host.
    """

    phase = Phase.MEASURE

    def __init__(self, watched: Sequence[Watched], is_held: Callable[[Parameter], bool]) -> None:
        self._watched = {w.name: w for w in watched if w.invariant}
        self._names = {w.parameter: w.name for w in self._watched.values()}
        self._is_held = is_held
        self._steps: dict[str, list[_Written]] = {}
        self._given_up: list[str] = []
        self.courses: dict[str, Course] = {}

    def before_step(self, index: int, optimizer: Optimizer) -> None:
        """Nothing."""

    def after_step(self, index: int, optimizer: Optimizer, skipped: Tensor | None) -> None:
        """Write down learning rate and decay, which a scheduler may change before anything else is asked."""
        for group in optimizer.param_groups:
            names = [self._names[p] for p in group["params"] if p in self._names and p.grad is not None]
            rule = update_rule(optimizer, group) if names else None
            if rule is not None and rule.family:
                lr = rule.lr(group)
                step = (lr.detach().clone() if isinstance(lr, Tensor) else lr, float(group.get("weight_decay", 0.0)))
                for name in names:
                    self._steps.setdefault(name, []).append(step)

    def update(self, row: Mapping[str, dict[Curve, float]], optimizers: Iterable[Optimizer], step: int) -> None:
        """Add what is predicted to a row of measured values, and compare the two."""
        for optimizer in optimizers:
            for name in [name for name in row if name in self._steps]:
                parameter = self._watched[name].parameter
                group = group_of(optimizer, parameter)
                rule = None if group is None else update_rule(optimizer, group)
                if group is None or rule is None or self._is_held(parameter) or not self._steps[name][-1][1]:
                    if name not in self.courses:
                        del self._steps[name][:-1]  # nothing is followed that they would count for
                    continue
                gradient = row[name].get(GRADIENT_AT_NORM_1)
                if gradient is not None and not gradient > 0:
                    continue  # none has reached it yet
                try:
                    formulas = Formulas(rule, group, self._watched[name], gradient)
                    self._follow(name, row[name], formulas, group, step)
                except ValueError as error:
                    self._give_up(name, str(error))

    def _follow(self, name: str, values: dict[Curve, float], formulas: Formulas, group: Group, step: int) -> None:
        *done, present = _read(self._steps[name])
        self._steps[name] = [present]
        norm, rotation = values[_metrics.UNIT_NORM_RMS], values[_metrics.ROTATION]
        constant = {key: group[key] for key in _CONSTANT if key in group}
        course = self.courses.setdefault(name, Course(norm, constant))
        if constant != course.constant:
            raise ValueError("Its momentum is scheduled, and the formulas take it to be constant.")
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
            course.half_life = curves.get(_metrics.EQUILIBRIUM_HALF_LIFE, math.inf)
            course.compare(norm / course.norm, rotation / predicted, _tolerance(formulas.family), step)

    def words(self) -> dict[str, list[str]]:
        """What there is to say → the weights that it is said of."""
        found: dict[str, list[str]] = {}
        for name, course in self.courses.items():
            found.setdefault(course.words(), []).append(name)
        return found

    def state(self) -> dict[str, Any]:
        """Plain types, for a checkpoint."""
        return {
            "courses": {name: asdict(course) for name, course in self.courses.items()},
            "steps": {name: _read(steps) for name, steps in self._steps.items()},
            "given_up": list(self._given_up),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state` was taken."""
        self.courses = {name: Course(**course) for name, course in state["courses"].items()}
        self._steps = {name: list(steps) for name, steps in state["steps"].items()}
        for name in state["given_up"]:
            self._drop(name)

    def _give_up(self, name: str, why: str) -> None:
        rank_zero_warn(f"From here on no equilibrium is predicted for {name!r}. {why}")
        self._drop(name)

    def _drop(self, name: str) -> None:
        self._given_up.append(name)
        if name in self._watched:
            del self._names[self._watched.pop(name).parameter]
        self._steps.pop(name, None)
        self.courses.pop(name, None)


def needs_gradient(rule: UpdateRule | None) -> bool:
    """Whether an optimizer's equilibrium depends on the size of its gradients."""
    return bool(rule and rule.family and "gradient_norm" in inspect.signature(FAMILIES[rule.family]).parameters)


def _read(steps: Sequence[_Written]) -> list[Step]:
    """The steps in plain numbers; learning rates that are tensors are read at once."""
    tensors = [lr.reshape(()) for lr, _ in steps if isinstance(lr, Tensor)]
    numbers = iter(torch.stack(tensors).tolist() if tensors else ())
    return [(next(numbers) if isinstance(lr, Tensor) else lr, decay) for lr, decay in steps]


def _tolerance(family: str) -> float:
    # Measured on networks that learn; Newton–Schulz turns a gradient with a signal in it into another step.
    return 0.35 if family == "muon" else _metrics.EQUILIBRIUM_TOLERANCE
