"""What one update did to each unit, along it and across it; or where a gradient points, seen from its weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lightning_normreg.functional._device import (
    BLOCK,
    accumulator,
    is_followed,
    number_type,
    scratch,
    sum_type,
    way_of,
)
from lightning_normreg.functional._norms import (
    Operation,
    cells_of,
    chunk_norms,
    chunk_of,
    cuts_of,
    rescaled_norms,
    row_norms,
    squares_fit,
)

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
        still = (self.radial == 0) & (self.tangent == 0)  # where hypot has no gradient
        return torch.where(still, 0.0, torch.hypot(torch.where(still, 1.0, self.radial), self.tangent))

    def after(self) -> Tensor:
        """Norm after the update."""
        return torch.hypot(self.ahead, self.tangent)

    def rotation(self) -> Tensor:
        """Rotation in radians; 0 for a unit that is zero before the update or after it."""
        turned = torch.atan2(self.tangent, self.ahead)
        return torch.where(self.norm == 0, torch.zeros_like(turned), turned)

    def relative(self) -> Tensor:
        """Length of the update over the norm before it; 0 for a zero unit."""
        none = self.norm == 0
        return torch.where(none, 0.0, self.update() / torch.where(none, 1.0, self.norm))

    def cosine(self) -> Tensor:
        """Cosine of the angle between unit and update, without its sign; 0 where one of them is zero."""
        update = self.update()
        cosine = self.radial.abs() / torch.where(update == 0, 1.0, update)
        return torch.where((update == 0) | (self.norm == 0), 0.0, cosine.clamp(max=1.0))

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
    if is_followed(start, end):
        return _followed_rows(start, end, update)

    def made(operations: Callable[[Tensor], list[Operation]]) -> Tensor:
        cells = start.new_zeros(3, len(start), cells_of(start), dtype=sum_type(start))
        for operation in operations(cells):
            operation()
        return squared(cells.to(number_type(start))).sum(dim=-1)

    def again(odd: Tensor | None, shares: Tensor) -> Tensor:
        if odd is None:
            return made(lambda cells: across_operations(start, end, shares, cells))[0]
        return exact_sums(start[odd], end[odd], shares, update=update)

    raw = made(lambda cells: product_operations(start, end, cells, update=update))
    return lengths_of(*row_sums(raw, start.dtype, again, update=update))


def _followed_rows(start: Tensor, end: Tensor, update: bool) -> Lengths:
    """The same by operations that autograd can follow; of a float64 update along the unit fewer digits are left."""
    a, b = (rows.to(number_type(rows)) for rows in (start, end))
    norm = rescaled_norms(a)
    direction = a / torch.where(norm > 0, norm, 1.0).unsqueeze(1)
    d = b - a if update else b
    radial, ahead = ((direction * rows).sum(dim=1) for rows in (d, b if update else a + b))
    return Lengths(norm, radial, rescaled_norms(d - radial.unsqueeze(1) * direction), ahead)


def lengths_of(squares: Tensor, products: Tensor, tangents: Tensor, ahead: Tensor) -> Lengths:
    """From the sums over the entries of each unit that :func:`row_sums` gives."""
    norm = squares.sqrt()
    length = torch.where(norm > 0, norm, 1.0)
    return Lengths(norm, products / length, tangents.clamp_min(0).sqrt(), ahead / length)


def product_operations(start: Tensor, end: Tensor, out: Tensor, *, update: bool = True) -> list[Operation]:
    """What gives the norm of each row a of ``start``, the norm of d, and their product, in ``(3, rows, cells)``.

    d is the row of ``end`` less a, which is exact for close numbers, or with ``update=False`` that row itself. Some
    entries at a time, with temporaries in memory that is kept. Without float64 :func:`across_operations` follow an
    update, and its norm is left out.
    """
    tiles, size = _tiles(start, end, out), chunk_of(start)
    return [op for a, b, place, _ in tiles for op in _products(a, b, place, size, update)]


def across_operations(start: Tensor, end: Tensor, shares: Tensor, out: Tensor) -> list[Operation]:
    """What gives the norm of d less its share of a, in the first of ``(3, rows, cells)``."""
    found: list[Operation] = []
    for a, b, place, at in _tiles(start, end, out):
        before, _, (first, rest) = _loaded(a, b, True)
        along = partial(rest.addcmul_, first, shares[at].unsqueeze(1), value=-1)
        found += [*before, along, *chunk_norms(rest, place[0], chunk_of(start))]
    return found


def _tiles(start: Tensor, end: Tensor, out: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, slice]]:
    step = max(1, BLOCK[way_of(start)] // max(1, start.shape[1]))
    for cut, cells in cuts_of(start):
        for top in range(0, len(start), step):
            at = slice(top, top + step)
            yield start[at, cut], end[at, cut], out[:, at, cells], at


def _loaded(a: Tensor, b: Tensor, update: bool) -> tuple[list[Operation], Tensor, tuple[Tensor, Tensor]]:
    """What makes a and d in the type of sums, memory for both, and where they are: where they were, if of that type."""
    both = scratch("rows", a, 2 * a.numel(), sum_type(a)).view(2, *a.shape)
    if a.dtype == both.dtype:
        return ([partial(torch.sub, b, a, out=both[1])], both, (a, both[1])) if update else ([], both, (a, b))
    first, second = both[0], both[1]
    load = partial(torch.sub, b, first, out=second) if update else partial(second.copy_, b)
    return [partial(first.copy_, a), load], both, (first, second)


def _products(a: Tensor, b: Tensor, out: Tensor, size: int, update: bool) -> list[Operation]:
    found, both, (first, second) = _loaded(a, b, update)
    if first.dtype != a.dtype:
        found += chunk_norms(both, out[:2], size)
    else:
        found += chunk_norms(first, out[0], size)
        if not update or way_of(a) != "narrow":
            found += chunk_norms(second, out[1], size)
    return [
        *found,
        partial(torch.mul, first, second, out=both[1]),
        partial(torch.sum, both[1], dim=1, out=out[2][:, 0]),
    ]


def squared(sums: Tensor) -> Tensor:
    """Squares of norms, in the place of what :func:`product_operations` give."""
    sums[:2].square_()
    return sums


def row_sums(
    raw: Tensor, dtype: torch.dtype, again: Callable[[Tensor | None, Tensor], Tensor], *, update: bool = True
) -> Tensor:
    r"""The sums that add over the parts of a unit, from what :func:`product_operations` give.

    :math:`\sum a^2`, :math:`\sum ad`, the square of what d has across a, and :math:`\sum a(a+d)`. What is across is a
    difference, :math:`\sum d^2-(\sum ad)^2/\sum a^2`. In float32 it keeps its digits where d is no more along a than
    across it; where that cannot be known, the share of a is taken off d before it is squared.

    Args:
        raw: Sums over squares and products, shape ``(3, rows)``.
        dtype: Of the weight.
        again: :func:`exact_sums` of rows that are marked, all of them for float64, from the shares of a in d;
            without a mark :func:`across_operations`.
        update: Whether d is an update.

    Returns:
        Shape ``(4, rows)``.
    """
    squares, lengths, products = raw
    shares = products / torch.where(squares > 0, squares, 1.0)
    along = products * shares
    sums = torch.stack([squares, products, lengths - along, squares + products])
    way, kept = way_of(raw), accumulator(dtype)
    if way == "host":
        # Not a number compares false.
        fits = (squares_fit(x.sqrt(), kept) for x in (squares, lengths))
        odd = ~((2 * along <= lengths) & next(fits) & (next(fits) | (lengths == 0)))
        if bool(odd.any()):
            sums[:, odd] = again(odd, shares[odd])
    elif way == "narrow" and update:
        sums[2] = again(None, shares)
    elif way == "wide" and kept == torch.float64:
        sums = again(torch.ones_like(squares, dtype=torch.bool), shares)
    return sums


def exact_sums(start: Tensor, end: Tensor, shares: Tensor, *, update: bool = True) -> Tensor:
    """The sums of :func:`row_sums` in float64, of rows in which d may be along a.

    The share of a is taken off first, to the digits to which it is known; what is along a in the rest says the others.
    """
    if start.dtype == torch.float64:
        return _sums_of_float64(start, end, update)
    c = torch.where(shares.isfinite(), shares, 0.0) + update
    norms, more = c.new_empty(2, len(c)), torch.empty_like(c)
    step = max(1, BLOCK["host"] // 2 // max(1, start.shape[1]))
    for last in (False, True):
        for top in range(0, len(c), step):
            at = slice(top, top + step)
            first, rest = scratch("exact", start, 2 * start[at].numel(), torch.float64).view(2, *start[at].shape)
            first.copy_(start[at])
            rest.copy_(end[at])
            torch.linalg.vector_norm(first, dim=1, out=norms[0, at])
            if last:
                # Where the share was not known; of a unit that has become zero nothing is left then.
                c[at] = (first * rest).sum(dim=1) / torch.where(norms[0, at] > 0, norms[0, at].square(), 1.0)
            rest.addcmul_(first, c[at].unsqueeze(1), value=-1)
            torch.linalg.vector_norm(rest, dim=1, out=norms[1, at])
            torch.sum(first.mul_(rest), dim=1, out=more[at])
        squares, lengths = norms.square()
        if bool((more.square() <= 0.99 * lengths * squares).all()):
            break
    left = more / torch.where(squares > 0, squares, 1.0)
    k = (c - float(update)) + left
    ahead = c + left if update else 1 + k
    return torch.stack([squares, k * squares, lengths - more * left, ahead * squares])


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
