"""From the Euler sums of all draws to a verdict for each parameter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_normreg._symmetries._euler import EulerSums
from lightning_normreg._symmetries._partition import FLOOR, finest_partition
from lightning_normreg._symmetries._shape import shape_of
from lightning_normreg._symmetries._slices import Axis, unit_of_slice, unit_sums
from lightning_normreg._symmetries._thresholds import Thresholds
from lightning_normreg._weights import ScaleInvariance


class Table(NamedTuple):
    """Sums and squares per slice, each of shape ``(draws, slices)``."""

    sums: Tensor
    squares: Tensor


@dataclass(frozen=True)
class Candidate:
    """One parameter as the classification sees it."""

    sums: EulerSums
    biases: Mapping[str, EulerSums]

    def table(self, axis: Axis, bias: str | None = None) -> Table:
        """Sums along an axis, together with those of a bias that has one entry per slice."""
        sums, squares = self.sums.sums[axis], self.sums.squares[axis]
        if bias is None:
            return Table(sums, squares)
        own = self.biases[bias]
        return Table(sums + own.sums[Axis(0)], squares + own.squares[Axis(0)])


def inert_parameters(found: Mapping[str, EulerSums], limits: Thresholds) -> set[str]:
    """Parameters that the loss does not depend on: ``√Σ E²`` is nothing against the largest tensor, in every draw.

    This comes first, because the z of such a parameter is a ratio of two roundoffs.
    """
    if not found:
        return set()
    totals = torch.stack([sums.total.sqrt() for sums in found.values()])
    largest = totals.amax(0)
    inert = (totals <= limits.inert * largest).all(1).tolist()
    return {name for name, is_inert in zip(found, inert, strict=True) if is_inert}


def classify(candidate: Candidate, limits: Thresholds) -> ScaleInvariance:
    """Find the finest units of a parameter that are scale-invariant by themselves, else those that are with a bias."""
    by_axis = [] if candidate.sums.is_vector else list(_by_axis(candidate, limits))
    alone = _finest(by_axis) or _whole(candidate, limits)
    return alone or _with_bias(candidate, limits) or _not_invariant(candidate, limits)


def _finest(found: list[ScaleInvariance]) -> ScaleInvariance | None:
    """Prefer units that cover the whole tensor, then smaller ones, then the dimension of the neurons."""
    return min(found, key=lambda v: (v.slices is not None, v.kind == "layer"), default=None)


def _by_axis(candidate: Candidate, limits: Thresholds) -> Iterator[ScaleInvariance]:
    for index, axis in enumerate(candidate.sums.sums):
        table = candidate.table(axis)
        if index < 2 or _every_slice(table, limits.z):  # beyond rows and columns only single slices make sense
            verdict = _along(table, axis, limits, is_neuron_axis=index == 0)
            if verdict is not None:
                yield verdict


def _along(table: Table, axis: Axis, limits: Thresholds, *, is_neuron_axis: bool) -> ScaleInvariance | None:
    partition = finest_partition(*table, limits.z)
    verdict = shape_of(partition, table.sums.shape[1], axis, is_neuron_axis=is_neuron_axis)
    return verdict and replace(verdict, z=_largest_z(table, verdict))


def _every_slice(table: Table, tol: float) -> bool:
    return bool((_z(*table) <= tol).all())


def _whole(candidate: Candidate, limits: Thresholds) -> ScaleInvariance | None:
    verdict = ScaleInvariance("layer", z=_whole_z(candidate))
    return verdict if verdict.z is not None and verdict.z <= limits.z else None


def _with_bias(candidate: Candidate, limits: Thresholds) -> ScaleInvariance | None:
    if candidate.sums.is_vector:
        return None
    axis = next(iter(candidate.sums.sums))
    for bias in candidate.biases:
        verdict = _along(candidate.table(axis, bias), axis, limits, is_neuron_axis=True)
        if verdict is not None:
            return replace(verdict, needs_bias=bias)
    return None


def _not_invariant(candidate: Candidate, limits: Thresholds) -> ScaleInvariance:
    z = _whole_z(candidate)
    reason = (
        f"Multiplying it by a positive number changes the loss: |Σ w·g|/√Σ(w·g)² is {z:.2g}, not below {limits.z:g}."
    )
    return ScaleInvariance("none", z=z, reason=reason)


def _whole_z(candidate: Candidate) -> float:
    table = candidate.table(next(iter(candidate.sums.sums)))
    return _largest_z(table, ScaleInvariance("layer"))


def _largest_z(table: Table, verdict: ScaleInvariance) -> float:
    units = unit_of_slice(verdict, table.sums.shape[1])
    sums = torch.stack([unit_sums(s, units) for s in table.sums])
    squares = torch.stack([unit_sums(q, units) for q in table.squares])
    return float(_z(sums, squares).max())


def _z(sums: Tensor, squares: Tensor) -> Tensor:
    """``|S|/√Q``, with the floor that keeps nearly dead slices from being judged by their roundoff."""
    scale = squares.sqrt() + FLOOR * squares.mean(1, keepdim=True).sqrt()
    return sums.abs() / scale.clamp_min(torch.finfo(scale.dtype).tiny)
