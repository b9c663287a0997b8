"""From the Euler sums of all draws to a verdict for each parameter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lightning_normreg._symmetries._euler import EulerSums
from lightning_normreg._symmetries._partition import FLOOR, finest_partition
from lightning_normreg._symmetries._shape import shape_of
from lightning_normreg._symmetries._slices import Axis, Table, Tables
from lightning_normreg._symmetries._thresholds import Thresholds
from lightning_normreg._weights import ScaleInvariance


def unreached(found: Mapping[str, EulerSums]) -> set[str]:
    """Parameters that had no gradient at all, in any draw."""
    return {name for name, sums in found.items() if not bool(sums.total.any())}


def dead_parameters(found: Mapping[str, EulerSums], names: Iterable[str], limit: float) -> set[str]:
    """Those of some parameters whose ``√Σ E²`` is nothing against the largest of ``found``, in every draw."""
    if not found:
        return set()
    largest = torch.stack([sums.total.sqrt() for sums in found.values()]).amax(0)
    return {name for name in names if bool((found[name].total.sqrt() <= limit * largest).all())}


def classify(weight: EulerSums, biases: Mapping[str, EulerSums], limits: Thresholds) -> ScaleInvariance:
    """Find the finest units of a parameter that are scale-invariant by themselves, else those that are with a bias."""
    alone = [] if weight.is_vector else list(_by_axis(weight.tables, limits.z))
    if alone:
        # Units that cover the whole tensor first, then smaller ones, then the dimension of the neurons.
        return min(alone, key=lambda v: (v.slices is not None, v.kind == "layer"))
    neurons, table = next(iter(weight.tables.items()))
    whole = ScaleInvariance("layer")
    z = _largest_z(table, whole)
    if z <= limits.z:
        return replace(whole, z=z)
    for name, bias in {} if weight.is_vector else biases.items():
        joint = _along(table.plus(bias.tables[Axis(0)]), neurons, limits.z, is_neuron_axis=True)
        if joint is not None:
            return replace(joint, needs_bias=name)
    reason = (
        f"Multiplying it by a positive number changes the loss: |Σ w·g|/√Σ(w·g)² is {z:.2g}, not below {limits.z:g}."
    )
    return ScaleInvariance("none", z=z, reason=reason)


def open_axes(found: EulerSums, tol: float) -> list[Axis]:
    """Axes along which one draw leaves units possible: beyond rows and columns only single slices make sense."""
    return [a for i, (a, table) in enumerate(found.tables.items()) if i < 2 or bool((_z(table) <= tol).all())]


def _by_axis(tables: Tables, tol: float) -> Iterator[ScaleInvariance]:
    for index, (axis, table) in enumerate(tables.items()):
        if index < 2 or bool((_z(table) <= tol).all()):  # beyond rows and columns only single slices make sense
            verdict = _along(table, axis, tol, is_neuron_axis=index == 0)
            if verdict is not None:
                yield verdict


def _along(table: Table, axis: Axis, tol: float, *, is_neuron_axis: bool) -> ScaleInvariance | None:
    partition = finest_partition(*table, tol)
    verdict = shape_of(partition, table.sums.shape[1], axis, is_neuron_axis=is_neuron_axis)
    return verdict and replace(verdict, z=_largest_z(table, verdict))


def _largest_z(table: Table, verdict: ScaleInvariance) -> float:
    return float(_z(table.per_unit(verdict)).max())


def _z(table: Table) -> Tensor:
    """``|S|/√Q``, with the floor that keeps nearly dead slices from being judged by their roundoff."""
    scale = table.squares.sqrt() + FLOOR * table.squares.mean(-1, keepdim=True).sqrt()
    return table.sums.abs() / scale.clamp_min(torch.finfo(scale.dtype).tiny)
