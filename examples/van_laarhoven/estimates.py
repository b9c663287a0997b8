"""Estimates from a grid that was run with several seeds, with intervals over the seeds.

Grids are float arrays of shape ``(S, L, D)``: seeds, learning rates, decays. A seed moves all of its cells together
(an easy split, few wrong labels), so variances are those between cells within a seed, less what noise alone would give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
CONFIDENCE = 0.95


class Interval(NamedTuple):
    """An estimate and its two-sided confidence interval of level ``CONFIDENCE``."""

    value: float
    low: float
    high: float

    def __contains__(self, value: object) -> bool:
        return isinstance(value, (int, float)) and self.low <= value <= self.high


def mean_interval(values: Any) -> Interval:
    """Student's interval of the mean of independent values, one per seed."""
    values = np.asarray(values, dtype=np.float64)
    mean, n = float(values.mean()), len(values)
    if n < 2:
        return Interval(mean, -np.inf, np.inf)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * float(values.std(ddof=1)) / n**0.5
    return Interval(mean, mean - half, mean + half)


def jackknife(statistic: Callable[[Array], float], grid: Array) -> Interval:
    """Interval of a statistic of several seeds: Student's, of Tukey's pseudo-values over the seeds."""
    n = len(grid)
    whole = statistic(grid)
    if n < 3:
        return Interval(whole, -np.inf, np.inf)
    without = [statistic(np.delete(grid, k, axis=0)) for k in range(n)]
    around = mean_interval([n * whole - (n - 1) * left for left in without])
    half = around.high - around.value
    return Interval(whole, whole - half, whole + half)


class Components(NamedTuple):
    """Mean squares between cells, and between cells and seeds: noise."""

    between: float
    noise: float
    seeds: int

    @property
    def variance(self) -> float:
        """Variance between cells with the part of noise taken out; below 0 where noise was less than it should be."""
        return (self.between - self.noise) / self.seeds


def components(lines: Iterable[Array]) -> Components:
    """Two-way analysis of variance, pooled over lines of cells, each of shape ``(S, K)``: seeds are blocks."""
    squares, freedom = np.zeros(2), np.zeros(2)
    seeds = 0
    for line in lines:
        seeds, cells = line.shape
        if cells > 1:
            means = line.mean(axis=0)
            rest = line - line.mean(axis=1, keepdims=True) - means + means.mean()
            squares += seeds * ((means - means.mean()) ** 2).sum(), (rest**2).sum()
            freedom += cells - 1, (cells - 1) * (seeds - 1)
    between, noise = squares / np.maximum(freedom, 1)
    return Components(float(between), float(noise), seeds)


def along(grid: Array) -> list[Array]:
    """Diagonals of constant effective rate: one learning rate up, one decay down."""
    return across(grid[:, :, ::-1])


def across(grid: Array) -> list[Array]:
    """The other diagonals, as many and as long: one learning rate up, one decay up."""
    _, lrs, decays = grid.shape
    return [np.diagonal(grid, k, axis1=1, axis2=2) for k in range(1 - lrs, decays)]


def along_over_across(grid: Array) -> float:
    """Variance along diagonals of constant effective rate over that across: 0 is flat, 1 is no preference."""
    return components(along(grid)).variance / components(across(grid)).variance


def along_less_across(grid: Array, part: float) -> Interval:
    """Variance along diagonals less a part of that across; unlike their ratio it is sound where both are near 0."""
    return jackknife(lambda g: components(along(g)).variance - part * components(across(g)).variance, grid)


def permutation_p(grid: Array, permutations: int = 999, seed: int = 0) -> float:
    """Share of grids at least as flat along their diagonals, if the decays of each learning rate are shuffled.

    Each learning rate keeps its errors, so that an effect of the learning rate alone is no evidence; seeds are shuffled
    together, so that noise stays noise. Of 1/(permutations + 1) at least.
    """
    draw = np.random.default_rng(seed)

    def ratio(cells: Array) -> float:
        return components(along(cells)).between / components(across(cells)).between

    found = ratio(grid)
    less = 0
    for _ in range(permutations):
        order = draw.permuted(np.tile(np.arange(grid.shape[2]), (grid.shape[1], 1)), axis=1)
        less += ratio(np.take_along_axis(grid, order[None], axis=2)) <= found
    return (1 + less) / (1 + permutations)


def over_decays(grid: Array, kept: Mask) -> list[Array]:
    """For each learning rate its cells over the decays that are kept, which has shape ``(L, D)``."""
    return [grid[:, k, kept[k]] for k in range(grid.shape[1])]


def collapse(plain: Array, projected: Array, kept: Mask, part: float) -> tuple[Interval, Interval]:
    """Variance over decays at fixed learning rate: projected over plain, and projected less a part of plain."""

    def spreads(grids: Array) -> list[float]:
        return [components(over_decays(grid, kept)).variance for grid in np.split(grids, 2, axis=1)]

    def ratio(grids: Array) -> float:
        of_plain, of_projected = spreads(grids)
        return of_projected / of_plain

    def difference(grids: Array) -> float:
        of_plain, of_projected = spreads(grids)
        return of_projected - part * of_plain

    both = np.concatenate([plain, projected], axis=1)
    return jackknife(ratio, both), jackknife(difference, both)


def slope(x: Array, y: Array) -> float:
    """Slope of the least-squares line."""
    return float(np.polyfit(x, y, 1)[0])


def exponent(x: Any, y: Array) -> Interval:
    """Exponent b of y ∝ x^b: fitted in logarithms for each seed, with Student's interval over the seeds.

    Args:
        x: Positive, shape ``(K,)``.
        y: Positive, shape ``(S, K)``.
    """
    return mean_interval([slope(np.log(x), np.log(row)) for row in y])


def rank_correlation(x: Any, y: Array) -> Interval:
    """Spearman's correlation for each seed, with Student's interval over the seeds; ``y`` has shape ``(S, K)``.

    It counts as 0 for a seed whose values are all the same.
    """
    return mean_interval([float(stats.spearmanr(x, row).statistic) if np.ptp(row) else 0.0 for row in y])
