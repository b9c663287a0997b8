"""Cutting the slices of a tensor into the smallest neighbouring runs whose Euler sums vanish in every draw.

Prefix sums turn this into a search for values that come back: slices a..b-1 sum to zero where prefix b equals prefix a.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FLOOR = 1e-2
"""Of the threshold, times the root mean square slice: below that a sum counts as zero, however small the slice."""

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
    prefix, weight = _prefix(sums[:, live]), _prefix(squares[:, live])
    return Partition(_chain(_next_returns(prefix, weight, tol, floor)), live)


def _prefix(values: Tensor) -> Tensor:
    return torch.cat([values.new_zeros(len(values), 1), values.cumsum(1)], dim=1)


def _chain(following: list[int]) -> list[tuple[int, int]]:
    runs, at = [], 0
    while at < len(following):
        if following[at]:
            runs.append((at, following[at]))
            at = following[at]
        else:
            at += 1
    return runs


def _next_returns(prefix: Tensor, weight: Tensor, tol: float, floor: Tensor) -> list[int]:
    """For each position the nearest later one at which the prefix sums of all draws are back; 0 where there is none.

    Positions that agree are never further apart than a window. Every draw is one coordinate of a grid whose cells are
    two windows wide; in one of the 2^draws grids that are shifted by half a cell both lie in the same cell. Only
    members of a cell are compared.
    """
    draws, positions = prefix.shape
    window = tol * weight[:, -1:].clamp_min(0).sqrt() + floor[:, None]
    scaled = prefix / (2 * window.clamp_min(torch.finfo(prefix.dtype).tiny))
    best = torch.full((positions,), positions)
    for shift in range(2 ** min(draws, 4)):  # four coordinates separate well enough; the comparison uses all draws
        keys = _cells(scaled[:4], shift)
        order = torch.argsort(keys, stable=True)
        for lag in range(1, min(_LAGS + 1, positions)):
            i, j = order[:-lag], order[lag:]
            same = keys[i] == keys[j]
            i, j = i[same], j[same]
            far = (prefix[:, j] - prefix[:, i]).abs()
            near = far <= tol * (weight[:, j] - weight[:, i]).clamp_min(0).sqrt() + floor[:, None]
            hit = near.all(0)
            best[i[hit]] = torch.minimum(best[i[hit]], j[hit])
    return torch.where(best < positions, best, 0)[:-1].tolist()


def _cells(scaled: Tensor, shift: int) -> Tensor:
    """One number per position for its cell; different cells rarely share one, which costs a comparison and no more."""
    keys = torch.zeros(scaled.shape[1], dtype=torch.int64)
    for k, coordinate in enumerate(scaled):
        cell = (coordinate + 0.5 * (shift >> k & 1)).floor().to(torch.int64)
        keys = keys * 1_000_003 + cell
    return keys
