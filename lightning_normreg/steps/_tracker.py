"""What a step did to the watched weights: measured around the optimizer's step, read back once."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.parameter import Parameter
from torch.optim import Optimizer

from lightning_normreg import _metrics
from lightning_normreg._metrics import Curve
from lightning_normreg._optimizers import Group
from lightning_normreg._weights import Later, Watched, at_once
from lightning_normreg.functional._norms import accumulator, root_mean_square
from lightning_normreg.steps._health import SIGNS, Health, signs
from lightning_normreg.steps._step_hooks import Phase, of_mine

Stepping = Sequence[tuple[Watched, Group, Optimizer]]
"""Weights that optimizers update, each with its group."""
Row = dict[str, dict[Curve, float]]
"""Parameter name → curve → value."""


@dataclass(frozen=True)
class _Pending:
    names: list[str]
    curves: list[list[Curve]]
    values: Tensor  # all values of the row, flat, on the device
    signs: Tensor  # likewise, len(SIGNS) per name
    skipped: Tensor | None


class Tracker(ABC):
    """Measures the updates of watched weights while ``due``; costs nothing while not.

    Several updates of one optimizer before :meth:`collect` overwrite each other: the last one counts.
    """

    phase = Phase.MEASURE

    def __init__(self, watched: Sequence[Watched], health: Health | None = None) -> None:
        self.due = False
        self.watched = list(watched)
        self.health = health or Health()
        self._by_parameter = {w.parameter: w for w in self.watched}
        self._by_name = {w.name: w for w in self.watched}
        self._pending: dict[int, _Pending] = {}

    def arm(self, due: bool) -> None:
        """Start a batch: measure the updates in it, or do nothing at all."""
        self.due = due

    @property
    def dtype(self) -> torch.dtype:
        """Type that values are computed in: float64 for a float64 model, else float32."""
        wide = any(accumulator(w.parameter.dtype) == torch.float64 for w in self.watched)
        return torch.float64 if wide else torch.float32

    def optimized(self, optimizer: Optimizer) -> list[Watched]:
        """Watched weights that an optimizer has."""
        return [watched for watched, _, _ in of_mine([optimizer], self._by_parameter)]

    @abstractmethod
    def before_step(self, index: int, optimizer: Optimizer) -> None:
        """Keep what must be known of the weights before the step."""

    @abstractmethod
    def measure(self, index: int, optimizer: Optimizer, stepping: Stepping) -> list[Measured]:
        """Values of each weight after the step, as 0-dimensional tensors."""

    def after_step(self, index: int, optimizer: Optimizer, skipped: Tensor | None) -> None:
        """Measure the update and hold its values on the device."""
        if not self.due:
            return
        stepping = of_mine([optimizer], self._by_parameter, ready=True)
        if not stepping:
            return
        measured = self.measure(index, optimizer, stepping)
        device, dtype = stepping[0][0].parameter.device, self.dtype
        flat = [v.to(device, dtype) for m in measured for v in m.values.values()]
        signs = [m.signs.to(device, dtype) for m in measured]
        self._pending[index] = _Pending(
            [watched.name for watched, _, _ in stepping],
            [list(m.values) for m in measured],
            torch.stack(flat),
            torch.cat(signs),
            skipped,
        )

    def collect(self) -> Row:
        """Read the measured values back, one transfer per optimizer, and forget them. Empty if nothing was updated."""
        row: Row = {}
        for pending in self._pending.values():
            skipped = [] if pending.skipped is None else [pending.skipped.to(pending.values)]
            flags = [s.reshape(1) for s in skipped]
            numbers = torch.cat([pending.values, pending.signs, *flags]).tolist()
            if skipped and numbers.pop():
                continue
            values = iter(numbers)
            for name, curves in zip(pending.names, pending.curves, strict=True):
                row[name] = {curve: next(values) for curve in curves}
            for name in pending.names:
                self.health.judge(name, {sign: next(values) for sign in SIGNS}, self._by_name[name].parameter.dtype)
                self._explain(name, row[name])
        self._pending.clear()
        return row

    def _explain(self, name: str, values: dict[Curve, float]) -> None:
        for curve in (_metrics.EFFECTIVE_LR, _metrics.EFFECTIVE_LR_NOT_INVARIANT):
            if values.get(curve) == math.inf:
                del values[curve]  # every unit is zero, which was just said
        if not all(map(math.isfinite, values.values())) and name not in self.health.alarms:
            self.health.tell(f"finite {name}", f"Curves of {name!r} are infinite or NaN, because its gradient is.")


@dataclass(frozen=True)
class Measured:
    """Values of one weight, and the signs of its health."""

    values: dict[Curve, Tensor]
    signs: Tensor


class NormTracker(Tracker):
    """Norms of the watched weights before each update."""

    def __init__(self, watched: Sequence[Watched], health: Health | None = None) -> None:
        super().__init__(watched, health)
        self._norms: dict[Parameter, tuple[Tensor, Tensor]] = {}

    def before_step(self, index: int, optimizer: Optimizer) -> None:
        """Take the norms: after the step they would describe the next one."""
        if self.due:
            mine = self.optimized(optimizer)
            norms = at_once(lambda w, total: _both(w.norms_later(total), w.whole_norm_later(total)), mine)
            self._norms.update({w.parameter: pair for w, pair in zip(mine, norms, strict=True)})

    def measure(self, index: int, optimizer: Optimizer, stepping: Stepping) -> list[Measured]:
        """The four curves of the norms taken before."""
        found = []
        for watched, _, _ in stepping:
            norms, whole = self._norms[watched.parameter]
            values = {
                _metrics.WEIGHT_NORM: whole,
                _metrics.UNIT_NORM_RMS: root_mean_square(norms),
                _metrics.UNIT_NORM_MIN: norms.min() if norms.numel() else norms.new_zeros(()),
                _metrics.UNIT_NORM_MAX: norms.max() if norms.numel() else norms.new_zeros(()),
            }
            found.append(Measured(values, signs(norms)))
        return found

    def unit_norms(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Norm of each unit of some weights before their last measured update, on the host, by one transfer."""
        norms = [self._norms[self._by_name[name].parameter][0].detach() for name in names]
        if not norms:
            return {}
        flat = torch.cat([n.to(norms[0].device) for n in norms]).cpu()
        return dict(zip(names, torch.split(flat, [n.numel() for n in norms]), strict=True))


def _both(first: Later[Tensor], second: Later[Tensor]) -> Later[tuple[Tensor, Tensor]]:
    return lambda: (first(), second())
