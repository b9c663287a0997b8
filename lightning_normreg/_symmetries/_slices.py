"""Sums over the slices of a tensor along one of its dimensions, and back from slices to entries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_normreg._weights import ParameterRole, ScaleInvariance, Shard
from lightning_normreg.functional._units import split_units


class Axis(NamedTuple):
    """A dimension whose slices are looked at; ``groups`` as in :class:`ParameterRole`."""

    dim: int
    groups: int = 1


class Table(NamedTuple):
    """Sums and sums of squares for each slice, shape ``(slices,)``, or ``(draws, slices)`` of several stacked draws."""

    sums: Tensor
    squares: Tensor

    @staticmethod
    def along(entries: Tensor, looked_at: Sequence[Axis], shard: Shard | None = None) -> dict[Axis, Table]:
        """Sum over the entries of each slice; they are squared in place.

        Of a shard these are partial sums, for all slices of the whole tensor.
        """
        sums = _slice_sums(entries.clone() if entries.ndim == 1 else entries, looked_at, shard)
        squares = _slice_sums(entries.square_(), looked_at, shard)
        return {axis: Table(*both) for axis, *both in zip(looked_at, sums, squares, strict=True)}

    @staticmethod
    def stack(draws: Sequence[Table]) -> Table:
        """Put several draws into one table."""
        return Table(*(torch.stack(values) for values in zip(*draws, strict=True)))

    def plus(self, other: Table) -> Table:
        """Add another tensor's sums, slice by slice."""
        return Table(self.sums + other.sums, self.squares + other.squares)

    def spread(self, places: Tensor, slices: int) -> Table:
        """The same for all slices, where it is of those in some places."""
        return Table(*(values.new_zeros(slices).index_add_(0, places, values) for values in self))

    def per_unit(self, verdict: ScaleInvariance) -> Table:
        """Pool the slices of each unit."""
        units = unit_of_slice(verdict, self.sums.shape[-1])
        count = int(units.max()) + 1 if len(units) else 0
        member = torch.nonzero(units >= 0).flatten()
        units, member = units[member].to(self.sums.device), member.to(self.sums.device)

        def pooled(values: Tensor) -> Tensor:
            rows = [
                row.new_zeros(count).index_add_(0, units, row[member])
                for row in (values if values.ndim > 1 else [values])
            ]
            return torch.stack(rows).reshape(*values.shape[:-1], count)

        return Table(*map(pooled, self))


def _slice_sums(entries: Tensor, looked_at: Sequence[Axis], shard: Shard | None) -> list[Tensor]:
    if shard is not None:
        return [_partial_sums(entries, axis, shard) for axis in looked_at]
    if entries.ndim == 1:
        return [entries]
    plane = entries
    if entries.ndim > 2:  # once for rows and columns; for a few entries each, a product is faster than a sum
        inner = entries.flatten(2)
        plane = inner @ inner.new_ones(inner.shape[2])
    found = []
    for axis in looked_at:
        view, kept = split_units(plane if axis.dim < 2 else entries, "neuron", *axis)
        found.append(view.sum([d for d in range(view.ndim) if d not in kept]).flatten())
    return found


def _partial_sums(entries: Tensor, axis: Axis, shard: Shard) -> Tensor:
    kept, slices = shard.slices(*axis)
    entries = entries if shard.entries is None else entries.flatten()
    inner = [d for d in range(entries.ndim) if d not in kept]
    mine = (entries.sum(inner) if inner else entries).flatten()
    return mine.new_zeros(shard.shape[axis.dim] * axis.groups).index_add_(0, slices.to(mine.device), mine)


Tables = Mapping[Axis, Table]


def unit_table(verdict: ScaleInvariance, weight: Tables, bias: Tables | None) -> Table:
    """Sums of the units of a verdict, together with those of the bias that belongs to it."""
    table = next(iter(weight.values())) if verdict.dim is None else weight[Axis(verdict.dim, verdict.groups)]
    return (table if bias is None else table.plus(bias[Axis(0)])).per_unit(verdict)


def axes(shape: torch.Size, role: ParameterRole) -> list[Axis]:
    """Dimensions worth a look: first that of the neurons, then the others in which there is more than one slice.

    A vector has only the first.
    """
    if len(shape) <= 1:
        return [Axis(0)]
    others = [d for d in range(len(shape)) if d != role.dim and shape[d] > 1]
    return [Axis(role.dim, role.groups), *(Axis(d) for d in others)]


def unit_of_slice(verdict: ScaleInvariance, slices: int) -> Tensor:
    """For each slice along the verdict's dimension the number of its unit, -1 where it belongs to none.

    >>> unit_of_slice(ScaleInvariance("block", dim=0, block_size=2, slices=((0, 4),)), 6)
    tensor([ 0,  0,  1,  1, -1, -1])
    """
    units = torch.full((slices,), -1)
    if verdict.kind == "layer":
        return units.zero_()
    count = 0
    for start, stop in verdict.slices or ((0, slices),):
        size = verdict.block_size or stop - start
        units[start:stop] = count + torch.arange(stop - start) // size
        count += (stop - start) // size
    return units
