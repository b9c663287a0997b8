"""Turning every unit by the angle that is asked for, at each real step, and holding its norm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_normreg._optimizers import Group, update_rule
from lightning_normreg._weights import Watched, at_once
from lightning_normreg.functional._projection import Limits
from lightning_normreg.functional._rotation import LARGEST, Mixture, Per, layer_speeds, mixture, unit_angles
from lightning_normreg.functional._turn import Turn
from lightning_normreg.steps._angles import Angle, Angles
from lightning_normreg.steps._projector import ASTRAY, Projector, Radius
from lightning_normreg.steps._step_hooks import Phase, Recording, of_mine
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


class Rotator(Projector, Recording):
    """Projects, and turns its targets by an angle when an optimizer has stepped them.

    Args:
        targets: The weights.
        radius: As of :class:`Projector`.
        angle: ``"lr"``, ``"equilibrium"`` or radians, see :class:`lightning_normreg.RotationControl`.
        per: Whose rotation has the angle: ``"layer"`` or ``"unit"``.
        hold: ``"step"`` or ``"mean"``.
        initial: Radii that were measured, for ``radius="initial"``.
        means: What ``hold="mean"`` goes on from.
    """

    phase = Phase.CONTROL

    def __init__(
        self,
        targets: Sequence[Watched],
        radius: Radius = "auto",
        angle: Angle = "lr",
        *,
        per: Per = "layer",
        hold: Hold = "step",
        initial: Mapping[str, Tensor] | None = None,
        means: Mapping[str, Mean] | None = None,
    ) -> None:
        check_control_arguments(per, hold)
        Projector.__init__(self, targets, radius, initial)
        Recording.__init__(self)
        self.angles = Angles(angle)
        self.per, self.hold = per, hold
        self.means = dict(means or {})
        self._named = {target.name: target for target in self.targets}
        self._batches: dict[tuple[str, ...], _Batch] = {}
        self._last: Stepping = []

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
        stepping = of_mine([optimizer], self._by_parameter, ready=True)
        self._last = stepping or self._last
        targets = [target for target, _, _ in stepping]
        self._prepare(targets)
        copies = self.record.copies.__getitem__
        shares = {t.name: _decay_share(owner, group) for t, group, owner in stepping}
        turns = at_once(lambda t, total: t.turn_later(total, copies, shares[t.name]), targets)
        alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for place, turn in enumerate(turns):
            alike.setdefault((turn.norm.device, turn.norm.dtype), []).append(place)
        for places in alike.values():  # one, but for models of several types
            self._turn([stepping[i] for i in places], [turns[i] for i in places], skipped)
        self._stepped.update(t.name for t in targets)

    def _turn(self, stepping: Stepping, turns: Sequence[Turn], skipped: Tensor | None) -> None:
        targets = [target for target, _, _ in stepping]
        batch = self._batch(targets, turns)
        turn = Turn.joined(turns)
        speeds = turn.speeds(batch.eps)
        counted = turn.finite() & batch.held
        layers = layer_speeds(torch.where(counted, speeds, 0.0), counted, batch.sizes)
        typical = self._typical(batch, speeds, layers, stepping, skipped)
        wanted = self.angles.tensor(stepping, speeds)
        angles = unit_angles(speeds, wanted[batch.layer], typical)
        limit = LARGEST if self.per == "layer" or self.hold == "mean" else math.pi
        capped = angles > limit
        angles = angles.clamp(max=limit)
        mix = mixture(turn, angles, batch.radius, batch.limits)
        for target, *own in zip(targets, *(torch.split(values, batch.sizes) for values in mix), strict=True):
            target.mix(Mixture(*own), self.record.copies.__getitem__)
        still = ((layers == 0) & (wanted > 0))[batch.layer]
        self._note(batch, turn, torch.stack([counted, capped, turn.steered(batch.eps) & counted, still]))
        factors = layer_speeds(torch.where(counted, angles, 0.0), counted, batch.sizes) / layers
        for target, factor in zip(targets, torch.where(layers > 0, factors, 0.0), strict=True):
            self.record.factors[target.parameter] = factor

    def _typical(
        self,
        batch: _Batch,
        speeds: Tensor,
        layers: Tensor,
        stepping: Stepping,
        skipped: Tensor | None,
    ) -> Tensor:
        """Speed at which a unit turns by the angle itself."""
        sizes = [1] * len(batch.sizes) if self.per == "layer" else batch.sizes
        own = layers if self.per == "layer" else speeds
        if self.hold == "mean":
            # Optimizers follow their learning rate at the end, so a mean without it does not lag behind a schedule.
            lrs = self.angles.numbers([group.get("lr", 1.0) for _, group, _ in stepping], speeds)
            lr = lrs if self.per == "layer" else lrs[batch.layer]
            names = [target.name for target, _, _ in stepping]
            zero = (own.new_zeros(()), own.new_zeros(()))
            known = zip(*(self.means.get(name, zero) for name in names), strict=True)
            sums, weights = (
                torch.cat([v.to(own).expand(n) for v, n in zip(values, sizes, strict=True)]) for values in known
            )
            new = (own / lr).square()
            counts = new.isfinite() & (lr > 0)
            if skipped is not None:
                counts &= skipped.to(own.device) == 0
            sums = torch.where(counts, MEMORY * sums + (1 - MEMORY) * new, sums)
            weights = torch.where(counts, MEMORY * weights + (1 - MEMORY), weights)
            pairs = zip(torch.split(sums, sizes), torch.split(weights, sizes), strict=True)
            self.means.update(zip(names, pairs, strict=True))
            own = torch.where(weights > 0, lr * (sums / weights).sqrt(), 0.0)
        return own[batch.layer] if self.per == "layer" else own

    def _batch(self, targets: Sequence[Watched], turns: Sequence[Turn]) -> _Batch:
        key = tuple(target.name for target in targets)
        if key not in self._batches:
            radii = [self._target(target) for target in targets]
            self._batches[key] = _Batch.of(targets, radii, [turn.norm for turn in turns])
        return self._batches[key]

    def _note(self, batch: _Batch, turn: Turn, flags: Tensor) -> None:
        """Keep on the device what the next report reads."""
        batch.counts.index_add_(1, batch.layer, flags.long())
        self._norms.update(zip(batch.names, torch.split(turn.after(), batch.sizes), strict=True))
        if self.looking:
            before = zip(batch.names, torch.split(turn.norm, batch.sizes), strict=True)
            self._starts.update((name, norms) for name, norms in before if name in self._stepped)

    def report(self) -> None:
        """Warn once of units that cannot be turned, or not as asked. Reads the device."""
        super().report()
        self.angles.check(self._last)
        for name, numbers in self.counts().items():
            # At the end of a schedule a few updates are that small, and turn by next to nothing anyway.
            often = max(3 * self._named[name].units(), 0.05 * numbers["updates"])
            enough = {"updates": math.inf, "capped": 1, "steered": often, "still": often}
            for what, number in numbers.items():
                if number >= enough[what] and f"{what} {name}" not in self._told:
                    self._told.add(f"{what} {name}")
                    rank_zero_warn(_why_not_turned(what, name, number, self._named[name].parameter.dtype))

    def counts(self) -> dict[str, dict[str, int]]:
        """For each weight how often a unit was updated, capped at π/2, steered by rounding, or stood still with all."""
        found: dict[str, dict[str, int]] = {}
        for batch in self._batches.values():
            for name, numbers in zip(batch.names, batch.counts.T.tolist(), strict=True):
                so_far = found.get(name, {})
                found[name] = {what: n + so_far.get(what, 0) for what, n in zip(_COUNTED, numbers, strict=True)}
        return found


@dataclass(frozen=True)
class _Batch:
    """What does not change about the units of some weights, one after another, so that few kernels do for all."""

    names: list[str]
    sizes: list[int]
    layer: Tensor
    eps: Tensor
    radius: Tensor
    limits: Limits
    held: Tensor
    counts: Tensor

    @classmethod
    def of(cls, targets: Sequence[Watched], radii: Sequence[float | Tensor], norms: Sequence[Tensor]) -> _Batch:
        sizes = [len(n) for n in norms]
        like = norms[0]
        layer = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).to(like.device)

        def spread(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=like.dtype).to(like.device)[layer]

        radius = torch.cat([torch.ones_like(n) * r for n, r in zip(norms, radii, strict=True)])
        limits = [Limits.of(t.parameter.dtype.to_real(), t.longest()) for t in targets]
        bounds = Limits(*(spread([float(x) for x in bound]) for bound in zip(*limits, strict=True)))
        eps = spread([torch.finfo(t.parameter.dtype).eps for t in targets])
        counts = torch.zeros(len(_COUNTED), len(sizes), dtype=torch.long, device=like.device)
        return cls([t.name for t in targets], sizes, layer, eps, radius, bounds, bounds.hold(radius), counts)


def _decay_share(optimizer: Optimizer, group: Group) -> float | Tensor:
    rule = update_rule(optimizer, group)
    return 0.0 if rule is None else rule.decay_share(group)


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
