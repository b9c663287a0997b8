"""Putting units on a sphere, in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_normreg.functional._norms import CHUNK, accumulator, row_norms
from lightning_normreg.functional._units import Unit, over_units, split_units, unit_rows


def dead_band(dtype: torch.dtype, entries: int) -> float:
    r"""Relative distance from the radius within which a unit counts as being on it.

    Projecting rounds each of the m entries, by at most :math:`\epsilon_w/2` relative (ε_w of the weight's type), then
    dividing and two square roots add at most 2 ε (ε of the accumulator), and two measurements add the noise of a sum of
    k = min(m, 256) squares, in at least 4 vector lanes: at most √k/8 ε at six standard deviations. Hence

    .. math:: \epsilon_w/2 + (2+\sqrt{\min(m, 256)}/8)\,\epsilon

    which is 5.4e-7 for a long float32 row. Anything closer to the radius than this cannot be told from it, so it is
    left alone: a projected weight is projected again without changing a bit.
    """
    eps = torch.finfo(accumulator(dtype)).eps
    return float(torch.finfo(dtype).eps / 2 + (2 + min(entries, CHUNK) ** 0.5 / 8) * eps)


@torch.no_grad()
def project_(
    weight: Tensor, radius: float | Tensor = 1.0, unit: Unit = "neuron", *, dim: int = 0, groups: int = 1
) -> Tensor:
    r"""Put every unit of a weight at a norm, in place: :math:`w_u \leftarrow R\,w_u/\lVert w_u\rVert`.

    A unit already at the radius (to a few units in the last place, :func:`dead_band`) keeps every bit. A zero unit
    stays zero, a unit with infinite or NaN entries is left as it is, and so is one whose quotient ‖w_u‖/R the type
    cannot hold: a finite weight never becomes non-finite, nor zero.

    Args:
        weight: Tensor of any shape; written in place.
        radius: Target norm R > 0: one number, or one for each unit with shape ``(units,)``.
        unit: See :func:`unit_norms`.
        dim: See :func:`unit_norms`.
        groups: See :func:`unit_norms`.

    Returns:
        The norms before the projection, shape ``(units,)``.

    Raises:
        ValueError: If ``radius`` is a number that is not positive and finite.

    Example:
        >>> weight = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
        >>> project_(weight)
        tensor([5., 0.])
        >>> weight
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])

    Reference:
        van Laarhoven 2017, section "Normalizing Weights": w ← w/‖w‖ after the ordinary step; not a parametrization.
    """
    check_radius(radius)
    view, kept = split_units(weight, unit, dim, groups)
    rows = unit_rows(view, kept)
    norms = row_norms(rows)
    divisor = norms / (radius.to(norms) if isinstance(radius, Tensor) else radius)
    off = (divisor - 1).abs() > dead_band(weight.dtype, rows.shape[1])
    tiny = torch.finfo(norms.dtype).tiny
    possible = norms.isfinite() & (norms >= tiny) & divisor.isfinite() & (divisor >= tiny)
    divisor = over_units(torch.where(off & possible, divisor, 1.0), view, kept)
    if view.dtype == divisor.dtype:
        view.div_(divisor)
    else:
        view.copy_(view.to(divisor.dtype) / divisor)
    return norms


def project_all_(
    weights: Sequence[Tensor], radius: float | Sequence[float | Tensor] = 1.0, unit: Unit = "neuron"
) -> list[Tensor]:
    """Put every unit of many weights at a norm, in place; see :func:`project_`.

    Args:
        weights: Tensors of any shapes, whose neurons are rows of dimension 0; written in place.
        radius: One radius for all, or one for each weight.
        unit: See :func:`unit_norms`.

    Returns:
        For each weight the norms before the projection.

    Raises:
        ValueError: If ``radius`` is a sequence of another length than ``weights``, or not positive.

    Example:
        >>> weights = [torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]])]
        >>> project_all_(weights, radius=10.0)
        [tensor([5.]), tensor([2.])]
        >>> weights[0]
        tensor([[6., 8.]])

    Reference:
        As :func:`project_`.
    """
    radii = [radius] * len(weights) if isinstance(radius, (int, float)) else list(radius)
    if len(radii) != len(weights):
        raise ValueError(f"`radius` must be one number or {len(weights)} of them, got {len(radii)}.")
    return [project_(weight, r, unit) for weight, r in zip(weights, radii, strict=True)]


def check_radius(radius: float | Tensor) -> None:
    """Raise a ``ValueError`` unless a number is positive and finite; a tensor is trusted: reading it waits."""
    if not isinstance(radius, Tensor) and not 0 < radius < float("inf"):
        raise ValueError(f"`radius` must be positive and finite, got {radius}. Use 1.0 for unit norm.")
