"""What one update did to each unit, along it and across it; or where a gradient points, seen from its weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lightning_normreg.functional._device import BLOCK, accumulator, number_type, scratch, way_of
from lightning_normreg.functional._norms import Operation, Results, norm_operations, row_norms, squares_fit

_ROUNDING = 0.5
"""Tangential part, in ε‖w‖, up to which it may be nothing but the rounding of each entry by at most ε/2."""
_SHAKY = 4.0
"""Tangential part, in ε‖w‖, up to which rounding, about 0.2 ε‖w‖ long, makes up 5 % of it or more."""


@dataclass(frozen=True)
class Lengths:
    """An update of every unit, or another vector at it, seen from where the unit was, each of shape ``(units,)``."""

    norm: Tensor  # norm of the unit before
    radial: Tensor  # signed length of the update along the unit
    tangent: Tensor  # length of the update across it
    ahead: Tensor  # signed length of the unit after the update along where it was: norm + radial before that cancels

    def update(self) -> Tensor:
        """Length of the update."""
        return torch.hypot(self.radial, self.tangent)

    def after(self) -> Tensor:
        """Norm after the update."""
        return torch.hypot(self.ahead, self.tangent)

    def rotation(self) -> Tensor:
        """Rotation in radians; 0 for a unit that is zero before the update or after it."""
        turned = torch.atan2(self.tangent, self.ahead)
        return torch.where(self.norm == 0, torch.zeros_like(turned), turned)

    def relative(self) -> Tensor:
        """Length of the update over the norm before it; 0 for a zero unit."""
        return torch.where(self.norm == 0, 0.0, self.update() / self.norm)

    def cosine(self) -> Tensor:
        """Cosine of the angle between unit and update, without its sign; 0 where one of them is zero."""
        update = self.update()
        return torch.where((update == 0) | (self.norm == 0), 0.0, (self.radial.abs() / update).clamp(max=1.0))

    def speeds(self, eps: float | Tensor) -> Tensor:
        """Length of the tangential part over the norm; 0 for a unit without direction, and for rounding alone.

        Args:
            eps: Of the type that the weight is kept in.
        """
        turns = (self.tangent > _ROUNDING * eps * self._rounded()) & (self.norm > 0) & self.finite()
        return torch.where(turns, self.tangent / torch.where(turns, self.norm, 1.0), 0.0)

    def shaky(self, eps: float | Tensor) -> Tensor:
        """Which units have an update so small that the rounding of the weights shows in its direction."""
        return (self.tangent > 0) & (self.tangent <= _SHAKY * eps * self._rounded())

    def _rounded(self) -> Tensor:
        """Length of what was rounded: the weight after the update, or before it where that is longer."""
        return self.norm + self.radial.abs()

    def finite(self) -> Tensor:
        """Which units were finite, and have a finite update."""
        return (self.norm + self.radial.abs() + self.tangent).isfinite()


def measure_rows(start: Tensor, end: Tensor, *, update: bool = True) -> Lengths:
    """Compare rows, each a unit, with what has become of them, or with other vectors at them (``update=False``)."""
    found = Results.of(start, 3, len(start))
    for operation in product_operations(start, end, found, update=update):
        operation()
    sums = row_sums(found.sums(), start.dtype, lambda odd: exact_sums(start[odd], end[odd], update=update))
    return lengths_of(*sums)


def lengths_of(squares: Tensor, products: Tensor, tangents: Tensor, ahead: Tensor) -> Lengths:
    """From the sums over the entries of each unit that :func:`row_sums` gives."""
    norm = squares.sqrt()
    length = torch.where(norm > 0, norm, 1.0)
    return Lengths(norm, products / length, tangents.clamp_min(0).sqrt(), ahead / length)


def product_operations(start: Tensor, end: Tensor, out: Results, *, update: bool = True) -> list[Operation]:
    """What gives the norm of each row a of ``start``, the norm of d, and the product of both, into ``(3, rows)``.

    d is the row of ``end`` less a, which is exact for close numbers, or with ``update=False`` that row itself. Some
    entries at a time, with temporaries in memory that is kept.
    """
    rows, entries = start.shape
    block = BLOCK[way_of(start)]
    if entries > block:
        cuts = list(zip(torch.split(start, block, 1), torch.split(end, block, 1), strict=True))
        parts = Results.of(start, len(cuts), 3, rows)
        found = [
            operation
            for number, (a, b) in enumerate(cuts)
            for row in range(rows)
            for operation in _tile(
                a[row : row + 1], b[row : row + 1], parts.at(number, slice(3), slice(row, row + 1)), update
            )
        ]
        return [*found, partial(_join, parts, out)]
    step = max(1, block // max(1, entries))
    tiles = ((slice(top, top + step)) for top in range(0, rows, step))
    return [op for at in tiles for op in _tile(start[at], end[at], out.at(slice(None), at), update)]


def _tile(a: Tensor, b: Tensor, out: Results, update: bool) -> list[Operation]:
    kept = accumulator(a.dtype) if way_of(a) == "host" else number_type(a)
    both = scratch("rows", a, 2 * a.numel(), kept).view(2, *a.shape)
    first, second = both[0], both[1]
    place = out.narrow if out.narrow.dtype == kept else out.wide
    return [
        partial(first.copy_, a),
        partial(torch.sub, b, first, out=second) if update else partial(second.copy_, b),
        *norm_operations(both, out.at(slice(2))),
        partial(first.mul_, second),
        partial(torch.sum, first, dim=1, out=place[2]),
    ]


def _join(parts: Results, out: Results) -> None:
    """Rows that were done piece by piece."""
    found = parts.sums()
    torch.linalg.vector_norm(found[:, :2], dim=0, out=out.wide[:2])
    torch.sum(found[:, 2], dim=0, out=out.wide[2])


def row_sums(raw: Tensor, dtype: torch.dtype, detour: Callable[[Tensor], Tensor]) -> Tensor:
    r"""The sums that add over the parts of a unit, from what :func:`product_operations` give.

    :math:`\sum a^2`, :math:`\sum ad`, the square of what d has across a, and :math:`\sum a(a+d)`. What is across is a
    difference, :math:`\sum d^2-(\sum ad)^2/\sum a^2`. In float32 it keeps its digits where d is no more along a than
    across it.

    Args:
        raw: Shape ``(3, rows)``.
        dtype: Of the weight.
        detour: :func:`exact_sums` of rows that are marked; taken on a CPU, and everywhere for rows of float64.

    Returns:
        Shape ``(4, rows)``.
    """
    norms, lengths, products = raw
    squares = norms.square()
    along = products.square() / torch.where(norms > 0, squares, 1.0)
    sums = torch.stack([squares, products, lengths.square() - along, squares + products])
    way, kept = way_of(raw), accumulator(dtype)
    if way == "host":
        # Not a number compares false.
        fine = (
            (2 * along <= lengths.square()) & squares_fit(norms, kept) & (squares_fit(lengths, kept) | (lengths == 0))
        )
        if not bool(fine.all()):
            sums[:, ~fine] = detour(~fine)
    elif way == "wide" and kept == torch.float64:
        sums = detour(torch.ones_like(norms, dtype=torch.bool))
    return sums


def exact_sums(start: Tensor, end: Tensor, *, update: bool = True) -> Tensor:
    """The sums of :func:`row_sums` in float64, of rows in which d may be along a."""
    if start.dtype == torch.float64:
        return _sums_of_float64(start, end, update)
    found = torch.empty(4, len(start), dtype=torch.float64, device=start.device)
    rows = max(1, BLOCK[way_of(start)] // 2 // max(1, start.shape[1]))
    for a, b, place in zip(torch.split(start, rows), torch.split(end, rows), torch.split(found, rows, 1), strict=True):
        first, second, product = scratch("exact", a, 3 * a.numel(), torch.float64).view(3, *a.shape)
        first.copy_(a)
        second.copy_(b)
        if update:
            second.sub_(first)
        # All three by the same sums: of a unit that has become zero nothing is left then.
        pairs = (first, first), (first, second), (second, second)
        squares, along, lengths = (torch.mul(x, y, out=product).sum(dim=1) for x, y in pairs)
        length = torch.where(squares > 0, squares, 1.0)
        across = lengths - along.square() / length
        if bool((lengths > 0.01 * (squares + along).square() / length).any()):
            # Where little is left of the unit, even float64 has to take what is along it off first.
            second.addcmul_(first, (along / length).unsqueeze(1), value=-1)
            more = torch.mul(first, second, out=product).sum(dim=1)
            along = along + more
            across = torch.mul(second, second, out=product).sum(dim=1) - more.square() / length
        place.copy_(torch.stack([squares, along, across, squares + along]))
    return found


def _sums_of_float64(start: Tensor, end: Tensor, update: bool) -> Tensor:
    """The same where nothing is wider than the weight.

    What is left of the other row after taking off k times a keeps its digits only if taking off rounds nothing. So k
    and a are cut into halves of their significands, whose products are exact (Dekker 1971), and k is found in three
    such halves: what is along a then falls below the last digit.
    """
    norm = row_norms(start)
    length = torch.where(norm > 0, norm, 1.0).unsqueeze(1)
    direction = start / length
    upper = (start.contiguous().view(torch.int64) & -(1 << 27)).view(torch.float64)
    lower = start - upper
    rest, ahead = end, torch.zeros_like(length)
    for _ in range(3):
        scaled = (direction * rest).sum(dim=1, keepdim=True) / length
        k = scaled * ((1 << 27) + 1)
        k = k - (k - scaled)
        rest = (rest - k * upper) - k * lower
        ahead = ahead + k * length
    ahead = ahead.squeeze(1) * norm
    along = (start * (end - start)).sum(dim=1) if update else ahead
    return torch.stack([norm.square(), along, row_norms(rest).square(), ahead])


def with_radial(sums: Tensor) -> Tensor:
    r"""The sums of :func:`row_sums` and :math:`(\sum ad)^2/\sum a^2`, all of which add over the parts of a unit."""
    squares, products = sums[:2]
    along = products.square() / torch.where(squares > 0, squares, 1.0)
    return torch.cat([sums, along.unsqueeze(0)])


def totals(sums: Tensor) -> Tensor:
    r"""The sums of units, from those of their parts as :func:`with_radial` gives them.

    What is across a unit is what is across each part, and :math:`\sum_i P_i^2/A_i-(\sum_i P_i)^2/\sum_i A_i` of the
    sums A of squares and P of products of the parts.
    """
    squares, products, tangents, ahead, along = sums
    between = along - products.square() / torch.where(squares > 0, squares, 1.0)
    return torch.stack([squares, products, tangents + between.clamp_min(0), ahead])
