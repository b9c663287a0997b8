"""Turning every unit by the angle that is asked for, at each real step, and holding its norm."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_normreg._weights import Table, Watched
from lightning_normreg.functional._lengths import Lengths
from lightning_normreg.functional._rotation import LARGEST, Per, mixture, unit_angles
from lightning_normreg.steps._angles import Angle, Angles
from lightning_normreg.steps._projector import ASTRAY, Projector, Radius
from lightning_normreg.steps._step_hooks import of_mine
from lightning_normreg.steps._subscriber import Phase
from lightning_normreg.steps._tracker import Stepping

Hold = Literal["step", "mean"]
Mean = tuple[Tensor, Tensor]
"""Decaying sum of squared speeds over learning rates, of a layer or of its units, and of the weights in it."""

MEMORY = 0.99
"""Of the mean over steps that ``hold="mean"`` holds."""
_COUNTED = ("updates", "capped", "steered", "still")


def check_control_arguments(per: str, hold: str) -> None:
    """Raise a ``ValueError`` for an unknown word."""
    if per not in get_args(Per):
        raise ValueError(f"`per` must be 'layer' or 'unit', got {per!r}.")
    if hold not in get_args(Hold):
        raise ValueError(f"`hold` must be 'step' or 'mean', got {hold!r}.")


class Rotator(Projector):
    """Projects, and turns its targets by an angle when an optimizer has stepped them.

    Args:
        targets: The weights.
        radius: As of :class:`Projector`.
        angle: ``"lr"``, ``"equilibrium"`` or radians, see :class:`lightning_normreg.RotationControl`; or a function
            that is asked at each step, by the weight's name.
        per: Whose rotation has the angle: ``"layer"`` or ``"unit"``.
        hold: ``"step"`` or ``"mean"``.
    """

    phase = Phase.CONTROL

    def __init__(
        self,
        targets: Sequence[Watched],
        radius: Radius = "auto",
        angle: Angle | Callable[[str], float] = "lr",
        *,
        per: Per = "layer",
        hold: Hold = "step",
    ) -> None:
        check_control_arguments(per, hold)
        super().__init__(targets, radius)
        self.angles = Angles(angle)
        self.per, self.hold = per, hold
        self._means: dict[str, Mean] = {}
        self._counts: dict[Table, Tensor] = {}
        self._last: Stepping = []

    def state_dict(self) -> dict[str, Any]:
        """What ``hold="mean"`` goes on from as well."""
        means = {name: (sums.cpu(), weights.cpu()) for name, (sums, weights) in self._means.items()}
        return super().state_dict() | {"means": means}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        super().load_state_dict(state)
        self._means |= state.get("means", {})

    def allocate(self, optimizers: Iterable[Optimizer]) -> int:
        """Make room for copies of the weights, so that memory runs out at the start or never; the new bytes."""
        return self.record.allocate(p for target in self.optimized(optimizers) for p in target.tensors())

    def announce(self, targets: Sequence[Watched], optimizers: Iterable[Optimizer]) -> None:
        """Say what angle and decay mean from now on, and check that the angle can be had. Reads the device."""
        self.angles.announce(of_mine(optimizers, self._by_parameter))
        short = [target.name for target in self.optimized(optimizers) if target.longest() == 1]
        if short:
            rank_zero_warn(
                f"{', '.join(map(repr, short))} has units of one entry, which have no direction to turn in: they stay "
                "as they are. Leave them out by `exclude`."
            )

    def _band(self, target: Watched) -> float:
        # What a step has left is not to be moved at a resume. A mixture has more roundings than a quotient, above all
        # where the update is mostly radial; the next step makes them good.
        return target.dead_band() + ASTRAY

    def before_step(self, index: int, optimizer: Optimizer) -> None:
        """Copy the weights."""
        self.record.copy(p for target in self.optimized([optimizer]) for p in target.tensors())

    def after_step(self, index: int, optimizer: Optimizer, skipped: Tensor | None) -> None:
        """Turn what the optimizer has updated."""
        # All that it has, so that the table stays the same; those without a gradient, as unused experts, do not count.
        stepping = [entry for entry in of_mine([optimizer], self._by_parameter) if entry[0].parameter.requires_grad]
        ready = {target for target, _, _ in of_mine([optimizer], self._by_parameter, ready=True)}
        if not ready:
            return
        self._last = stepping
        table = self.record.table([target for target, _, _ in stepping])
        lengths = table.lengths(self.record.copies.__getitem__)
        radius = self._radii(table)
        if table in self._free:
            radius = self._take_up(table, lengths.after())
        moved = table.column([target in ready for target, _, _ in stepping]) > 0
        reached = table.reached()
        moved = moved if reached is None else moved & reached  # those that a sparse gradient leaves out do not count
        counted = lengths.finite() & table.limits.hold(radius) & moved
        eps = table.column([torch.finfo(w.parameter.dtype).eps for w in table.watched])
        speeds = lengths.speeds(eps)
        layers = _layer_speeds(table, torch.where(counted, speeds, 0.0), counted)
        done = moved if skipped is None else moved & (skipped.to(moved.device) == 0)
        typical = self._typical(table, speeds, layers, stepping, done)
        wanted = self.angles.tensor(stepping, speeds)
        angles = unit_angles(speeds, wanted[table.layer], typical)
        limit = LARGEST if self.per == "layer" or self.hold == "mean" else math.pi
        capped = angles > limit
        angles = angles.clamp(max=limit)
        table.mix(mixture(lengths, angles, radius, table.limits), self.record.copies.__getitem__)
        still = ((layers == 0) & (wanted > 0))[table.layer] & moved
        self._note(table, lengths, torch.stack([counted, capped & moved, lengths.shaky(eps) & counted, still]))
        factors = _layer_speeds(table, torch.where(counted, angles, 0.0), counted) / layers
        factors = torch.where(layers > 0, factors, 0.0)
        self.record.factors.update((w.key, factor) for w, factor in zip(table.watched, factors, strict=True))
        self._stepped.update(w.name for w in ready)

    def _typical(self, table: Table, speeds: Tensor, layers: Tensor, stepping: Stepping, moved: Tensor) -> Tensor:
        """Speed at which a unit turns by the angle itself."""
        sizes = [1] * len(table.sizes) if self.per == "layer" else table.sizes
        own = layers if self.per == "layer" else speeds
        if self.hold == "mean":
            # Optimizers follow their learning rate at the end, so a mean without it does not lag behind a schedule.
            lrs = self.angles.numbers([group.get("lr", 1.0) for _, group, _ in stepping], speeds)
            lr = lrs if self.per == "layer" else lrs[table.layer]
            names = [target.name for target, _, _ in stepping]
            zero = (own.new_zeros(()), own.new_zeros(()))
            known = zip(*(self._means.get(name, zero) for name in names), strict=True)
            sums, weights = (
                torch.cat([v.to(own).expand(n) for v, n in zip(values, sizes, strict=True)]) for values in known
            )
            new = (own / lr).square()
            each = table.extremes(moved.to(own.dtype))[1] > 0 if self.per == "layer" else moved
            counts = new.isfinite() & (lr > 0) & each
            sums = torch.where(counts, MEMORY * sums + (1 - MEMORY) * new, sums)
            weights = torch.where(counts, MEMORY * weights + (1 - MEMORY), weights)
            pairs = zip(torch.split(sums, sizes), torch.split(weights, sizes), strict=True)
            self._means.update(zip(names, pairs, strict=True))
            own = torch.where(weights > 0, lr * (sums / weights).sqrt(), 0.0)
        return own[table.layer] if self.per == "layer" else own

    def _note(self, table: Table, lengths: Lengths, flags: Tensor) -> None:
        """Keep on the device what the next report reads."""
        counts = torch.stack([table.totals(flag) for flag in flags])
        self._counts[table] = self._counts[table] + counts if table in self._counts else counts
        self._norms[table] = lengths.after()
        if self.looking and all(w.name in self._stepped for w in table.watched):
            self._starts[table] = lengths.norm

    def report(self) -> None:
        """Warn once of units that cannot be turned, or not as asked. Reads the device."""
        super().report()
        self.angles.check(self._last)
        named = {target.name: target for target in self.targets}
        for name, numbers in ((name, n) for name, n in self.counts().items() if name in named):
            # At the end of a schedule a few updates are that small, and turn by next to nothing anyway.
            often = max(3 * named[name].units(), 0.05 * numbers["updates"])
            enough = {"updates": math.inf, "capped": 1, "steered": often, "still": often}
            for what, number in numbers.items():
                if number >= enough[what] and (name, what) not in self._told:
                    self._told.add((name, what))
                    rank_zero_warn(_why_not_turned(what, name, number, named[name].parameter.dtype))

    def counts(self) -> dict[str, dict[str, int]]:
        """For each weight how often a unit was updated, capped at π/2, steered by rounding, or stood still with all."""
        found: dict[str, dict[str, int]] = {}
        for table, counts in self._counts.items():
            for w, numbers in zip(table.watched, counts.T.long().tolist(), strict=True):
                so_far = found.get(w.name, {})
                found[w.name] = {what: n + so_far.get(what, 0) for what, n in zip(_COUNTED, numbers, strict=True)}
        return found


def _layer_speeds(table: Table, speeds: Tensor, counted: Tensor) -> Tensor:
    """Root mean square of the speeds of those units of each layer that count."""
    return (table.totals(speeds.square()) / table.totals(counted).clamp_min(1)).sqrt()


def _why_not_turned(what: str, name: str, number: int, dtype: torch.dtype) -> str:
    if what == "capped":
        return (
            f"{number} times so far a unit of {name!r} was to turn by more than π/2 in a step, and was turned by π/2: "
            "its update is much larger than those of the other units. Use a smaller angle, or per='unit'."
        )
    had = {
        "steered": f"{number} times so far a unit of {name!r} had an update so small that the rounding of {dtype} "
        "shows in its direction; where it is no longer than rounding, the unit does not turn.",
        "still": f"In several steps no unit of {name!r} has turned: its updates are zero, or lost to the rounding of "
        f"{dtype}.",
    }
    return (
        f"{had[what]} Give the optimizer a larger learning "
        "rate and `angle` a number, or, for SGD, multiply the loss: neither changes the angle."
    )
