"""Turning units by a given angle, in place: the direction of a step is the optimizer's, its length is not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_normreg.functional._norms import known_unset
from lightning_normreg.functional._projection import Limits, check_radius, divisors
from lightning_normreg.functional._turn import Turn, block_of, measure_turn
from lightning_normreg.functional._units import Unit, View, over_units, split_units

Per = Literal["layer", "unit"]

LARGEST = math.pi / 2
"""Angle that no unit exceeds which turns by its share of its layer's rotation: from there on it would turn back."""


class Mixture(NamedTuple):
    """What each unit becomes: (1 + ``before``)·w + ``update``·Δ, but for those that are to be left as they are."""

    before: Tensor
    update: Tensor
    alone: Tensor


@torch.no_grad()
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
            positive and finite, or the shapes differ.

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
    views, starts = [split_units(weight, unit, dim, groups)], [split_units(before, unit, dim, groups)]
    turn = measure_turn(views, starts)
    dtype = views[0][0].dtype
    speeds = turn.speeds(torch.finfo(dtype).eps)
    angles = unit_angles(speeds, angle, speeds if per == "unit" else layer_speeds(speeds, turn.finite(), [len(speeds)]))
    if per == "layer":
        angles = angles.clamp(max=LARGEST)
    limits = Limits.of(dtype, views[0][0].numel() // max(1, len(speeds)))
    mix_(views, starts, mixture(turn, angles, turn.norm if radius is None else radius, limits))
    return angles


def check_angle(angle: float | Tensor) -> None:
    """Raise a ``ValueError`` unless a number is in [0, π); a tensor is trusted: reading it waits."""
    if not isinstance(angle, Tensor) and not 0 <= angle < math.pi:
        raise ValueError(f"`angle` must be in [0, π) radians, got {angle:g}. Angles per step are small, such as 0.01.")


def layer_speeds(speeds: Tensor, counted: Tensor, sizes: Sequence[int]) -> Tensor:
    """Root mean square of the speeds of those units of a layer that count, for each layer of some sizes."""
    norms = torch._foreach_norm(torch.split(torch.cat([speeds, counted.to(speeds.dtype)]), [*sizes, *sizes]))
    lengths, roots = torch.stack(norms).chunk(2)  # the root of a number is the norm of so many ones
    return lengths / roots.clamp_min(1)


def unit_angles(speeds: Tensor, angle: float | Tensor, typical: Tensor) -> Tensor:
    """Angle of each unit: ``angle`` at the typical speed, in proportion to its own; 0 where nothing moves."""
    moves = typical > 0
    return torch.where(moves, speeds / torch.where(moves, typical, 1.0) * angle, 0.0)


def mixture(turn: Turn, angles: Tensor, radius: float | Tensor, limits: Limits) -> Mixture:
    """How to mix weight and update so that each unit turns by its angle and is at the radius.

    With r the radial and τ the tangential length, t = Δ − (r/n)w, so
    R/n·(w cos θ + t n/τ sin θ) = R/n·(cos θ − r/τ sin θ)w + R/τ sin θ Δ.
    A unit that does not turn keeps every bit if it is at the radius already, as under projection.
    """
    target = radius.to(turn.norm) if isinstance(radius, Tensor) else torch.full_like(turn.norm, radius)
    turns, born = angles > 0, turn.norm == 0
    alone = ~(turn.finite() & limits.hold(target) & (born | turn.ordinary()))
    norm, tangent = torch.where(turns, turn.norm, 1.0), torch.where(turns, turn.tangent, 1.0)
    across = target * angles.sin() / tangent
    half = (angles / 2).sin()
    turned = (target - norm) / norm - 2 * target / norm * half * half - across * (turn.radial / norm)
    # Of a zero unit all of the update counts as tangential, and none has been projected yet.
    divisor = divisors(torch.where(born, turn.tangent, turn.norm), target, limits).reciprocal()
    before, update = torch.where(turns, turned, divisor - 1), torch.where(turns, across, divisor * born)
    return Mixture(before.masked_fill(alone, 0.0), update.masked_fill(alone, 1.0), alone)


def mix_(views: Sequence[View], starts: Sequence[View], mix: Mixture) -> None:
    """Write what each unit becomes, in place."""
    all_move = known_unset(mix.alone)
    for (view, kept), (start, _) in zip(views, starts, strict=True):
        before, update, alone = (over_units(values, view, kept) for values in mix)
        if all_move and view.dtype == update.dtype:
            for end, begin, b, u in _slices(view, start, before, update):
                torch.lerp(begin, end, u, out=end).addcmul_(begin, b)
            continue
        for end, begin, b, u, left in _slices(view, start, before, update, alone):
            wide, start_wide = end.to(u.dtype), begin.to(u.dtype)
            end.copy_(torch.where(left, wide, start_wide.lerp(wide, u).addcmul_(start_wide, b)))


def _slices(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Slices of the first tensor that fit the cache, and of others that broadcast against it."""
    first = tensors[0]
    block = block_of(first)
    if not first.ndim or first.numel() <= block:
        yield tensors
        return
    step = max(1, block * first.shape[0] // first.numel())
    parts = (torch.split(t, step) if len(t) > 1 else [t] * -(-first.shape[0] // step) for t in tensors)
    yield from zip(*parts, strict=True)
