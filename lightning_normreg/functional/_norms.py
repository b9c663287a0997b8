"""Norms that keep their digits: short sums in float32 or wider, and no overflow at 1e30."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_normreg.functional._units import Unit, split_units, unit_rows

CHUNK = 64
"""Entries summed in one go. Longer rows are summed in chunks, then over the chunks: on a CPU a plain float32 norm
is off by 8e-7 for 50 000 entries and by 6e-4 for 16 million, in chunks by 1e-7 (2.5e-7 where all entries are equal
and all roundings agree), at nearly the same speed."""


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the type that sums run in: float32 for anything narrower, else the type itself."""
    real = dtype.to_real()
    return torch.float64 if real == torch.float64 else torch.float32


def row_norms(rows: Tensor) -> Tensor:
    """L2 norm of each row, shape ``(rows,)``, for entries of any size that the type can hold."""
    rows = rows.to(accumulator(rows.dtype))
    plain = chunked_norms(rows)
    if host_reads_are_free(rows) and bool(squares_fit(plain).all()):
        return plain
    return torch.where(squares_fit(plain), plain, _rescaled_norms(rows))


def host_reads_are_free(tensor: Tensor) -> bool:
    # Elsewhere a read waits for the device, which costs more than the second pass that it could save.
    return tensor.device.type == "cpu"


def known_unset(flags: Tensor) -> bool:
    """Whether no flag is set, and that can be known without waiting for a device."""
    return host_reads_are_free(flags) and not bool(flags.any())


def squares_fit(norms: Tensor) -> Tensor:
    # Outside of this range the sum of squares overflows, or loses digits to underflow even with a million terms.
    info = torch.finfo(norms.dtype)
    low, high = (info.tiny / info.eps) ** 0.5 * 1024, info.max**0.5 / 2
    fit: Tensor = (norms >= low) & (norms <= high)
    return fit


def chunked_norms(rows: Tensor) -> Tensor:
    """L2 norm of each row, as long as squares of entries fit into the type."""
    if rows.device.type == "cpu" and rows.stride(1) != 1:
        # Across memory vector_norm adds one by one, slowly and 16 eps off after 256 entries; sum adds pair by pair.
        strided: Tensor = rows.square().sum(dim=1).sqrt()
        return strided
    entries = rows.shape[1]
    if entries <= CHUNK:
        return _plain(rows, 1)
    whole = entries - entries % CHUNK
    parts = _plain(rows[:, :whole].reshape(rows.shape[0], whole // CHUNK, CHUNK), 2)
    if whole < entries:
        parts = torch.cat([parts, _plain(rows[:, whole:], 1).unsqueeze(1)], dim=1)
    return chunked_norms(parts)


def _plain(values: Tensor, dim: int) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(values, dim=dim)
    return norms


def _rescaled_norms(rows: Tensor) -> Tensor:
    if rows.shape[1] == 0:
        return rows.new_zeros(rows.shape[0])
    largest = rows.abs().amax(dim=1)
    divisor = torch.where(largest > 0, largest, 1.0)
    norms = largest * chunked_norms(rows / divisor.unsqueeze(1))
    return torch.where(largest.isfinite(), norms, largest)


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
    return row_norms(unit_rows(*split_units(weight, unit, dim, groups)))


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
