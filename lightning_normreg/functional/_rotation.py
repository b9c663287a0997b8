"""Turning units by a given angle, in place: the direction of a step is the optimizer's, its length is not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_normreg.functional._norms import accumulator, chunked_norms, known_unset, row_norms
from lightning_normreg.functional._projection import Limits, check_radius, divisors
from lightning_normreg.functional._units import Unit, View, over_units, split_units, unit_rows

Per = Literal["layer", "unit"]

BLOCK = 2**18
"""Entries of a weight that a CPU works on at a time, so that temporaries stay in its cache."""
LARGEST = math.pi / 2
"""Angle that no unit exceeds which turns by its share of its layer's rotation: from there on it would turn back."""
_ROUNDING = 0.5
"""Tangential part, in ε‖w‖, up to which it may be nothing but the rounding of each entry by at most ε/2."""
_STEERED = 4.0
"""Likewise, up to which rounding, about 0.2 ε‖w‖ long, makes up 5 % of it or more."""

_SMALL = 1e-9
"""Of norms from here to its inverse, squares and products keep their digits in float32."""


@dataclass(frozen=True)
class Turn:
    """An update of every unit, seen from where it started, each of shape ``(units,)``.

    Attributes:
        norm: Norm before the update.
        radial: Signed length of the update along the unit.
        tangent: Length of the update across it.
    """

    norm: Tensor
    radial: Tensor
    tangent: Tensor

    def speeds(self, eps: float | Tensor) -> Tensor:
        """Length of the tangential part over the norm; 0 for a unit without direction, and for rounding alone.

        Args:
            eps: Of the type that the weight is kept in.
        """
        turns = (self.tangent > _ROUNDING * eps * self._rounded()) & self.ordinary()
        return torch.where(turns, self.tangent / torch.where(turns, self.norm, 1.0), 0.0)

    def steered(self, eps: float | Tensor) -> Tensor:
        """Which units have an update so small that the rounding of the weights shows in its direction."""
        return (self.tangent > 0) & (self.tangent <= _STEERED * eps * self._rounded())

    def _rounded(self) -> Tensor:
        """Length of what was rounded: the weight after the update, or before it where that is longer."""
        return self.norm + self.radial.abs()

    def ordinary(self) -> Tensor:
        """Which units have a direction, and a finite update."""
        return (self.norm >= torch.finfo(self.norm.dtype).tiny) & self.finite()

    def finite(self) -> Tensor:
        """Which units were finite, and have a finite update."""
        return (self.norm + self.radial.abs() + self.tangent).isfinite()

    def after(self) -> Tensor:
        """Norm after the update."""
        return torch.hypot(self.norm + self.radial, self.tangent)


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


def measure_turn(views: Sequence[View], starts: Sequence[View]) -> Turn:
    """What an update has done to units that are spread over several tensors, such as a weight and its bias.

    The update is formed first, exactly for close numbers, so that what is left of it across the unit has the digits
    that it had in the weight. Where it is mostly radial, the radial part is taken off before lengths are, and what
    rounding leaves of it is taken off as well.

    Args:
        views: For each tensor what :func:`split_units` returns.
        starts: The same of the tensors before the update.
    """
    pairs = [
        (unit_rows(start, kept, like=view), unit_rows(view, kept))
        for (view, kept), (start, _) in zip(views, starts, strict=True)
    ]
    norms = [row_norms(start) for start, _ in pairs]
    norm = norms[0] if len(norms) == 1 else row_norms(torch.stack(norms, dim=1))
    length = torch.where(norm > 0, norm, 1.0)
    tiles, scale = _Tiles(pairs), None
    if not known_unset((length < _SMALL) | (length > 1 / _SMALL)):  # products may overflow, or underflow
        scale = 1 / _power_of_two(length)
        tiles, length = _Tiles(pairs, scale.unsqueeze(1)), length * scale
    products, squares = tiles.sums(None)
    along = products / length.square()
    tangent = (squares - (along * length).square()).clamp_min(0).sqrt()
    if not known_unset((along * length).abs() > tangent):
        products, squares = tiles.sums(along)
        more = products / length.square()
        along, tangent = along + more, (squares - (more * length).square()).clamp_min(0).sqrt()
    return Turn(norm, along * norm, tangent if scale is None else tangent / scale)


class _Tiles:
    """Rows before and after an update, some of their entries at a time."""

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]], scale: Tensor | None = None) -> None:
        self._pairs, self._scale = pairs, scale
        first = pairs[0][0]
        self._units, self._wide = len(first), accumulator(first.dtype)
        self._block = BLOCK if first.device.type == "cpu" else 2**24
        largest = min(self._block, max(start.numel() for start, _ in pairs))
        self._update, self._product = first.new_empty(2, largest, dtype=self._wide)

    def sums(self, taken: Tensor | None) -> tuple[Tensor, Tensor]:
        """Of each row: product with the update, and square of the update, less ``taken`` times the row."""
        products, squares = (self._update.new_zeros(self._units) for _ in range(2))
        for at, start, update in self._updates(taken):
            squares[at] += chunked_norms(update).square()
            products[at] += torch.mul(start, update, out=self._product[: start.numel()].view(start.shape)).sum(dim=1)
        return products, squares

    def _updates(self, taken: Tensor | None) -> Iterator[tuple[slice, Tensor, Tensor]]:
        for starts, ends in self._pairs:
            height = max(1, self._block // max(1, starts.shape[1]))
            for top in range(0, self._units, height):
                at = slice(top, top + height)
                tiles = (torch.split(rows[at], self._block, 1) for rows in (starts, ends))
                for pair in zip(*tiles, strict=True):
                    start, end = (self._scaled(rows, at) for rows in pair)
                    update = torch.sub(end, start, out=self._update[: start.numel()].view(start.shape))
                    yield at, start, update if taken is None else update.addcmul_(start, taken[at, None], value=-1)

    def _scaled(self, rows: Tensor, at: slice) -> Tensor:
        rows = rows if rows.dtype == self._wide else rows.to(self._wide)
        return rows if self._scale is None else rows * self._scale[at]


def _power_of_two(values: Tensor) -> Tensor:
    """The largest power of two below each number, so that dividing by it rounds nothing; within 2^±100."""
    bits, fraction = (torch.int64, 52) if values.dtype == torch.float64 else (torch.int32, 23)
    return (values.clamp(2.0**-100, 2.0**100).view(bits) >> fraction << fraction).view(values.dtype)


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
    block = BLOCK if first.device.type == "cpu" else 2**24
    if not first.ndim or first.numel() <= block:
        yield tensors
        return
    step = max(1, block * first.shape[0] // first.numel())
    parts = (torch.split(t, step) if len(t) > 1 else [t] * -(-first.shape[0] // step) for t in tensors)
    yield from zip(*parts, strict=True)
