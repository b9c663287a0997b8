"""What one optimizer step did to a weight, relative to the weight's own scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_normreg.functional._norms import accumulator, host_reads_are_free, row_norms, squares_fit
from lightning_normreg.functional._units import Unit, paired_rows

BLOCK = 2**20
"""Entries of a weight that are measured at a time."""
COLUMNS = 2**18
"""Entries of a longer row that are summed at a time."""


@dataclass(frozen=True)
class Step:
    """One step of every unit, seen from where it started, each of shape ``(units,)``.

    Attributes:
        norm: Norm before the step.
        along: Signed length of the unit after the step along its direction before.
        across: Length of the unit after the step across that direction.
        update: Length of the update.
    """

    norm: Tensor
    along: Tensor
    across: Tensor
    update: Tensor

    def angle(self) -> Tensor:
        """Rotation in radians; 0 for a unit that is zero before the step or after it."""
        moved = torch.atan2(self.across, self.along)
        return torch.where(self.norm == 0, torch.zeros_like(moved), moved)

    def relative(self) -> Tensor:
        """Length of the update over the norm before it; 0 for a zero unit."""
        return _over(self.update, self.norm)


def measure_step(before: Tensor, after: Tensor, unit: Unit, dim: int, groups: int) -> Step:
    """Compare every unit before and after a step."""
    start, end = paired_rows(before, after, unit, dim, groups, name="after")
    return measure_rows(start, end)


def measure_rows(start: Tensor, end: Tensor) -> Step:
    """Likewise with the units as rows, some rows at a time, so that temporaries stay small and in the cache."""
    rows = max(1, BLOCK // max(1, start.shape[1]))
    blocks = [_measure_block(*block) for block in zip(torch.split(start, rows), torch.split(end, rows), strict=True)]
    return Step(*torch.cat(blocks, dim=1))


def _measure_block(start: Tensor, end: Tensor) -> Tensor:
    """Norm before, length along and across it afterwards, and length of the update, of each row."""
    if not host_reads_are_free(start):
        return torch.stack(_measure_radial(start, end))
    pieces = zip(torch.split(start, COLUMNS, dim=1), torch.split(end, COLUMNS, dim=1), strict=True)
    sums = [torch.stack(values, dim=1) for values in zip(*(_sums(*piece) for piece in pieces), strict=True)]
    norm, update = row_norms(sums[0]), row_norms(sums[2])
    along = sums[1].sum(dim=1) / torch.where(norm > 0, norm, 1.0)
    found = torch.stack([norm, norm + along, ((update - along) * (update + along)).sqrt(), update])
    # Where the update is no more along the row than that, its sums keep all digits but one bit; NaN compares false.
    radial = ~((along.abs() <= update / 2) & squares_fit(norm) & (squares_fit(update) | (update == 0)))
    if bool(radial.any()):
        found[:, radial] = torch.stack(_measure_radial(start[radial], end[radial]))
    return found


def _sums(start: Tensor, end: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Norm before, scalar product of row and update, length of the update."""
    wide = accumulator(start.dtype)
    start, update = start.to(wide), end.to(wide) - start.to(wide)
    return row_norms(start), (start * update).sum(dim=1), row_norms(update)


def _measure_radial(start: Tensor, end: Tensor) -> tuple[Tensor, ...]:
    """The same for updates along the row as well, at ten times the cost.

    What is left of the row after taking off k times the row before keeps its digits only if taking off rounds nothing:
    acos has none left below 3e-4 in float32, and where decay makes the update almost radial, rounding the radial part
    costs what it is longer than the other. So k and the weight are cut into halves of their significands, whose
    products are exact, and k is found in three such halves: what is along the row then falls below the last digit.
    """
    wide = accumulator(start.dtype)
    start, end = start.to(wide), end.to(wide)
    norm = row_norms(start)
    length = torch.where(norm > 0, norm, 1.0).unsqueeze(1)
    direction, upper = start / length, _upper_half(start)
    lower = start - upper
    rest, along = end, torch.zeros_like(length)
    for _ in range(3):
        k = _nearest_half((direction * rest).sum(dim=1, keepdim=True) / length)
        rest = (rest - k * upper) - k * lower
        along = along + k * length
    return norm, along.squeeze(1), row_norms(rest), row_norms(end - start)


def _upper_half(values: Tensor) -> Tensor:
    """The numbers with the lower half of their significand cut off."""
    integer, bits = (torch.int64, 27) if values.dtype == torch.float64 else (torch.int32, 12)
    return (values.contiguous().view(integer) & -(1 << bits)).view(values.dtype)


def _nearest_half(values: Tensor) -> Tensor:
    """The nearest numbers with half of the significand (Dekker 1971)."""
    scaled = values * ((1 << (27 if values.dtype == torch.float64 else 12)) + 1)
    return scaled - (scaled - values)


def _over(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator == 0, torch.zeros_like(numerator), numerator / denominator)


def rotation(before: Tensor, after: Tensor, unit: Unit = "neuron", *, dim: int = 0, groups: int = 1) -> Tensor:
    r"""Rotation of every unit in one step, :math:`\theta_u=\operatorname{atan2}(\lVert\Delta_\perp\rVert, n+r)`.

    With :math:`\Delta` = after − before, :math:`n=\lVert w_u\rVert` before, :math:`r` the part of
    :math:`\Delta` along the unit and :math:`\Delta_\perp` the part across it. For float32 weights right to 1e-6 at any
    angle, also when decay makes the update almost radial.

    Args:
        before: Weight before the step, any shape.
        after: The same weight after the step.
        unit: See :func:`unit_norms`.
        dim: See :func:`unit_norms`.
        groups: See :func:`unit_norms`.

    Returns:
        Shape ``(units,)``, radians in [0, π]. A unit that is zero on either side has no direction: 0.

    Raises:
        ValueError: If ``after`` has another shape than ``before``.

    Examples:
        >>> rotation(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]]))
        tensor([0.7854])

    Reference:
        The rotation of Kosson et al. 2024, "Rotational Equilibrium", https://arxiv.org/abs/2305.17212.
    """
    return measure_step(before, after, unit, dim, groups).angle()


def relative_update(before: Tensor, after: Tensor, unit: Unit = "neuron", *, dim: int = 0, groups: int = 1) -> Tensor:
    r"""Length of the update of every unit over its norm, :math:`\lVert\Delta_u\rVert/\lVert w_u\rVert`.

    Args:
        before: Weight before the step, any shape.
        after: The same weight after the step.
        unit: See :func:`unit_norms`.
        dim: See :func:`unit_norms`.
        groups: See :func:`unit_norms`.

    Returns:
        Shape ``(units,)``, dimensionless, at least 0. A unit that is zero before the step: 0.

    Raises:
        ValueError: If ``after`` has another shape than ``before``.

    Examples:
        >>> relative_update(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 3.5]]))
        tensor([0.1000])

    Reference:
        The relative update of Kosson et al. 2024, https://arxiv.org/abs/2305.17212.
    """
    return measure_step(before, after, unit, dim, groups).relative()


def gradient_alignment(
    weight: Tensor, gradient: Tensor, unit: Unit = "neuron", *, dim: int = 0, groups: int = 1
) -> Tensor:
    r"""Cosine between every unit and its gradient, :math:`|\langle w_u,g_u\rangle|/(\lVert w_u\rVert\lVert g_u\rVert)`.

    Euler's relation: where the loss does not depend on the scale of the unit, weight and gradient are perpendicular
    and this is 0 up to rounding. The reverse does not hold at a single point.

    Args:
        weight: The weight, any shape.
        gradient: Its gradient.
        unit: See :func:`unit_norms`.
        dim: See :func:`unit_norms`.
        groups: See :func:`unit_norms`.

    Returns:
        Shape ``(units,)``, in [0, 1]; 0 where weight or gradient is zero.

    Raises:
        ValueError: If ``gradient`` has another shape than ``weight``.

    Examples:
        >>> gradient_alignment(torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 4.0]]))
        tensor([0.6000])

    Reference:
        van Laarhoven 2017: :math:`\nabla L(\alpha w)=\nabla L(w)/\alpha`, so :math:`\langle w,\nabla L\rangle=0`.
    """
    return align_rows(*paired_rows(weight, gradient, unit, dim, groups, name="gradient"))


def align_rows(weight: Tensor, gradient: Tensor) -> Tensor:
    """Likewise with the units as rows."""
    w, g = (rows.to(accumulator(weight.dtype)) for rows in (weight, gradient))
    w_norm, g_norm = row_norms(w), row_norms(g)
    cosine = (_over(w, w_norm.unsqueeze(1)) * _over(g, g_norm.unsqueeze(1))).sum(dim=1).abs()
    return cosine.clamp(max=1.0)


def effective_lr(lr: float | Tensor, norm: float | Tensor, exponent: int) -> Tensor:
    r"""Learning rate that the direction of a scale-invariant weight sees, :math:`\eta/n^p`.

    A step of a scale-invariant weight turns it by an angle proportional to :math:`\eta/n^p`, so this, and not
    :math:`\eta`, is the learning rate of the function that the network computes. Compare it over time, not between
    layers or optimizers: for that there is the rotation itself, :func:`rotation`.

    Args:
        lr: Learning rate η of the optimizer.
        norm: Norm n before the step: of a unit, or the root mean square over the units of a layer. At least 0.
        exponent: p: 2 for the SGD family, 1 for Adam, AdamW and RMSprop, 0 for optimizers whose step already scales
            with the weight.

    Returns:
        Tensor of the broadcast shape, in the unit of ``lr`` over the unit of the weight to the power p; inf where
        the norm is 0 and p > 0.

    Examples:
        >>> effective_lr(0.1, torch.tensor([1.0, 2.0]), exponent=2)
        tensor([0.1000, 0.0250])

    Reference:
        van Laarhoven 2017, https://arxiv.org/abs/1706.05350: η/‖w‖² for SGD, η/‖w‖ for Adam and RMSprop.
    """
    value = torch.as_tensor(norm)
    rate = lr.to(value.device) if isinstance(lr, Tensor) else lr
    result = torch.ones_like(value) * rate
    for _ in range(exponent):  # one division at a time: the norm's square could overflow
        result = torch.where(value == 0, torch.inf, result / value)
    return result
