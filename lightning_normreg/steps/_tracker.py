"""What a step did to the watched weights: measured around the optimizer's step, read back once."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_normreg import _metrics
from lightning_normreg._metrics import Curve
from lightning_normreg._optimizers import Group
from lightning_normreg._weights import Table, Watched
from lightning_normreg.functional._device import accumulator
from lightning_normreg.steps._health import SIGNS, Health, signs
from lightning_normreg.steps._record import Look
from lightning_normreg.steps._step_hooks import by_parameter, of_mine
from lightning_normreg.steps._subscriber import StepSubscriber

Stepping = Sequence[tuple[Watched, Group, Optimizer]]
"""Weights that optimizers update, each with its group."""
Row = dict[str, dict[Curve, float]]
"""Parameter name → curve → value."""


@dataclass(frozen=True)
class Measured:
    """Values of a curve, one for each weight of a table; those of some names count."""

    curve: Curve
    table: Table
    values: Tensor
    names: frozenset[str]


@dataclass(frozen=True)
class Update:
    """A measured update, or the last of several."""

    index: int  # of its optimizer
    number: int  # how many updates of all optimizers were before it
    count: int  # of how many updates of this optimizer it is the last
    row: Row


@dataclass(frozen=True)
class _Pending:
    index: int
    number: int
    count: int
    measured: list[Measured]
    table: Table
    signs: Tensor  # shape (len(SIGNS), weights of the table)
    names: frozenset[str]
    skipped: Tensor | None


class Tracker(StepSubscriber, ABC):
    """Measures the updates of watched weights while ``due``; costs nothing while not.

    Of several updates of one optimizer before :meth:`collect` the last one counts, unless ``every`` is given.

    Attributes:
        due: Whether updates are measured.
        every: Updates of an optimizer between measured ones, the first of which is; None to measure all of them.
        updates: Index of an optimizer → how many of its updates there were, measured or not.
    """

    def __init__(self, watched: Sequence[Watched], health: Health | None = None) -> None:
        super().__init__()
        self.due = False
        self.every: int | None = None
        self.updates: dict[int, int] = {}
        self.health = health or Health()
        self._pending: list[_Pending] = []
        self.watch(watched)

    def watch(self, watched: Sequence[Watched]) -> None:
        """Measure these weights from now on."""
        self.watched = list(watched)
        self._by_parameter = by_parameter(self.watched)
        self._by_key = {w.key: w for w in self.watched}
        self._by_name = {w.name: w for w in self.watched}

    def arm(self, due: bool) -> None:
        """Start a batch: measure the updates in it, or do nothing at all."""
        self.due = due

    def is_due(self, index: int) -> bool:
        """Whether the coming or present update of an optimizer is measured."""
        made = self.updates.get(index, 0)
        return self.due and (self.every is None or not made or (made + 1) % self.every == 0)

    @property
    def total(self) -> int:
        """Updates of all optimizers."""
        return sum(self.updates.values())

    @property
    def dtype(self) -> torch.dtype:
        """Type that values are given in: float64 for a float64 model, else float32."""
        wide = any(accumulator(w.parameter.dtype) == torch.float64 for w in self.watched)
        return torch.float64 if wide else torch.float32

    def optimized(self, optimizer: Optimizer) -> list[Watched]:
        """Watched weights that an optimizer has."""
        return [watched for watched, _, _ in of_mine([optimizer], self._by_parameter)]

    @abstractmethod
    def measure(self, look: Look, stepping: Stepping) -> tuple[list[Measured], Tensor]:
        """Curves of the weights that the step moved, and the signs of their health."""

    def after_step(self, index: int, optimizer: Optimizer, skipped: Tensor | None) -> None:
        """Count the update; measure it and hold its values on the device."""
        stepping = of_mine([optimizer], self._by_parameter, ready=True) if self.is_due(index) else []
        if stepping and self.record.wanted:  # not where another optimizer stepped inside of this step
            look, count = self.record.look(index), 1
            names = frozenset(watched.name for watched, _, _ in stepping)
            measured, found = self.measure(look, stepping)
            if self.every is None and skipped is None:  # else it may be one that was not made
                count += sum(p.count for p in self._pending if p.index == index)
                self._pending = [p for p in self._pending if p.index != index]
            self._pending.append(_Pending(index, self.total, count, measured, look.table, found, names, skipped))
        self.updates[index] = self.updates.get(index, 0) + 1

    def state_dict(self) -> dict[str, Any]:
        """How many updates there were."""
        return {"updates": dict(self.updates)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Count on."""
        self.updates |= state.get("updates", {})

    def collect(self) -> Row:
        """Read the measured values back, of each weight those of its last update. Empty if nothing was updated."""
        row: Row = {}
        for update in self.collect_updates():
            row |= update.row
        return row

    def collect_updates(self) -> list[Update]:
        """Read the measured values back, one transfer for each update, and forget them; in the order of updates."""
        found = []
        for pending in self._pending:
            row: Row = {}
            flags = [] if pending.skipped is None else [pending.skipped.reshape(1)]
            parts = [*(m.values for m in pending.measured), pending.signs.flatten(), *flags]
            numbers = torch.cat([part.to(pending.signs.device, self.dtype) for part in parts]).tolist()
            if flags and numbers.pop():
                continue
            place = 0
            for measured in pending.measured:
                for name, value in zip(self._names(measured.table), numbers[place:], strict=False):
                    if name in measured.names and name in pending.names:
                        row.setdefault(name, {})[measured.curve] = value
                place += len(measured.values)
            self._judge(pending, numbers[place:])
            for name, values in row.items():
                self._explain(name, values)
            self.health.tell_spikes()
            found.append(Update(pending.index, pending.number, pending.count, row))
        self._pending.clear()
        return found

    def _names(self, table: Table) -> list[str]:
        """Names of the weights of a table, "" for those of others."""
        return [self._by_key[w.key].name if w.key in self._by_key else "" for w in table.watched]

    def _judge(self, pending: _Pending, numbers: Sequence[float]) -> None:
        names = self._names(pending.table)
        for place, name in enumerate(names):
            if name in pending.names:
                found = dict(zip(SIGNS, numbers[place :: len(names)], strict=True))
                self.health.judge(name, found, self._by_name[name].parameter.dtype)

    def _explain(self, name: str, values: dict[Curve, float]) -> None:
        for curve in (_metrics.EFFECTIVE_LR, _metrics.EFFECTIVE_LR_NOT_INVARIANT):
            if values.get(curve) == math.inf:
                del values[curve]  # every unit is zero, which was just said
        if not all(map(math.isfinite, values.values())) and name not in self.health.alarms:
            self.health.tell(f"finite {name}", f"Curves of {name!r} are infinite or NaN, because its gradient is.")


def as_column(values: Sequence[float | Tensor], like: Tensor) -> Tensor:
    """Numbers, some of which may be on a device already, as one tensor; the device is not waited for."""
    if not any(isinstance(value, Tensor) for value in values):
        return torch.tensor(values, dtype=like.dtype).to(like.device, non_blocking=True)
    return torch.stack([torch.as_tensor(value).to(like, non_blocking=True).reshape(()) for value in values])


class NormTracker(Tracker):
    """Norms of the watched weights before each update."""

    def __init__(self, watched: Sequence[Watched], health: Health | None = None) -> None:
        super().__init__(watched, health)
        self._norms: dict[object, tuple[Table, Tensor]] = {}

    def before_step(self, index: int, optimizer: Optimizer) -> None:
        """Ask for the norms: after the step they would describe the next one."""
        if self.is_due(index):
            self.record.want(self.optimized(optimizer))

    def measure(self, look: Look, stepping: Stepping) -> tuple[list[Measured], Tensor]:
        """The four curves of norms."""
        table, norms = look.table, look.norms
        self._norms.update({watched.key: (table, norms.units) for watched, _, _ in stepping})
        names = frozenset(watched.name for watched, _, _ in stepping)
        shortest, longest = table.extremes(norms.units)
        values = {
            _metrics.WEIGHT_NORM: norms.tensors,
            _metrics.UNIT_NORM_RMS: table.root_mean_squares(norms.units),
            _metrics.UNIT_NORM_MIN: shortest,
            _metrics.UNIT_NORM_MAX: longest,
        }
        return [Measured(curve, table, found, names) for curve, found in values.items()], signs(table, norms.units)

    def unit_norms(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Norm of each unit of some weights before their last measured update, on the host, by one transfer."""
        found = []
        for name in names:
            table, norms = self._norms[self._by_name[name].key]
            place = next(i for i, w in enumerate(table.watched) if w.key == self._by_name[name].key)
            found.append(table.split(norms)[place])
        if not found:
            return {}
        flat = torch.cat(found).cpu()
        return dict(zip(names, torch.split(flat, [len(n) for n in found]), strict=True))
