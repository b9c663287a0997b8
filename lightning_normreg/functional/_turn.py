"""What an update does to each unit, along it and across it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_normreg.functional._norms import accumulator, chunked_norms, known_unset, row_norms
from lightning_normreg.functional._units import View, unit_rows

BLOCK = 2**18
"""Entries of a weight that a CPU works on at a time, so that temporaries stay in its cache."""
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

    @classmethod
    def joined(cls, turns: Sequence[Turn]) -> Turn:
        """Those of some units after those of others."""
        if len(turns) == 1:
            return turns[0]
        parts = zip(*((turn.norm, turn.radial, turn.tangent) for turn in turns), strict=True)
        return cls(*map(torch.cat, parts))

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
        self._block = block_of(first)
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


def block_of(tensor: Tensor) -> int:
    """Entries of a tensor to work on at a time: on a CPU those that the cache holds, elsewhere some 64 MB."""
    return BLOCK if tensor.device.type == "cpu" else 2**24


def _power_of_two(values: Tensor) -> Tensor:
    """The largest power of two below each number, so that dividing by it rounds nothing; within 2^±100."""
    bits, fraction = (torch.int64, 52) if values.dtype == torch.float64 else (torch.int32, 23)
    return (values.clamp(2.0**-100, 2.0**100).view(bits) >> fraction << fraction).view(values.dtype)
