"""What one optimizer step did to a weight, relative to the weight's own scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_normreg.functional._norms import accumulator, row_norms
from lightning_normreg.functional._units import Unit, split_units, unit_rows


@dataclass(frozen=True)
class Step:
    """One step of every unit, in its own polar coordinates, each of shape ``(units,)``.

    Attributes:
        norm: Norm before the step, n.
        radial: Signed length of the update along the unit, r.
        tangential: Length of the update across the unit, t.
        update: Length of the update, √(r² + t²).
    """

    norm: Tensor
    radial: Tensor
    tangential: Tensor
    update: Tensor

    def angle(self) -> Tensor:
        """Rotation in radians, atan2(t, n + r); 0 for a unit that is zero before or after the step."""
        moved = torch.atan2(self.tangential, self.norm + self.radial)
        return torch.where((self.norm == 0) | (self._after() == 0), torch.zeros_like(moved), moved)

    def relative(self) -> Tensor:
        """Length of the update over the norm before it; 0 for a zero unit."""
        return _over(self.update, self.norm)

    def _after(self) -> Tensor:
        return torch.hypot(self.tangential, self.norm + self.radial)


def measure_step(before: Tensor, after: Tensor, unit: Unit, dim: int, groups: int) -> Step:
    """Split the update of every unit into the part along it and the part across it.

    The difference of two close floats is exact, and the tangential part is formed entry by entry, so both keep their
    digits at any angle: acos has none left below 3e-4 in float32, and subtracting squares loses them when decay
    makes the update almost radial.
    """
    wide = accumulator(before.dtype)
    start, end = (unit_rows(*split_units(w, unit, dim, groups)).to(wide) for w in (before, after))
    norm, delta = row_norms(start), end - start
    direction = start / torch.where(norm > 0, norm, 1.0).unsqueeze(1)
    update = row_norms(delta)
    radial = (direction * delta).sum(dim=1)
    tangential = row_norms(delta.addcmul_(direction, radial.unsqueeze(1), value=-1))
    return Step(norm, radial, tangential, update)


def _over(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator == 0, torch.zeros_like(numerator), numerator / denominator)


def angular_update(before: Tensor, after: Tensor, unit: Unit = "neuron", *, dim: int = 0, groups: int = 1) -> Tensor:
    r"""Rotation of every unit in one step, :math:`\theta_u=\operatorname{atan2}(\lVert\Delta_\perp\rVert, n+r)`.

    With :math:`\Delta` = after − before, :math:`n=\lVert w_u\rVert` before, :math:`r` the part of
    :math:`\Delta` along the unit and :math:`\Delta_\perp` the part across it. In float32 right to 1e-6 relative at any
    angle.

    Args:
        before: Weight before the step, any shape.
        after: The same weight after the step.
        unit: See :func:`unit_norms`.
        dim: See :func:`unit_norms`.
        groups: See :func:`unit_norms`.

    Returns:
        Shape ``(units,)``, radians in [0, π]. A unit that is zero on either side has no direction: 0.

    Example:
        >>> angular_update(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]]))
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

    Example:
        >>> relative_update(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 3.5]]))
        tensor([0.1000])

    Reference:
        The relative update of Kosson et al. 2024, https://arxiv.org/abs/2305.17212.
    """
    step = measure_step(before, after, unit, dim, groups)
    return step.relative()


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

    Example:
        >>> gradient_alignment(torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 4.0]]))
        tensor([0.6000])

    Reference:
        van Laarhoven 2017: :math:`\nabla L(\alpha w)=\nabla L(w)/\alpha`, so :math:`\langle w,\nabla L\rangle=0`.
    """
    wide = accumulator(weight.dtype)
    w, g = (unit_rows(*split_units(t, unit, dim, groups)).to(wide) for t in (weight, gradient))
    w_norm, g_norm = row_norms(w), row_norms(g)
    cosine = (_over(w, w_norm.unsqueeze(1)) * _over(g, g_norm.unsqueeze(1))).sum(dim=1).abs()
    return cosine.clamp(max=1.0)


def effective_lr(lr: float | Tensor, norm: float | Tensor, exponent: int) -> Tensor:
    r"""Learning rate that the direction of a scale-invariant weight sees, :math:`\eta/n^p`.

    A step of a scale-invariant weight turns it by an angle proportional to :math:`\eta/n^p`, so this, and not
    :math:`\eta`, is the learning rate of the function that the network computes. Compare it over time, not between
    layers or optimizers: for that there is the rotation itself, :func:`angular_update`.

    Args:
        lr: Learning rate η of the optimizer.
        norm: Norm n before the step: of a unit, or the root mean square over the units of a layer. At least 0.
        exponent: p: 2 for the SGD family, 1 for Adam, AdamW and RMSprop, 0 for optimizers whose step already scales
            with the weight.

    Returns:
        Tensor of the broadcast shape, in the unit of ``lr`` over the unit of the weight to the power p; inf where
        the norm is 0 and p > 0.

    Example:
        >>> effective_lr(0.1, torch.tensor([1.0, 2.0]), exponent=2)
        tensor([0.1000, 0.0250])

    Reference:
        van Laarhoven 2017, https://arxiv.org/abs/1706.05350: η/‖w‖² for SGD, η/‖w‖ for Adam and RMSprop.
    """
    value = torch.as_tensor(norm)
    rate = lr.to(value.device) if isinstance(lr, Tensor) else lr
    result = torch.ones_like(value) * rate
    for _ in range(exponent):  # one division at a time: the norm's square could overflow
        result = result / value
    return result
