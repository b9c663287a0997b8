"""Where the sums over rows are added: to the units that they belong to, and to whole tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from lightning_normreg._weights._pieces import Piece, groups_of
from lightning_normreg._weights._watched import Watched


@dataclass(frozen=True)
class Route:
    """Which rows are added to which of some places; a row may go to several, as to a unit and to a set of units."""

    rows: Tensor | None  # numbers of rows, None for all of them in order
    places: Tensor  # for each of them its place, the number of places for none
    count: int  # number of places

    def to(self, device: torch.device) -> Route:
        """The same on a device."""
        return Route(None if self.rows is None else self.rows.to(device), self.places.to(device), self.count)

    def of(self, values: Tensor) -> Tensor:
        """What each of the rows has, along the last dimension."""
        return values if self.rows is None else values[..., self.rows]

    def add(self, values: Tensor) -> Tensor:
        """Sums of the values of rows, shape ``(…, rows)``, at each place."""
        own = self.of(values)
        return own.new_zeros(*own.shape[:-1], self.count + 1).index_add_(-1, self.places, own)[..., :-1]

    def at(self, at: Tensor | None, total: int) -> Route:
        """The same where only some of all rows are given, by their numbers."""
        if at is None:
            return self
        if self.rows is None:
            return Route(None, self.places[at], self.count)
        local = torch.full((total,), -1, device=at.device)
        local[at] = torch.arange(len(at), device=at.device)
        rows = local[self.rows]
        return Route(rows.clamp_min(0), torch.where(rows < 0, self.count, self.places), self.count)


def made_of(watched: Sequence[Watched]) -> dict[int, list[int]]:
    """Numbers of sets all of whose members are among the weights themselves, with the numbers of these."""
    numbers = {w.key: number for number, w in enumerate(watched)}
    found = {number: [numbers.get(m.key) for m in w.members] for number, w in enumerate(watched) if w.members}
    return {number: [m for m in members if m is not None] for number, members in found.items() if None not in members}


def routes_of(watched: Sequence[Watched], found: Sequence[tuple[int, Piece]]) -> tuple[Tensor, Route, Route]:
    """For each row the place of its unit, whether its sums are added or not; the way to units, and to whole tensors.

    Args:
        watched: The weights of a table.
        found: Its pieces, each with the number of its weight; a set that is made of other weights has none.
    """
    sizes = [w.units() for w in watched]
    starts, count, none = list(accumulate(sizes, initial=0)), sum(sizes), len(sizes)
    units = [torch.where(p.units < 0, count, p.units + starts[number]) for number, p in found]
    places = torch.cat(units)
    adds = torch.cat([u if p.counts else torch.full_like(u, count) for u, (_, p) in zip(units, found, strict=True)])
    owners = torch.cat([_owner(p.units, number if p.is_own and p.counts else none, watched[number], none)
                        for number, p in found])  # fmt: skip
    first = list(accumulate((len(p.units) for _, p in found), initial=0))
    rows, to_units, to_tensors = [torch.arange(len(places))], [adds], [owners]
    for number, members in made_of(watched).items():
        groups = groups_of(watched[number])
        for start, (owner, piece) in zip(first, found, strict=False):
            if owner in members and piece.counts_in(groups):
                rows.append(torch.arange(start, start + len(piece.units)))
                to_units.append(torch.where(piece.units < 0, count, starts[number]))
                to_tensors.append(torch.where(piece.units < 0, none, number))
    more = torch.cat(rows) if len(rows) > 1 else None
    return places, Route(more, torch.cat(to_units), count), Route(more, torch.cat(to_tensors), none)


def _owner(units: Tensor, number: int, watched: Watched, none: int) -> Tensor:
    """A tensor has all of its rows, a set those of its members' units."""
    owners = torch.full_like(units, number)
    return owners.masked_fill(units < 0, none) if watched.members else owners
