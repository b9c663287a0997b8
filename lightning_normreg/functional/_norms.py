"""Norms that keep their digits: short sums in float32, their squares in float64, and no overflow at 1e30."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lightning_normreg.functional._device import BLOCK, accumulator, is_followed, number_type, sum_type, way_of
from lightning_normreg.functional._units import Unit, split_units, unit_rows

CHUNKS = {torch.float32: 256, torch.float64: 64}
"""Entries summed in one go, by the type of the sums. On a CPU a plain float32 norm is off by 8e-7 for 50 000 entries,
and by 6e-4 for 16 million; in chunks, whose norms are added in float64, by 1.3e-7, also where all entries are equal, at
the same speed."""


Operation = Callable[[], object]
"""A tensor operation whose arguments are in place, so that it can be done again and again at no cost but its own."""


def chunk_of(rows: Tensor) -> int:
    """Entries of a row that are summed in one go."""
    way = way_of(rows)
    if way == "wide" and rows.dtype != torch.float64:
        return max(1, min(rows.shape[-1], BLOCK[way]))
    return _chunk(rows.shape[-1], accumulator(rows.dtype))


def _chunk(entries: int, kept: torch.dtype) -> int:
    most = CHUNKS[kept]
    if entries <= most:
        return max(1, entries)
    return next((size for size in range(most, most // 4 - 1, -1) if entries % size == 0), most)


def cuts_of(rows: Tensor) -> list[tuple[slice, slice]]:
    """Runs of entries to work on at a time, and for each the cells that its sums go to.

    A cell is for one chunk where cells are added in a wider type, else there are at most 32 of them.
    """
    way, kept, size, entries = way_of(rows), accumulator(rows.dtype), chunk_of(rows), rows.shape[-1]
    step, found, cell = max(1, BLOCK[way] // size) * size, [], 0
    for start in range(0, entries, step):
        stop = min(start + step, entries)
        cells = -(-(stop - start) // size)
        while cells > 32 and (way != "host" or kept == torch.float64):
            cells = -(-cells // _chunk(cells, kept))
        found.append((slice(start, stop), slice(cell, cell + cells)))
        cell += cells
    return found


def cells_of(rows: Tensor) -> int:
    """Number of cells of each row."""
    return max((cells.stop for _, cells in cuts_of(rows)), default=0)


def row_norms(rows: Tensor) -> Tensor:
    """L2 norm of each row, shape ``(rows,)``, for entries of any size that the type can hold.

    In float64, so that squares of these norms neither overflow nor underflow; in float32 where the device has no other.
    There, entries beyond 1e±18 count as infinite or zero.
    """
    if is_followed(rows):
        return rescaled_norms(rows)
    return mended_norms(_plain_norms(rows), rows.dtype, lambda odd: rescaled_norms(rows[odd]))


def _plain_norms(rows: Tensor) -> Tensor:
    cells = rows.new_zeros(len(rows), cells_of(rows), dtype=sum_type(rows))
    for operation in norm_operations(rows, cells):
        operation()
    return cells.to(number_type(rows)).square().sum(dim=1).sqrt()


def mended_norms(norms: Tensor, dtype: torch.dtype, detour: Callable[[Tensor], Tensor]) -> Tensor:
    """What :func:`norm_operations` give, with those replaced whose squares do not fit into the type of the weight.

    Args:
        norms: One for each row.
        dtype: Of the weight.
        detour: :func:`rescaled_norms` of rows that are marked.
    """
    way, kept = way_of(norms), accumulator(dtype)
    if way == "host":
        odd = ~squares_fit(norms, kept)
        if bool(odd.any()):
            norms[odd] = detour(odd)
    elif way == "wide" and kept == torch.float64:
        return torch.where(squares_fit(norms, kept), norms, detour(torch.ones_like(norms, dtype=torch.bool)))
    return norms


def squares_fit(norms: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether the sums of squares behind norms neither overflowed in a type, nor lost digits to underflow."""
    info = torch.finfo(dtype)
    low, high = (info.tiny / info.eps) ** 0.5 * 1024, info.max**0.5 / 2  # even with a million terms
    fit: Tensor = (norms >= low) & (norms <= high)
    return fit


def norm_operations(rows: Tensor, out: Tensor) -> list[Operation]:
    """What gives the L2 norm of each cell, ``(..., cells)``, as long as squares of entries fit into the type."""
    size = chunk_of(rows)
    return [op for cut, cells in cuts_of(rows) for op in chunk_norms(rows[..., cut], out[..., cells], size)]


def chunk_norms(rows: Tensor, out: Tensor, size: int) -> list[Operation]:
    """The same of one cut in chunks of a size."""
    norm, kept, entries = torch.linalg.vector_norm, out.dtype, rows.shape[-1]
    if way_of(rows) == "host" and rows.stride(-1) != 1 and entries > 1:
        # Across memory vector_norm adds one by one, slowly and 16 eps off after 256 entries; sum adds pair by pair.
        return [lambda: out[..., 0].copy_(rows.to(kept).square().sum(dim=-1).sqrt())]
    cells, whole = -(-entries // size), entries // size
    parts = out if cells == out.shape[-1] else rows.new_empty(*rows.shape[:-1], cells, dtype=kept)
    found: list[Operation] = []
    if whole:
        found.append(partial(norm, rows.unfold(-1, size, size), dim=-1, dtype=kept, out=parts[..., :whole]))
    if whole < cells:
        found.append(partial(norm, rows[..., whole * size :], dim=-1, dtype=kept, out=parts[..., -1]))
    return found if parts is out else [*found, *chunk_norms(parts, out, _chunk(cells, kept))]


def rescaled_norms(rows: Tensor) -> Tensor:
    """L2 norm of each row of any size that float64 can hold, as operations that autograd can follow."""
    rows = rows.to(number_type(rows))
    if rows.shape[1] == 0:
        return rows.new_zeros(len(rows))
    largest = rows.detach().abs().amax(dim=1)
    scale = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
    norms: Tensor = torch.linalg.vector_norm(rows / scale.unsqueeze(1), dim=1)
    return scale * norms


def root_mean_square(values: Tensor) -> Tensor:
    """Root mean square of a 1-D tensor, 0 for an empty one."""
    norm: Tensor = row_norms(values.reshape(1, -1)).squeeze(0)
    return norm / math.sqrt(max(values.numel(), 1))


def unit_norms(weight: Tensor, unit: Unit = "neuron", *, dim: int = 0, groups: int = 1) -> Tensor:
    r"""L2 norm of every unit of a weight, :math:`\lVert w_u\rVert`.

    Accumulates in float32, or float64 for a float64 weight. Entries of 1e30 and 1e-30 are safe, a zero unit has
    norm 0, a unit with an infinite or NaN entry has norm inf or NaN. Differentiable, with a gradient of 0 at a norm of
    0, also under ``torch.func`` and ``torch.compile``.

    Args:
        weight: Tensor of any shape and floating-point or complex type.
        unit: ``"neuron"``: one output row, shape ``(out, *)``; a tensor with fewer than two dimensions is one unit,
            because a single entry has no direction. ``"layer"``: the whole tensor.
        dim: The dimension that numbers the neurons (the one that is kept): 0, but 1 for transposed convolutions.
        groups: ``groups`` of a transposed convolution, with ``dim=1``.

    Returns:
        Shape ``(units,)``, the unit of the weight, at least 0.

    Raises:
        ValueError: If ``unit`` is unknown.
        TypeError: If ``weight`` holds integers.

    Examples:
        >>> unit_norms(torch.tensor([[3.0, 4.0], [5.0, 12.0]]))
        tensor([ 5., 13.])
        >>> unit_norms(torch.full((1, 4), 1e30))
        tensor([2.0000e+30])

    Reference:
        The norm of "the weight vector of one neuron", van Laarhoven 2017, https://arxiv.org/abs/1706.05350.
    """
    return row_norms(unit_rows(*split_units(weight, unit, dim, groups))).to(accumulator(weight.dtype))


def weight_norm(weight: Tensor) -> Tensor:
    r"""L2 norm of a whole tensor, :math:`\lVert w\rVert=\sqrt{\sum_u\lVert w_u\rVert^2}`.

    Summed in chunks, so that a float32 tensor of 16 million entries keeps six digits.

    Args:
        weight: Tensor of any shape and floating-point or complex type.

    Returns:
        A 0-dimensional tensor, 0 for an empty ``weight``.

    Examples:
        >>> weight_norm(torch.tensor([[1.0, 2.0], [2.0, 4.0]]))
        tensor(5.)

    Reference:
        van Laarhoven 2017, https://arxiv.org/abs/1706.05350.
    """
    return unit_norms(weight, "layer").squeeze(0)
