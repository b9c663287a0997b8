"""Sums over the slices of a tensor along one of its dimensions, and back from slices to entries."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_normreg._weights import ParameterRole, ScaleInvariance
from lightning_normreg.functional._units import over_units, split_units


class Axis(NamedTuple):
    """A dimension whose slices are looked at; ``groups`` as in :class:`ParameterRole`."""

    dim: int
    groups: int = 1


def axes(shape: torch.Size, role: ParameterRole) -> list[Axis]:
    """Dimensions worth a look: first that of the neurons, then the others in which there is more than one slice.

    A vector has only the first.
    """
    if len(shape) <= 1:
        return [Axis(0)]
    others = [d for d in range(len(shape)) if d != role.dim and shape[d] > 1]
    return [Axis(role.dim, role.groups), *(Axis(d) for d in others)]


def slice_sums(entries: Tensor, axis: Axis) -> Tensor:
    """Sum of the entries of each slice along an axis, shape ``(slices,)``; real tensors only."""
    if entries.ndim == 1:
        return entries
    view, kept = split_units(entries, "neuron", *axis)
    return view.sum([d for d in range(view.ndim) if d not in kept]).flatten()


def slice_squares(entries: Tensor, axis: Axis) -> Tensor:
    """Sum of the squares of the entries of each slice, shape ``(slices,)``, without a copy of the tensor."""
    if entries.ndim == 1:
        return entries.square()
    view, kept = split_units(entries, "neuron", *axis)
    norms: Tensor = torch.linalg.vector_norm(view, dim=[d for d in range(view.ndim) if d not in kept])
    return norms.square().flatten()


def scale_slices(tensor: Tensor, factors: Tensor, axis: Axis) -> Tensor:
    """Multiply each slice along an axis by its factor; ``factors`` has shape ``(slices,)``."""
    if tensor.ndim <= 1:
        return tensor * factors.reshape(tensor.shape)
    groups, dim = axis.groups, axis.dim
    view = tensor.reshape(groups, -1, *tensor.shape[1:]) if groups > 1 else tensor
    kept = (0, dim + 1) if groups > 1 else (dim,)
    return (view * over_units(factors, view, kept)).reshape(tensor.shape)


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


def unit_sums(sums: Tensor, units: Tensor) -> Tensor:
    """Pool sums per slice into sums per unit; ``units`` as from :func:`unit_of_slice`."""
    member = units >= 0
    count = int(units.max()) + 1 if len(units) else 0
    return sums.new_zeros(count).index_add_(0, units[member].to(sums.device), sums[member.to(sums.device)])
