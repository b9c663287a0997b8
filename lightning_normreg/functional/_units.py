"""Which entries of a weight form one unit, the smallest block that is scale-invariant by itself."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Unit = Literal["neuron", "layer"]
UNITS: tuple[Unit, ...] = ("neuron", "layer")


def check_unit(unit: str) -> None:
    """Raise a ``ValueError`` that lists the known units, unless ``unit`` is one of them."""
    if unit not in UNITS:
        raise ValueError(f"`unit` must be one of {', '.join(map(repr, UNITS))}, got {unit!r}.")


def split_units(weight: Tensor, unit: Unit, dim: int, groups: int) -> tuple[Tensor, tuple[int, ...]]:
    """View ``weight`` so that its units run along whole dimensions.

    Args:
        weight: Any floating-point or complex tensor; complex entries are seen as pairs of real ones.
        unit: ``"neuron"`` or ``"layer"``.
        dim: Dimension of the neurons, 0 for all but transposed convolutions.
        groups: Groups of a transposed convolution, whose neurons are spread over dimension 0 as well.

    Returns:
        A view (never a copy, so it can be written through) and the dimensions of it that number the units.
    """
    check_unit(unit)
    if not (weight.is_floating_point() or weight.is_complex()):
        raise TypeError(f"`weight` must be a floating-point tensor, got {weight.dtype}.")
    view = weight.detach()
    lonely = view.ndim < 2  # one entry has a sign, but no direction: a vector is one unit
    if view.is_complex():
        view = torch.view_as_real(view)
    if unit == "layer" or lonely:
        return view, ()
    if groups > 1:
        return view.view(groups, view.shape[0] // groups, *view.shape[1:]), (0, dim + 1)
    return view, (dim,)


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
