"""Norms that keep their digits: short sums in float32, their squares in float64, and no overflow at 1e30."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_normreg.functional._device import accumulator, number_type, way_of
from lightning_normreg.functional._units import Unit, split_units, unit_rows

CHUNKS = {torch.float32: 256, torch.float64: 64}
"""Entries summed in one go, by the type of the sums. On a CPU a plain float32 norm is off by 8e-7 for 50 000 entries,
and by 6e-4 for 16 million; in chunks, whose norms are added in float64, by 1.3e-7, also where all entries are equal, at
the same speed."""


Operation = Callable[[], object]
"""A tensor operation whose arguments are in place, so that it can be done again and again at no cost but its own."""


class Results(NamedTuple):
    """Where numbers of rows are written, each in the type in which it comes; they start at 0, and the sum has all."""

    narrow: Tensor
    wide: Tensor

    @classmethod
    def of(cls, like: Tensor, *shape: int) -> Results:
        """Zeros on the device of a tensor."""
        kept, numbers = accumulator(like.dtype), number_type(like)
        return cls(like.new_zeros(shape, dtype=kept), like.new_zeros(shape, dtype=numbers))

    def at(self, *index: int | slice) -> Results:
        """A part of them."""
        return Results(self.narrow[index], self.wide[index])

    def sums(self) -> Tensor:
        """What was written."""
        return self.wide + self.narrow


def row_norms(rows: Tensor) -> Tensor:
    """L2 norm of each row, shape ``(rows,)``, for entries of any size that the type can hold.

    In float64, so that squares of these norms neither overflow nor underflow; in float32 where the device has no other.
    There, entries beyond 1e±18 count as infinite or zero.
    """
    found = Results.of(rows, len(rows))
    for operation in norm_operations(rows, found):
        operation()
    return mended_norms(found.sums(), rows.dtype, lambda odd: rescaled_norms(rows[odd]))


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


def norm_operations(rows: Tensor, out: Results) -> list[Operation]:
    """What gives the L2 norm along the last dimension, as long as squares of entries fit into the type."""
    norm, way, kept, entries = torch.linalg.vector_norm, way_of(rows), accumulator(rows.dtype), rows.shape[-1]
    if way == "host" and rows.stride(-1) != 1 and entries > 1:
        # Across memory vector_norm adds one by one, slowly and 16 eps off after 256 entries; sum adds pair by pair.
        return [lambda: out.wide.copy_(rows.to(kept).square().sum(dim=-1).sqrt())]
    if way == "wide" and out.narrow.dtype != torch.float64:
        return [partial(norm, rows, dim=-1, dtype=out.wide.dtype, out=out.wide)]
    chunk = CHUNKS[kept]
    if entries <= chunk:
        place = out.narrow if out.narrow.dtype == kept else out.wide
        return [partial(norm, rows, dim=-1, dtype=kept, out=place)]
    size = next((size for size in range(chunk, chunk // 4 - 1, -1) if entries % size == 0), chunk)
    whole = entries - entries % size
    cut = rows.unfold(-1, size, size)
    parts = rows.new_empty(*rows.shape[:-1], -(-entries // size), dtype=kept)
    found = [partial(norm, cut, dim=-1, dtype=kept, out=parts[..., : whole // size])]
    if whole < entries:
        found.append(partial(norm, rows[..., whole:], dim=-1, dtype=kept, out=parts[..., -1]))
    if parts.shape[-1] > chunk and kept == out.wide.dtype:
        return [*found, *norm_operations(parts, out)]
    return [*found, partial(norm, parts, dim=-1, dtype=out.wide.dtype, out=out.wide)]


def rescaled_norms(rows: Tensor) -> Tensor:
    """L2 norm of each row of any size that float64 can hold."""
    rows = rows.double()
    if rows.shape[1] == 0:
        return rows.new_zeros(len(rows))
    largest = rows.abs().amax(dim=1)
    scaled = rows / torch.where(largest > 0, largest, 1.0).unsqueeze(1)
    found = Results.of(scaled, len(rows))
    for operation in norm_operations(scaled, found):
        operation()
    return torch.where(largest.isfinite(), largest * found.sums(), largest)


def root_mean_square(values: Tensor) -> Tensor:
    """Root mean square of a 1-D tensor, 0 for an empty one."""
    norm: Tensor = row_norms(values.reshape(1, -1)).squeeze(0)
    return norm / math.sqrt(max(values.numel(), 1))


def unit_norms(weight: Tensor, unit: Unit = "neuron", *, dim: int = 0, groups: int = 1) -> Tensor:
    r"""L2 norm of every unit of a weight, :math:`\lVert w_u\rVert`.

    Accumulates in float32, or float64 for a float64 weight. Entries of 1e30 and 1e-30 are safe, a zero unit has
    norm 0, a unit with an infinite or NaN entry has norm inf or NaN.

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
