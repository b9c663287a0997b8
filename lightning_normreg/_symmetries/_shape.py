"""From a partition of slices to units with a name: neurons, blocks, columns, the whole layer, or a part of these."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from lightning_normreg._symmetries._partition import Partition
from lightning_normreg._symmetries._slices import Axis
from lightning_normreg._weights import Kind, ScaleInvariance

SMALLEST_COVER = 0.2
"""A partition that covers less of the slices than this is taken for an accident."""

Ranges = list[tuple[int, int]]


def shape_of(partition: Partition, slices: int, axis: Axis, *, is_neuron_axis: bool) -> ScaleInvariance | None:
    """Name the units of a partition of so many slices along an axis; None where they cover too little.

    Slices without a signal go to the unit around or before them.
    """
    runs, live = partition
    covered = sum(stop - start for start, stop in runs)
    if not covered or covered < SMALLEST_COVER * len(live):
        return None
    if covered == len(live):
        return _full(runs, live, slices, axis, is_neuron_axis)
    ranges = [(int(live[start]), int(live[stop - 1]) + 1) for start, stop in runs]
    sizes = {stop - start for start, stop in ranges}
    if len(sizes) > 1:
        return _verdict("block", axis, None, ranges)
    return _verdict(_slice_kind(axis, is_neuron_axis), axis, sizes.pop(), _merged(ranges))


def _full(runs: Ranges, live: Tensor, slices: int, axis: Axis, is_neuron_axis: bool) -> ScaleInvariance:
    starts = live[[start for start, _ in runs]]
    lasts = live[[stop - 1 for _, stop in runs]]
    # One slice with a signal cannot tell a unit of one slice from a larger one; the larger one is safe.
    size = slices if len(live) == 1 else _block_size(starts, lasts, slices)
    if size is not None:
        return equal_units(size, slices, axis, is_neuron_axis=is_neuron_axis)
    cuts = [0, *starts[1:].tolist(), slices]
    return _verdict("block", axis, None, list(pairwise(cuts)))


def equal_units(size: int, slices: int, axis: Axis, *, is_neuron_axis: bool) -> ScaleInvariance:
    """Name units of ``size`` slices each that cover all slices along an axis."""
    if size == slices > 1:
        return ScaleInvariance("layer")
    return _verdict(_slice_kind(axis, is_neuron_axis), axis, size, None)


def _block_size(starts: Tensor, lasts: Tensor, slices: int) -> int | None:
    """Smallest divisor of the number of slices for which every run is one block."""
    for size in (k for k in range(1, slices + 1) if slices % k == 0):
        blocks = starts // size
        if bool((lasts // size == blocks).all()) and len(set(blocks.tolist())) == len(blocks):
            return size
    return None


def _slice_kind(axis: Axis, is_neuron_axis: bool) -> Kind:
    if is_neuron_axis:
        return "neuron"
    return "column" if axis.dim == 1 else "dim"


def _verdict(kind: Kind, axis: Axis, size: int | None, ranges: Ranges | None) -> ScaleInvariance:
    if size != 1:
        kind = "block"
    return ScaleInvariance(
        kind, dim=axis.dim, groups=axis.groups, block_size=size, slices=None if ranges is None else tuple(ranges)
    )


def _merged(ranges: Ranges) -> Ranges:
    merged = ranges[:1]
    for start, stop in ranges[1:]:
        if start == merged[-1][1]:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return merged
