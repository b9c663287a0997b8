"""What one optimizer step did to a weight, relative to the weight's own scale."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_normreg.functional._device import accumulator
from lightning_normreg.functional._lengths import Lengths, measure_rows
from lightning_normreg.functional._units import Unit, paired_rows


def _compare(before: Tensor, after: Tensor, unit: Unit, dim: int, groups: int) -> Lengths:
    return measure_rows(*paired_rows(before, after, unit, dim, groups, name="after"))


def rotation(before: Tensor, after: Tensor, unit: Unit = "neuron", *, dim: int = 0, groups: int = 1) -> Tensor:
    r"""Rotation of every unit in one step, :math:`\theta_u=\operatorname{atan2}(\lVert\Delta_\perp\rVert, n+r)`.

    With :math:`\Delta` = after − before, :math:`n=\lVert w_u\rVert` before, :math:`r` the part of
    :math:`\Delta` along the unit and :math:`\Delta_\perp` the part across it. For float32 weights right to 1e-6 at any
    angle, also when decay makes the update almost radial. Differentiable, as :func:`unit_norms` is.

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
    return _compare(before, after, unit, dim, groups).rotation().to(accumulator(before.dtype))


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
    return _compare(before, after, unit, dim, groups).relative().to(accumulator(before.dtype))


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
    rows = paired_rows(weight, gradient, unit, dim, groups, name="gradient")
    return measure_rows(*rows, update=False).cosine().to(accumulator(weight.dtype))


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
