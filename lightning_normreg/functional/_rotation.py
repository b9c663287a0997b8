"""Turning units by a given angle, in place: the direction of a step is the optimizer's, its length is not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_normreg.functional._device import BLOCK, accumulator, way_of
from lightning_normreg.functional._lengths import Lengths, measure_rows
from lightning_normreg.functional._norms import Operation
from lightning_normreg.functional._projection import Limits, check_radius, factors, writes
from lightning_normreg.functional._units import Unit, over_units, split_units, unit_rows

Per = Literal["layer", "unit"]

LARGEST = math.pi / 2
"""Angle that no unit exceeds which turns by its share of its layer's rotation: from there on it would turn back."""


class Mixture(NamedTuple):
    """What each unit becomes: ``scale``·(w + ``update``·Δ), but for those that are to be left as they are."""

    scale: Tensor
    update: Tensor
    alone: Tensor

    def to(self, dtype: torch.dtype) -> Mixture:
        """The numbers in another type."""
        return Mixture(self.scale.to(dtype), self.update.to(dtype), self.alone)

    def at(self, places: Tensor) -> Mixture:
        """Those of the units at some places; beyond the last one what stays as it is."""
        left = [(self.scale, 1.0), (self.update, 1.0), (self.alone, True)]
        return Mixture(*(torch.cat([v, v.new_full((1,), x)])[places] for v, x in left))


@writes
def rotate_(
    weight: Tensor,
    before: Tensor,
    angle: float | Tensor,
    unit: Unit = "neuron",
    *,
    per: Per = "layer",
    radius: float | Tensor | None = None,
    dim: int = 0,
    groups: int = 1,
) -> Tensor:
    r"""Make the last update of a weight turn it by a given angle, in place, and put its units at a norm.

    With Δ = weight − before, and :math:`t_u` its part across the unit, the unit moves along the great circle that
    Δ points along:

    .. math:: w_u\leftarrow\frac{R}{\lVert w_u\rVert}\Big(w_u\cos\theta_u
        +\lVert w_u\rVert\frac{t_u}{\lVert t_u\rVert}\sin\theta_u\Big).

    ``per="layer"``: :math:`\theta_u\propto\lVert t_u\rVert/\lVert w_u\rVert` with root mean square ``angle``, so that
    units keep their relative speeds, none above π/2; ``per="unit"``: each turns by ``angle``. What is radial in the
    update, such as decoupled weight decay, has no effect.

    A unit whose update has no tangential part, or none above the rounding of the weight (ε/2·‖w‖), does not turn; nor
    does a unit of one entry. A zero unit has nothing to turn: if the update has moved it, it is put at the radius. One
    with an infinite or NaN entry on either side stays as it is.

    Args:
        weight: The weight after the optimizer's step, any shape; written in place.
        before: The same weight before the step.
        angle: Radians, in [0, π).
        unit: See :func:`unit_norms`.
        per: ``"layer"`` or ``"unit"``.
        radius: As in :func:`project_`; by default the norm before the step.
        dim: See :func:`unit_norms`.
        groups: See :func:`unit_norms`.

    Returns:
        Angle in radians by which each unit was turned, shape ``(units,)``.

    Raises:
        ValueError: If ``angle`` is a number outside of [0, π), ``per`` is unknown, ``radius`` is a number that is not
            positive and finite, the shapes differ, or a gradient is to flow through ``weight``: like an optimizer's
            step this is not seen by autograd.

    Examples:
        >>> before = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
        >>> weight = torch.tensor([[0.9, 0.3], [0.9, 0.4]])  # 0.3 and 0.4 across, and 0.1 of decay
        >>> rotate_(weight, before, 0.1)
        tensor([0.0849, 0.1131])
        >>> weight
        tensor([[0.9964, 0.0848],
                [0.9936, 0.1129]])

    Reference:
        The rotational optimizers of Kosson et al. 2024, https://arxiv.org/abs/2305.17212, algorithm 1, with the angle
        exact at any size.
    """
    check_angle(angle)
    if per not in get_args(Per):
        raise ValueError(f"`per` must be 'layer' or 'unit', got {per!r}.")
    if radius is not None:
        check_radius(radius)
    if weight.shape != before.shape:
        raise ValueError(f"`before` must have the weight's shape {tuple(weight.shape)}, got {tuple(before.shape)}.")
    (view, kept), (start, _) = (split_units(tensor, unit, dim, groups) for tensor in (weight, before))
    rows = unit_rows(view, kept)
    lengths = measure_rows(unit_rows(start, kept, like=view), rows)
    speeds = lengths.speeds(torch.finfo(view.dtype).eps)
    counted = lengths.finite()
    whole = (torch.where(counted, speeds, 0.0).square().sum() / counted.sum().clamp_min(1)).sqrt()
    angles = unit_angles(speeds, angle, speeds if per == "unit" else whole)
    if per == "layer":
        angles = angles.clamp(max=LARGEST)
    limits = Limits.of(view.dtype, rows.shape[1])
    mix = mixture(lengths, angles, lengths.norm if radius is None else radius, limits)
    mix_(view, start, kept, mix.to(accumulator(view.dtype)))
    return angles.to(accumulator(view.dtype))


def check_angle(angle: float | Tensor) -> None:
    """Raise a ``ValueError`` unless a number is in [0, π); a tensor is trusted: reading it waits."""
    if not isinstance(angle, Tensor) and not 0 <= angle < math.pi:
        raise ValueError(f"`angle` must be in [0, π) radians, got {angle:g}. Angles per step are small, such as 0.01.")


def unit_angles(speeds: Tensor, angle: float | Tensor, typical: Tensor) -> Tensor:
    """Angle of each unit: ``angle`` at the typical speed, in proportion to its own; 0 where nothing moves."""
    moves = typical > 0
    return torch.where(moves, speeds / torch.where(moves, typical, 1.0) * angle, 0.0)


def mixture(lengths: Lengths, angles: Tensor, radius: float | Tensor, limits: Limits) -> Mixture:
    """How to mix weight and update so that each unit turns by its angle and is at the radius.

    With r the radial and τ the tangential length, t = Δ − (r/n)w, so
    R/n·(w cos θ + t n/τ sin θ) = s·(w + (n sin θ/τ)/c Δ) with c = cos θ − r/τ sin θ and s = c R/n.
    Scaling comes last, because of a norm far above the radius nothing but rounding would be left of w if its multiple
    were subtracted from it. c is kept off 0 by less than shows in the result. A unit that does not turn keeps every bit
    if it is at the radius already, as under projection.
    """
    norm, radial, tangent = lengths.norm, lengths.radial, lengths.tangent
    target = radius.to(norm) if isinstance(radius, Tensor) else torch.full_like(norm, radius)
    turns, born = angles > 0, norm == 0
    alone = ~(lengths.finite() & limits.hold(target) & (born | (norm >= limits.tiny)))
    length = torch.where(turns, norm, 1.0)
    across = torch.where(turns, tangent, 1.0)
    ahead = angles.cos() - angles.sin() * (radial / across)
    least = limits.band / 100
    ahead = torch.where(ahead.abs() < least, least, ahead)
    # Of a zero unit all of the update counts as tangential, and none has been projected yet.
    factor = factors(torch.where(born, tangent, norm), target, limits)
    scale = torch.where(turns, target / length * ahead, factor)
    update = torch.where(turns, angles.sin() * (length / across) / ahead, born.to(norm))
    return Mixture(scale.masked_fill(alone, 1.0), update.masked_fill(alone, 1.0), alone)


def mix_(view: Tensor, start: Tensor, kept: tuple[int, ...], mix: Mixture) -> None:
    """Write what each unit becomes, in place.

    Args:
        view: What :func:`split_units` returns of the weight.
        start: The same of the weight before the update.
        kept: Dimensions that number the units.
        mix: In the type of sums of the weight.
    """
    # Where values can be read at once, that is almost never.
    if view.dtype == mix.update.dtype and way_of(mix.alone) == "host" and not bool(mix.alone.any()):
        for operation in mix_operations(view, start, kept, mix):
            operation()
        return
    scale, update, alone = (over_units(values, view, kept) for values in mix)
    for end, begin, s, u, left in blocks(view, start, scale, update, alone):
        wide = end.to(u.dtype)
        end.copy_(torch.where(left, wide, begin.to(u.dtype).lerp(wide, u).mul(s)))


def mix_operations(view: Tensor, start: Tensor, kept: tuple[int, ...], mix: Mixture) -> list[Operation]:
    """What :func:`mix_` does where no unit is to be left alone, with the numbers that stand in ``mix`` by then."""
    scale, update = (over_units(values, view, kept) for values in mix[:2])
    return [
        operation
        for end, begin, s, u in blocks(view, start, scale, update)
        for operation in (partial(torch.lerp, begin, end, u, out=end), partial(end.mul_, s))
    ]


def blocks(*tensors: Tensor, size: int | None = None) -> Iterator[tuple[Tensor, ...]]:
    """Slices of the first tensor that fit the cache, or have a size, and of others that broadcast against it."""
    first = tensors[0]
    block = size or BLOCK[way_of(first)]
    if not first.ndim or first.numel() <= block:
        yield tensors
        return
    step = max(1, block * first.shape[0] // first.numel())
    parts = (torch.split(t, step) if len(t) > 1 else [t] * -(-first.shape[0] // step) for t in tensors)
    yield from zip(*parts, strict=True)
