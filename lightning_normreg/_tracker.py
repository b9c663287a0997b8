"""What a step did to the watched weights: measured around the optimizer's step, read back once."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
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
from lightning_normreg._optimizers import UpdateRule, update_rule, why_no_rule
from lightning_normreg._step_hooks import Phase
from lightning_normreg._watched import Watched
from lightning_normreg.functional import effective_lr, weight_norm
from lightning_normreg.functional._norms import accumulator, root_mean_square

Row = dict[str, dict[Curve, float]]
"""Parameter name → curve → value."""


@dataclass(frozen=True)
class _Pending:
    names: list[str]
    curves: list[list[Curve]]
    values: Tensor  # all values of the row, flat, on the device
    zero_units: Tensor  # per name
    skipped: Tensor | None


class Tracker(ABC):
    """Measures the updates of watched weights while ``due``; costs nothing while not.

    Several updates of one optimizer before :meth:`collect` overwrite each other: the last one counts.
    """

    phase = Phase.MEASURE

    def __init__(self, watched: Sequence[Watched]) -> None:
        self.due = False
        self.watched = list(watched)
        self._by_parameter = {w.parameter: w for w in self.watched}
        self._pending: dict[int, _Pending] = {}
        self._told: set[str] = set()

    def arm(self, due: bool) -> None:
        """Start a batch: measure the updates in it, or do nothing at all."""
        self.due = due

    @property
    def dtype(self) -> torch.dtype:
        """Type that values are computed in: float64 for a float64 model, else float32."""
        wide = any(accumulator(w.parameter.dtype) == torch.float64 for w in self.watched)
        return torch.float64 if wide else torch.float32

    def stepping(self, optimizer: Optimizer) -> list[tuple[Watched, dict[str, Any]]]:
        """Watched weights that an optimizer updates, with their groups, as its group list stands now."""
        return [
            (self._by_parameter[p], group)
            for group in optimizer.param_groups
            for p in group["params"]
            if p in self._by_parameter and p.grad is not None
        ]

    @abstractmethod
    def before_step(self, index: int, optimizer: Optimizer) -> None:
        """Keep what must be known of the weights before the step."""

    @abstractmethod
    def measure(self, index: int, watched: Watched, group: dict[str, Any], rule: UpdateRule | None) -> _Measured:
        """Values of one weight after the step, as 0-dimensional tensors."""

    def after_step(self, index: int, optimizer: Optimizer, skipped: Tensor | None) -> None:
        """Measure the update and hold its values on the device."""
        if not self.due:
            return
        stepping = self.stepping(optimizer)
        if not stepping:
            return
        measured = [self.measure(index, watched, group, update_rule(optimizer, group)) for watched, group in stepping]
        device = stepping[0][0].parameter.device
        flat = [v.to(device, self.dtype) for m in measured for v in m.values.values()]
        zeros = [m.zero_units.to(device) for m in measured]
        self._pending[index] = _Pending(
            [watched.name for watched, _ in stepping],
            [list(m.values) for m in measured],
            torch.stack(flat),
            torch.stack(zeros),
            skipped,
        )

    def collect(self) -> Row:
        """Read the measured values back, one transfer per optimizer, and forget them. Empty if nothing was updated."""
        row: Row = {}
        for pending in self._pending.values():
            skipped = [] if pending.skipped is None else [pending.skipped.to(pending.values)]
            flags = [s.reshape(1) for s in skipped]
            numbers = torch.cat([pending.values, pending.zero_units.to(pending.values), *flags]).tolist()
            if skipped and numbers.pop():
                continue
            zeros = numbers[len(pending.values) :]
            values = iter(numbers)
            for name, curves, zero in zip(pending.names, pending.curves, zeros, strict=True):
                row[name] = {curve: next(values) for curve in curves}
                self._explain(name, row[name], int(zero))
        self._pending.clear()
        return row

    def _explain(self, name: str, values: dict[Curve, float], zero_units: int) -> None:
        if zero_units:
            self.tell_once(
                f"zero {name}",
                f"{zero_units} units of {name!r} are zero: they have no direction, so their rotation and relative "
                "update count as 0.",
            )
        for curve in (_metrics.EFFECTIVE_LR, _metrics.EFFECTIVE_LR_NOT_INVARIANT):
            if values.get(curve) == math.inf:
                del values[curve]  # every unit is zero, which was just said
        if not all(map(math.isfinite, values.values())):
            self.tell_once(f"finite {name}", f"{name!r} has infinite or NaN entries, and so have its curves.")

    def tell_once(self, topic: str, message: str) -> None:
        """Warn, unless the topic was warned about before."""
        if topic not in self._told:
            self._told.add(topic)
            rank_zero_warn(message)


@dataclass(frozen=True)
class _Measured:
    values: dict[Curve, Tensor]
    zero_units: Tensor


class NormTracker(Tracker):
    """Norms of the watched weights before each update."""

    def __init__(self, watched: Sequence[Watched]) -> None:
        super().__init__(watched)
        self._norms: dict[Parameter, Tensor] = {}
        self._whole: dict[Parameter, Tensor] = {}

    def before_step(self, index: int, optimizer: Optimizer) -> None:
        """Take the norms: after the step they would describe the next one."""
        if self.due:
            for watched in _all_stepping(self, optimizer):
                self._norms[watched.parameter] = watched.norms()
                self._whole[watched.parameter] = weight_norm(watched.parameter)

    def measure(self, index: int, watched: Watched, group: dict[str, Any], rule: UpdateRule | None) -> _Measured:
        """The four curves of the norms taken before."""
        norms = self._norms[watched.parameter]
        return _Measured(
            {
                _metrics.WEIGHT_NORM: self._whole[watched.parameter],
                _metrics.UNIT_NORM_RMS: root_mean_square(norms),
                _metrics.UNIT_NORM_MIN: norms.min() if norms.numel() else norms.new_zeros(()),
                _metrics.UNIT_NORM_MAX: norms.max() if norms.numel() else norms.new_zeros(()),
            },
            (norms == 0).sum(),
        )


class RotationTracker(Tracker):
    """Effective learning rate, rotation and relative update of the watched weights in each update."""

    def __init__(self, watched: Sequence[Watched]) -> None:
        super().__init__(watched)
        self._snapshots: dict[Parameter, Tensor] = {}
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
        for watched in _all_stepping(self, optimizer):
            for parameter in watched.tensors():
                if parameter not in self._snapshots:
                    self._snapshots[parameter] = torch.empty_like(parameter)
                self._snapshots[parameter].copy_(parameter, non_blocking=True)

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
        values: dict[Parameter, dict[Curve, Tensor]] = {}
        for watched, _ in self.stepping(optimizer):
            gradient = watched.parameter.grad
            assert gradient is not None
            values[watched.parameter] = {
                _metrics.GRADIENT_NORM: weight_norm(gradient) / scale,
                _metrics.GRADIENT_ALIGNMENT: root_mean_square(watched.alignment()),
            }
        self._gradients[index] = _Gradients(values, inside)

    def after_step(self, index: int, optimizer: Optimizer, skipped: Tensor | None) -> None:
        """Measure the update, and forget its gradients."""
        super().after_step(index, optimizer, skipped)
        self._gradients.pop(index, None)
        self._inside.discard(index)

    def measure(self, index: int, watched: Watched, group: dict[str, Any], rule: UpdateRule | None) -> _Measured:
        """The curves of one update."""
        step = watched.step_from(self._snapshots.__getitem__)
        values: dict[Curve, Tensor] = {}
        if rule is not None and rule.exponent and rule.lr_is_used:
            curve = _metrics.EFFECTIVE_LR_NOT_INVARIANT if watched.invariant is False else _metrics.EFFECTIVE_LR
            values[curve] = effective_lr(rule.lr(group), root_mean_square(step.norm), rule.exponent)
        values[_metrics.ANGULAR_UPDATE] = root_mean_square(step.angle())
        values[_metrics.RELATIVE_UPDATE] = root_mean_square(step.relative())
        values.update(self._gradients.get(index, _NO_GRADIENTS).values.get(watched.parameter, {}))
        return _Measured(values, (step.norm == 0).sum())

    def explain_rules(self, optimizers: Iterable[Optimizer]) -> None:
        """Say once why an optimizer's weights have no curve of the effective learning rate."""
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                if any(p in self._by_parameter for p in group["params"]):
                    said = _about_rule(optimizer, group)
                    if said:
                        self.tell_once(f"rule {said}", said)


@dataclass(frozen=True)
class _Gradients:
    values: dict[Parameter, dict[Curve, Tensor]]
    inside: bool  # recorded between pre-hook and post-hook, that is by a closure


_NO_GRADIENTS = _Gradients({}, inside=False)


def _all_stepping(tracker: Tracker, optimizer: Optimizer) -> list[Watched]:
    # Before the step gradients may not be there yet, so every watched weight of the optimizer counts.
    parameters = {p for group in optimizer.param_groups for p in group["params"]}
    return [w for w in tracker.watched if w.parameter in parameters]


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
