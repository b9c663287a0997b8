"""Which entries of a weight form one unit, the smallest block that is scale-invariant by itself."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Unit = Literal["neuron", "layer"] | int
UNITS: tuple[Unit, ...] = ("neuron", "layer")
View = tuple[Tensor, tuple[int, ...]]
"""A view of a tensor, and the dimensions of it that number its units."""


def check_unit(unit: object) -> None:
    """Raise a ``ValueError`` that lists the known units, unless ``unit`` is one of them."""
    block = isinstance(unit, int) and not isinstance(unit, bool) and unit > 0
    if unit not in UNITS and not block:
        known = ", ".join(map(repr, UNITS))
        raise ValueError(f"`unit` must be one of {known}, or a number of neighbouring neurons, got {unit!r}.")


def split_units(weight: Tensor, unit: Unit, dim: int, groups: int) -> View:
    """View ``weight`` so that its units run along whole dimensions.

    The neurons run along dimension ``dim``, 0 for all but transposed convolutions, whose neurons are spread over
    dimension 0 as well, in ``groups``. Complex entries are seen as pairs of real ones. Returned are a view, never a
    copy, so that it can be written through, and the dimensions of it that number the units.
    """
    check_unit(unit)
    if not (weight.is_floating_point() or weight.is_complex()):
        raise TypeError(f"`weight` must be a floating-point tensor, got {weight.dtype}.")
    view, lonely = weight, weight.ndim < 2  # one entry has a sign, but no direction: a vector is one unit
    if view.is_complex():
        view = torch.view_as_real(view)
    if unit == "layer" or lonely:
        return view, ()
    size = 1 if unit == "neuron" else unit
    if groups > 1:
        return _split_groups(view, size, groups)
    return _cut(view, dim, size), (dim,)


def _split_groups(view: Tensor, size: int, groups: int) -> View:
    """Units of a transposed convolution, whose neuron number is group · neurons in a group + place in it."""
    inside = view.shape[1]
    grouped = _cut(view, 0, view.shape[0] // groups)
    if inside % size == 0:
        return _cut(grouped, 2, size), (0, 2)
    return _cut(grouped, 0, size // inside if size % inside == 0 else groups + 1), (0,)


def _cut(view: Tensor, dim: int, size: int) -> Tensor:
    """Cut a dimension into runs of ``size``, as two dimensions."""
    length = view.shape[dim]
    if length % size:
        raise ValueError(f"`unit` must divide the number of neurons into equal blocks, got {size} for {length}.")
    return view.view(*view.shape[:dim], length // size, size, *view.shape[dim + 1 :])


def unit_rows(view: Tensor, kept: tuple[int, ...], like: Tensor | None = None) -> Tensor:
    """Lay the units out as rows, shape ``(units, entries)``; a view wherever the memory layout allows.

    Entries come in the order in which they, or those of ``like``, lie in memory.
    """
    layout = view if like is None else like
    reduced = sorted(set(range(view.ndim)) - set(kept), key=layout.stride, reverse=True)
    units = torch.Size(view.shape[d] for d in kept).numel()
    entries = torch.Size(view.shape[d] for d in reduced).numel()
    return view.permute([*kept, *reduced]).reshape(units, entries)


def paired_rows(
    weight: Tensor, other: Tensor, unit: Unit, dim: int, groups: int, *, name: str
) -> tuple[Tensor, Tensor]:
    """Rows of a weight and of a tensor that belongs to it, entries in one order whatever their memory layouts."""
    if weight.shape != other.shape:
        raise ValueError(f"`{name}` must have the weight's shape {tuple(weight.shape)}, got {tuple(other.shape)}.")
    view, kept = split_units(weight, unit, dim, groups)
    return unit_rows(view, kept), unit_rows(split_units(other, unit, dim, groups)[0], kept, like=view)


def over_units(values: Tensor, view: Tensor, kept: tuple[int, ...]) -> Tensor:
    """Shape one value per unit so that it broadcasts against the view of :func:`split_units`."""
    return values.reshape([view.shape[d] if d in kept else 1 for d in range(view.ndim)])
