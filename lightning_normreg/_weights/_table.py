"""One table for all units of some weights: columns with a number for each unit, filled from the pieces they lie in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parameter import Parameter

from lightning_normreg._weights._gradients import Beside, beside, gradient_of, is_sparse, with_rest
from lightning_normreg._weights._pieces import Piece, groups_of, lies_whole, pieces_of
from lightning_normreg._weights._plans import Plans
from lightning_normreg._weights._routes import made_of, routes_of
from lightning_normreg._weights._watched import Watched
from lightning_normreg.functional._device import accumulator, number_type, way_of
from lightning_normreg.functional._lengths import (
    Lengths,
    across_operations,
    exact_sums,
    lengths_of,
    product_operations,
    row_sums,
    totals,
    with_radial,
)
from lightning_normreg.functional._norms import Operation, mended_norms, norm_operations, rescaled_norms
from lightning_normreg.functional._projection import Limits, factors, scale_
from lightning_normreg.functional._rotation import Mixture, blocks, mix_, mix_operations
from lightning_normreg.functional._units import over_units

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
        spread: For each process group the places in sums over its processes, all of them, and those of units that no
            process holds all of.
    """

    @torch.inference_mode(mode=False)
    def __init__(self, watched: Sequence[Watched]) -> None:
        self.watched = list(watched)
        self.sizes = [w.units() for w in self.watched]
        made = made_of(self.watched)
        found = [(number, piece) for number, w in enumerate(watched) if number not in made for piece in pieces_of(w)]
        self._pieces = [piece for _, piece in found]
        (_, rows) = self._pieces[0].now()
        self.device, self.dtype = rows.device, number_type(rows)
        if any(piece.now()[1].device != self.device for piece in self._pieces):
            raise NotImplementedError("Weights must be on one device of a process. Use `include` for those of one.")
        self._place(found)
        self._plans = Plans(self._now())
        self._rows = self._plans.rows
        self._shares = torch.zeros(self._rows[-1].stop, dtype=self.dtype, device=self.device)
        types = {accumulator(piece.parameter.dtype) for piece in self._pieces}
        self._narrowest = min(types, key=lambda dtype: torch.finfo(dtype).bits)

    def _place(self, found: Sequence[tuple[int, Piece]]) -> None:
        """Note what does not change: the place of each row, and what is spread over which processes."""
        self.spread: dict[dist.ProcessGroup, tuple[Tensor, Tensor]] = {}
        count, places, units, wholes = sum(self.sizes), *routes_of(self.watched, found)
        layer = torch.arange(len(self.sizes)).repeat_interleave(torch.tensor(self.sizes))
        rows = [sum(len(p.units) for number, p in found if number == place) for place in range(len(self.sizes))]
        # Rows of a weight come in the order of its units; there are as many only if each row is a unit by itself.
        self._is_plain = units.rows is None and rows == self.sizes and all(piece.counts for _, piece in found)
        self._places, self._units, self._wholes = places.to(self.device), units.to(self.device), wholes.to(self.device)
        self.layer = layer.to(self.device)
        # A weight that is one unit has a row here even where its shard is empty.
        here = torch.cat([torch.full_like(p.units, p.now()[1].numel()) for _, p in found]).bool()
        present = torch.zeros(count + 1, dtype=torch.bool).index_fill_(0, places[here], True)
        here = here if units.rows is None else here[units.rows]
        self.present = present.index_fill_(0, units.places[here], True)[:-1].to(self.device)
        bounds = [Limits.of(w.parameter.dtype.to_real(), w.longest()) for w in self.watched]
        self.limits = Limits(*(self.column([float(b) for b in bound]) for bound in zip(*bounds, strict=True)))
        groups = [groups_of(w) for w in self.watched]
        for group in dict.fromkeys(group for each in groups for group in each):
            all_of_it = torch.tensor([group in each for each in groups])
            needed = all_of_it & ~torch.tensor([lies_whole(w) for w in self.watched])
            everything = torch.cat([all_of_it[layer], all_of_it]).nonzero().flatten()  # units, then whole tensors
            self.spread[group] = (everything.to(self.device), needed[layer].nonzero().flatten().to(self.device))

    def column(self, values: Sequence[float]) -> Tensor:
        """A number for each weight as one for each unit."""
        return torch.tensor(values, dtype=self.dtype).to(self.device)[self.layer]

    def split(self, column: Tensor) -> list[Tensor]:
        """A column weight by weight."""
        return list(torch.split(column, self.sizes))

    def norms(self) -> Norms:
        """Norms of the units and tensors as they stand."""
        (squares,) = share([(self, self.squares())])
        return self.norms_of(squares)

    def lengths(self, before: Read) -> Lengths:
        """What the units have done since ``before``."""
        (sums,) = share([(self, self.compare(before))])
        return self.lengths_of(sums)

    def squares(self, read: Read | None = None, *, wholes: bool = True) -> Tensor:
        """Sums over the squares of the entries, or of those that ``read`` gives, as far as this process has them.

        Without ``wholes`` only of units.
        """
        if read is None:
            return self._added(self._squares("norms", self._plans, self._now()), wholes)
        _, gradients, plans, at = self._beside(read)
        return self._added(self._squares("gradients", plans, gradients), wholes, at)

    def _squares(self, what: str, plans: Plans, rows: Sequence[Tensor]) -> Tensor:
        (squares,) = plans.sums(what, 1, lambda number, out: norm_operations(rows[number], out[0]), rows)
        rescaled = partial(plans.detour, tensors=[rows], way=rescaled_norms)
        return mended_norms(squares.sqrt(), self._narrowest, rescaled).square().unsqueeze(0)

    def compare(self, before: Read) -> Tensor:
        """Sums over the entries before and their updates since, as far as this process has them."""
        starts = [piece.look("before", before(piece.parameter))[1] for piece in self._pieces]
        return self._compared("update", Beside(starts, self._now(), self._plans, None))

    def gradients(self, read: Read = gradient_of) -> Tensor:
        """Sums over entries and gradients, as far as this process has them: gradients as seen from the units."""
        return self._compared("gradients", self._beside(read))

    def _beside(self, read: Read) -> Beside:
        return beside(self._pieces, self._plans, {piece.parameter: read(piece.parameter) for piece in self._pieces})

    def reached(self, gradients: Tensor | None = None) -> Tensor | None:
        """Which units count, None for all: of a weight with a sparse gradient those where its norm is not zero."""
        if not any(sparse := [any(map(is_sparse, w.tensors())) for w in self.watched]):
            return None
        gradients = self.squares(gradient_of, wholes=False)[0] if gradients is None else gradients
        return (gradients != 0) | (self.column(sparse) == 0)

    def _compared(self, what: str, rows_of: Beside) -> Tensor:
        update, (starts, ends, plans, at) = what == "update", rows_of

        def products(number: int, out: Tensor) -> list[Operation]:
            return product_operations(starts[number], ends[number], out, update=update)

        def across(number: int, out: Tensor) -> list[Operation]:
            return across_operations(starts[number], ends[number], self._shares[self._rows[number]], out)

        def again(odd: Tensor | None, shares: Tensor) -> Tensor:
            if odd is None:
                self._shares.copy_(shares)
                return plans.sums("across", 1, across, starts, ends)[0]
            return plans.detour(odd, [starts, ends], partial(exact_sums, update=update), shares)

        raw = plans.sums(what, 3, products, starts, ends)
        rows = with_radial(row_sums(raw, self._narrowest, again, update=update))
        if at is not None:  # where no gradient is, a unit goes on all the same
            rows, at = with_rest(rows, at, self._squares("norms", self._plans, self._now())[0])
        sums = self._added(rows, at=at)
        return sums if self._is_plain and at is None else self._joined(rows, sums, at)

    def _joined(self, rows: Tensor, sums: Tensor, at: Tensor | None) -> Tensor:
        """Add what is across between rows of a unit, by their shares: as a difference of sums it would lose digits."""
        count, units = sum(self.sizes), self._units.at(at, self._rows[-1].stop)
        mine, all_of_it = (x[1] / torch.where(x[0] > 0, x[0], 1.0) for x in (rows, sums[:, :count]))
        apart = units.of(mine) - torch.cat([all_of_it, all_of_it.new_zeros(1)])[units.places]
        between = units.of(rows[0]) * apart.square()
        sums[2, :count] += between.new_zeros(count + 1).index_add_(0, units.places, between)[:-1]
        sums[:, :count] = with_radial(sums[:4, :count])
        return sums

    def _now(self) -> list[Tensor]:
        return [piece.now()[1] for piece in self._pieces]

    def norms_of(self, sums: Tensor) -> Norms:
        """Norms from the shared sums, the squares of which come first."""
        count = sum(self.sizes)
        norms = sums[0].sqrt()
        return Norms(norms[:count], norms[count:])

    def lengths_of(self, sums: Tensor) -> Lengths:
        """What units have done, from the shared sums."""
        return lengths_of(*totals(sums[:, : sum(self.sizes)]))

    def _added(self, rows: Tensor, wholes: bool = True, at: Tensor | None = None) -> Tensor:
        """Sums over the rows of each unit, and over those of each tensor; of those with numbers ``at``, or of all."""
        total = self._rows[-1].stop
        units = rows if self._is_plain and at is None else self._units.at(at, total).add(rows)
        return torch.cat([units, self._wholes.at(at, total).add(rows)], dim=1) if wholes else units

    def project(self, radius: float | Tensor) -> Tensor:
        """Put every unit at a radius; the norms before, which of units of other processes may be 0."""
        (squares,) = share([(self, self.squares(wholes=False))], everywhere=False)
        norms = squares[0].sqrt()
        self.scale(factors(norms, radius, self.limits))
        return norms

    def scale(self, values: Tensor, read: Read | None = None) -> None:
        """Multiply each unit, or what ``read`` gives in the place of its tensors, by its value."""
        rows = values if self._is_plain else torch.cat([values, values.new_ones(1)])[self._places]
        if read is not None:
            for piece, at in zip(self._pieces, self._rows, strict=True):
                scale_(*piece.see(read(piece.parameter).detach()), rows[at])
            return
        views = [piece.now()[0] for piece in self._pieces]

        def make(number: int, numbers: Tensor) -> list[Operation]:
            view, kept = views[number]
            return [partial(part.mul_, v) for part, v in blocks(view, over_units(numbers[0], view, kept), size=2**21)]

        self._plans.write("scale", [rows], make, [view for view, _ in views])

    def mix(self, mix: Mixture, before: Read) -> None:
        """Make each unit the mixture of what it was before and of its update."""
        own = mix if self._is_plain else mix.at(self._places)
        views = [piece.now()[0] for piece in self._pieces]
        starts = [piece.look("before", before(piece.parameter))[0][0] for piece in self._pieces]
        plain = all(view.dtype == accumulator(view.dtype) for view, _ in views)
        if plain and way_of(own.alone) == "host" and not own.alone.any():

            def make(number: int, numbers: Tensor) -> list[Operation]:
                return mix_operations(
                    views[number][0], starts[number], views[number][1], Mixture(numbers[0], numbers[1], own.alone)
                )

            self._plans.write("mix", own[:2], make, [view for view, _ in views], starts)
            return
        for (view, kept), start, at in zip(views, starts, self._rows, strict=True):
            mix_(view, start, kept, Mixture(*(values[at] for values in own)).to(accumulator(view.dtype)))

    def root_mean_squares(self, column: Tensor, over: Tensor | None = None) -> Tensor:
        """Root mean square over the units of each weight, or those that are marked, 0 where it has none."""
        if over is not None:
            return (self.totals(torch.where(over, column, 0.0).square()) / self.totals(over).clamp_min(1)).sqrt()
        counts = torch.tensor([max(1, size) for size in self.sizes], dtype=self.dtype).to(self.device)
        return (self.totals(column.square()) / counts).sqrt()

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


def norms_of(watched: Sequence[Watched]) -> list[Tensor]:
    """Norm of every unit of some parameters; every process must ask for the same ones."""
    if not watched:
        return []
    table = Table(watched)
    return table.split(table.norms().units)
