"""Cutting the slices of a tensor into the smallest neighbouring runs whose Euler sums vanish in every draw.

Prefix sums turn this into a search for values that come back: slices a..b-1 sum to zero where prefix b equals prefix a.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

FLOOR = 1e-2
"""Of the threshold, times the root mean square slice: below that a sum counts as zero, however small the slice."""

_PAIRS = 1200
"""Up to so many positions all pairs are compared at once, which is faster than sorting them into cells."""

_LAGS = 4
"""How many later members of a cell are tried. Others get there by accident, less than one of them."""


class Partition(NamedTuple):
    """Runs of slices, as ``(start, stop)`` in the numbering of ``live``, and which slices those are.

    Slices that are not live had no signal in any draw (words that are not in the batch, dead units).
    """

    runs: list[tuple[int, int]]
    live: Tensor


def finest_partition(sums: Tensor, squares: Tensor, tol: float) -> Partition:
    """Find the finest partition into runs with ``|Σ S| ≤ tol·√Σ Q`` in every draw, leaving out slices that are in none.

    S and Q have shape ``(draws, slices)``. Time n·log n in the number of slices, so that a vocabulary is no problem.

    Examples:
        >>> s = torch.tensor([[1.0, -1.0, 2.0, 0.0], [3.0, -3.0, 1.0, 0.0]], dtype=torch.float64)
        >>> finest_partition(s, torch.ones_like(s), 1e-6).runs  # a pair, a slice that is in no run, a single one
        [(0, 2), (3, 4)]
    """
    floor = FLOOR * tol * squares.mean(1).sqrt()
    dead = (squares.sqrt() <= floor[:, None]).all(0)
    live = torch.nonzero(~dead).flatten()
    if not len(live):
        return Partition([], live)
    sought = _Sought(_prefix(sums[:, live]), _prefix(squares[:, live]), tol, floor[:, None])
    last = len(live)
    first = torch.arange(last)
    best = sought.closed(first, first + 1)
    if bool((best > last).any()):  # mostly each slice is a unit by itself, and nothing is left to search for
        for i, j in sought.candidates():
            best = torch.minimum(best, sought.closed(i, j))
    return Partition(_chain(best.tolist()), live)


def _prefix(values: Tensor) -> Tensor:
    return torch.cat([values.new_zeros(len(values), 1), values.cumsum(1)], dim=1)


def _chain(following: list[int]) -> list[tuple[int, int]]:
    runs, at = [], 0
    while at < len(following):
        stop = following[at]
        if stop <= len(following):
            runs.append((at, stop))
        at = stop if stop <= len(following) else at + 1
    return runs


class _Sought(NamedTuple):
    """Prefix sums of S and Q in every draw, shape ``(draws, slices + 1)``, and how small is zero."""

    prefix: Tensor
    weight: Tensor
    tol: float
    floor: Tensor

    def closed(self, i: Tensor, j: Tensor) -> Tensor:
        """For each i the nearest j > i at which the prefix sums of all draws are back; none is beyond the end."""
        prefix, weight = self.prefix, self.weight
        far = (prefix[:, j] - prefix[:, i]).abs()
        near = (far <= self.tol * (weight[:, j] - weight[:, i]).clamp_min(0).sqrt() + self.floor).all(0) & (j > i)
        best = torch.full((prefix.shape[1] - 1,), prefix.shape[1])
        return best.scatter_reduce_(0, i[near], j[near], "amin")

    def candidates(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of positions at which the prefix sums may agree: never further apart than a window.

        Few positions are compared in one draw, all with all. For more, every draw is one coordinate of a grid whose
        cells are two windows wide; in one of the 2^draws grids that are shifted by half a cell both lie in the same
        cell, so only members of a cell are looked at.
        """
        prefix, (draws, positions) = self.prefix, self.prefix.shape
        window = self.tol * self.weight[:, -1:].clamp_min(0).sqrt() + self.floor
        if positions <= _PAIRS:
            near = (prefix[0] - prefix[0, :, None]).abs_() <= window[0]
            i, j = torch.nonzero(near.triu_(1), as_tuple=True)
            yield i, j
            return
        scaled = prefix / (2 * window.clamp_min(torch.finfo(prefix.dtype).tiny))
        for shift in range(2 ** min(draws, 4)):  # four coordinates separate well enough; the comparison uses all draws
            keys = _cells(scaled[:4], shift)
            order = torch.argsort(keys, stable=True)
            for lag in range(1, min(_LAGS + 1, positions)):
                same = keys[order[:-lag]] == keys[order[lag:]]
                yield order[:-lag][same], order[lag:][same]


def _cells(scaled: Tensor, shift: int) -> Tensor:
    """One number per position for its cell; different cells rarely share one, which costs a comparison and no more."""
    keys = torch.zeros(scaled.shape[1], dtype=torch.int64)
    for k, coordinate in enumerate(scaled):
        cell = (coordinate + 0.5 * (shift >> k & 1)).floor().to(torch.int64)
        keys = keys * 1_000_003 + cell
    return keys
