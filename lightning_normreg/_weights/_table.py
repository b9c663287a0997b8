"""One table for all units of some weights: columns with a number for each unit, filled from the pieces they lie in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parameter import Parameter

from lightning_normreg._weights._pieces import Piece, gradient_of, groups_of, lies_whole, pieces_of
from lightning_normreg._weights._watched import Watched
from lightning_normreg.functional._device import accumulator, number_type
from lightning_normreg.functional._norms import mended_norms, plain_norms, rescaled_norms
from lightning_normreg.functional._projection import Limits, factors
from lightning_normreg.functional._rotation import Mixture, mix_
from lightning_normreg.functional._units import over_units
from lightning_normreg.functional._updates import (
    Lengths,
    exact_sums,
    lengths_of,
    row_products,
    row_sums,
    totals,
    with_radial,
)

Read = Callable[[Parameter], Tensor]
"""From a parameter to what this process holds of it, of its gradient, or of what it was before a step."""


class Norms(NamedTuple):
    """Norms of the units of a table, and of the whole tensors, without what is joined to them."""

    units: Tensor
    tensors: Tensor


class Table:
    """All units of some weights, one weight's after the other's; every process must ask it for the same things.

    Each *piece*, a local part of a tensor, adds the sums over its entries to the places of its units: the parts of a
    fused tensor, a bias that belongs to a unit, the tensors of a set, and the shards that other processes have are all
    pieces. What is computed for each unit is computed for all weights at once. Columns are float64 where the device has
    it, and live on the device of the first weight.

    Attributes:
        watched: The weights.
        sizes: How many units each has.
        layer: Number of the weight of each unit.
        limits: What the types of the weights allow, for each unit.
        present: Of which units this process holds anything.
        spread: For each process group the places in sums over its processes, all of them, and those that are needed
            by processes that do not hold all of a unit.
    """

    def __init__(self, watched: Sequence[Watched]) -> None:
        self.watched = list(watched)
        self.sizes = [w.units() for w in self.watched]
        found = [(number, piece) for number, w in enumerate(self.watched) for piece in pieces_of(w)]
        self._pieces = [piece for _, piece in found]
        (_, rows) = self._pieces[0].now()
        self.device, self.dtype = rows.device, number_type(rows)
        self._place(found)
        ends = list(accumulate((len(piece.units) for piece in self._pieces), initial=0))
        self._rows = [slice(*pair) for pair in pairwise(ends)]
        self._raw = torch.empty(3, ends[-1], dtype=self.dtype, device=self.device)
        self._types = {accumulator(piece.parameter.dtype) for piece in self._pieces}
        self._narrowest = min(self._types, key=lambda dtype: torch.finfo(dtype).bits)

    def _place(self, found: Sequence[tuple[int, Piece]]) -> None:
        """Note what does not change: the place of each row, and what is spread over which processes."""
        self.spread: dict[dist.ProcessGroup, tuple[Tensor, Tensor]] = {}
        starts, count, none = list(accumulate(self.sizes, initial=0)), sum(self.sizes), len(self.sizes)
        places = torch.cat([torch.where(p.units < 0, count, p.units + starts[number]) for number, p in found])
        adds = torch.cat([torch.full_like(p.units, p.counts) for _, p in found]).bool()
        owners = torch.cat([torch.full_like(p.units, number if p.is_own and p.counts else none) for number, p in found])
        layer = torch.arange(none).repeat_interleave(torch.tensor(self.sizes))
        self._is_plain = len(places) == count and bool((places == torch.arange(count)).all() & adds.all())
        self._places, self._owners = places.to(self.device), owners.to(self.device)
        self._adds = torch.where(adds, places, count).to(self.device)
        self.layer = layer.to(self.device)
        self.present = torch.zeros(count + 1, dtype=torch.bool).index_fill_(0, places, True)[:-1].to(self.device)
        bounds = [Limits.of(w.parameter.dtype.to_real(), w.longest()) for w in self.watched]
        self.limits = Limits(*(self.column([float(b) for b in bound]) for bound in zip(*bounds, strict=True)))
        groups = [groups_of(w) for w in self.watched]
        for group in dict.fromkeys(group for each in groups for group in each):
            all_of_it = torch.tensor([group in each for each in groups])
            needed = all_of_it & ~torch.tensor([lies_whole(w) for w in self.watched])
            # Units first, then whole tensors.
            everything, some = (torch.cat([m[layer], m]).nonzero().flatten() for m in (all_of_it, needed))
            self.spread[group] = (everything.to(self.device), some.to(self.device))

    def column(self, values: Sequence[float]) -> Tensor:
        """A number for each weight as one for each unit."""
        return torch.tensor(values, dtype=self.dtype).to(self.device)[self.layer]

    def split(self, column: Tensor) -> list[Tensor]:
        """A column weight by weight."""
        return list(torch.split(column, self.sizes))

    def norms(self, *, everywhere: bool = True) -> Norms:
        """Norms of the units and tensors as they stand.

        Args:
            everywhere: Also of units that other processes hold; without it these may be 0.
        """
        (squares,) = share([(self, self.squares())], everywhere=everywhere)
        return self.norms_of(squares)

    def lengths(self, before: Read) -> Lengths:
        """What the units have done since ``before``."""
        (sums,) = share([(self, self.compare(before))])
        return self.lengths_of(sums)

    def squares(self, read: Read | None = None) -> Tensor:
        """Sums over the squares of the entries, or of those that ``read`` gives, as far as this process has them."""
        rows = [piece.now()[1] if read is None else piece.like(read(piece.parameter)) for piece in self._pieces]
        raw = self._raw[0]
        for values, at in zip(rows, self._rows, strict=True):
            plain_norms(values, raw[at])
        found = mended_norms(
            raw, self._narrowest, lambda odd: self._detour(odd, lambda i, at: rescaled_norms(rows[i][at]))
        )
        return self._added(found.square().unsqueeze(0))

    def compare(self, before: Read) -> Tensor:
        """Sums over the entries before and their updates since, as far as this process has them."""
        pairs = [(piece.look("before", *_held(before, piece))[1], piece.now()[1]) for piece in self._pieces]
        return self._compared(pairs, update=True)

    def gradients(self, read: Read = gradient_of) -> Tensor:
        """Sums over entries and gradients, as far as this process has them: gradients as seen from the units."""
        pairs = [(piece.now()[1], piece.like(read(piece.parameter))) for piece in self._pieces]
        return self._compared(pairs, update=False)

    def norms_of(self, sums: Tensor) -> Norms:
        """Norms from the shared sums, the squares of which come first."""
        count = sum(self.sizes)
        norms = sums[0].sqrt()
        return Norms(norms[:count], norms[count:])

    def lengths_of(self, sums: Tensor) -> Lengths:
        """What units have done, from the shared sums."""
        return lengths_of(*totals(sums[:, : sum(self.sizes)]))

    def _compared(self, pairs: Sequence[tuple[Tensor, Tensor]], *, update: bool) -> Tensor:
        for (start, end), at in zip(pairs, self._rows, strict=True):
            row_products(start, end, self._raw[:, at], update=update)

        def exact(number: int, at: Tensor) -> Tensor:
            start, end = pairs[number]
            return exact_sums(start[at], end[at], update=update)

        sums = row_sums(self._raw, self._narrowest, lambda odd: self._detour(odd, exact))
        return self._added(with_radial(sums))

    def _added(self, rows: Tensor) -> Tensor:
        """Sums over the rows of each unit, and over those of each tensor."""
        count, tensors = sum(self.sizes), len(self.sizes)
        units = rows if self._is_plain else rows.new_zeros(len(rows), count + 1).index_add_(1, self._adds, rows)[:, :-1]
        wholes = rows.new_zeros(len(rows), tensors + 1).index_add_(1, self._owners, rows)[:, :-1]
        return torch.cat([units, wholes], dim=1)

    def _detour(self, odd: Tensor, way: Callable[[int, Tensor], Tensor]) -> Tensor:
        """What ``way`` gives for the marked rows of each piece, one piece after the other."""
        return torch.cat(
            [
                way(number, rows).to(self.device)
                for number, at in enumerate(self._rows)
                if len(rows := odd[at].nonzero().flatten())
            ],
            dim=-1,
        )

    def project(self, radius: float | Tensor) -> Tensor:
        """Put every unit at a radius; the norms before, which of units of other processes may be 0."""
        norms = self.norms(everywhere=False).units
        self.scale(factors(norms, radius, self.limits))
        return norms

    def scale(self, values: Tensor, read: Read | None = None) -> None:
        """Multiply each unit, or what ``read`` gives in the place of its tensors, by its value."""
        rows = values if self._is_plain else torch.cat([values, values.new_ones(1)])[self._places]
        typed = {dtype: rows.to(dtype) for dtype in self._types}
        for piece, at in zip(self._pieces, self._rows, strict=True):
            view, kept = piece.now()[0] if read is None else piece.see(read(piece.parameter).detach())
            view.mul_(over_units(typed[accumulator(piece.parameter.dtype)][at], view, kept))

    def mix(self, mix: Mixture, before: Read) -> None:
        """Make each unit the mixture of what it was before and of its update."""
        for dtype in self._types:
            own = mix.to(dtype)
            rows = own if self._is_plain else own.at(self._places)
            for piece, at in zip(self._pieces, self._rows, strict=True):
                if accumulator(piece.parameter.dtype) == dtype:
                    (view, kept), _ = piece.now()
                    (start, _), _ = piece.look("before", *_held(before, piece))
                    mix_(view, start, kept, Mixture(*(values[at] for values in rows)))

    def root_mean_squares(self, column: Tensor) -> Tensor:
        """Root mean square over the units of each weight, 0 where it has none."""
        sums = column.new_zeros(len(self.sizes)).index_add_(0, self.layer, column.square())
        return (sums / self._counts).sqrt()

    def extremes(self, column: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest number of each weight, 0 where it has none."""
        found = []
        for how in ("amin", "amax"):
            none = column.new_zeros(len(self.sizes))
            found.append(none.scatter_reduce(0, self.layer, column, how, include_self=False))
        return found[0], found[1]

    def totals(self, column: Tensor) -> Tensor:
        """Sum over the units of each weight."""
        numbers = column.to(self.dtype)
        return numbers.new_zeros(len(self.sizes)).index_add_(0, self.layer, numbers)

    @property
    def _counts(self) -> Tensor:
        return torch.tensor([max(1, size) for size in self.sizes], dtype=self.dtype).to(self.device)


def share(parts: Sequence[tuple[Table, Tensor]], *, everywhere: bool = True) -> list[Tensor]:
    """Let all processes add their sums: one reduction for each dimension of the mesh that units are spread over.

    Args:
        parts: Tables with sums of theirs; every process must give the same ones.
        everywhere: Also those of units of which one process has all entries.
    """
    for group in dict.fromkeys(group for table, _ in parts for group in table.spread):
        places = [table.spread.get(group, (None, None))[0 if everywhere else 1] for table, _ in parts]
        mine = [(sums, at) for (_, sums), at in zip(parts, places, strict=True) if at is not None and len(at)]
        if mine:
            flat = torch.cat([sums[:, at].flatten() for sums, at in mine])
            dist.all_reduce(flat, group=group)
            wholes = torch.split(flat, [len(sums) * len(at) for sums, at in mine])
            for (sums, at), whole in zip(mine, wholes, strict=True):
                sums[:, at] = whole.view(len(sums), len(at))
    return [sums for _, sums in parts]


def _held(before: Read, piece: Piece) -> tuple[int, Tensor]:
    tensor = before(piece.parameter)
    return tensor.data_ptr(), tensor


def norms_of(watched: Sequence[Watched]) -> list[Tensor]:
    """Norm of every unit of some parameters; every process must ask for the same ones."""
    if not watched:
        return []
    table = Table(watched)
    return table.split(table.norms().units)
