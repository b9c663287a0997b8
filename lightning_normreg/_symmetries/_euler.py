"""Euler's relation: a loss that does not change when w is scaled has ``Σ w·∂L/∂w = 0``, wherever it is taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_normreg._symmetries._call import PrivateCall
from lightning_normreg._symmetries._losses import Gradients, Losses
from lightning_normreg._symmetries._slices import Axis, Table, Tables


@dataclass(frozen=True)
class EulerSums:
    """Sums of ``E = w·∂L/∂w`` of one parameter in one draw, or of several draws stacked in front, on the CPU."""

    tables: Tables  # along each axis
    total: Tensor  # Σ E² over the tensor, shape () or (draws,)
    is_vector: bool  # it has less than two dimensions, and so no units but itself

    @staticmethod
    def stack(draws: list[EulerSums]) -> EulerSums:
        """Put several draws of the same parameter into one."""
        first = draws[0]
        tables = {axis: Table.stack([d.tables[axis] for d in draws]) for axis in draws[-1].tables}
        return EulerSums(tables, torch.stack([d.total for d in draws]), first.is_vector)


class Draw(NamedTuple):
    """What was found at one point."""

    losses: list[float]
    sums: dict[str, EulerSums]
    reaching: dict[str, set[int]]  # numbers of the losses whose gradient counts


def euler_sums(weight: Tensor, gradient: Tensor | None, looked_at: Sequence[Axis]) -> EulerSums:
    """Sum ``E = w·g`` and ``E²`` over the slices along some axes.

    Accumulates in float64, because E cancels. For complex weights E is Re(w̄·g), by torch's convention of gradients.

    Examples:
        >>> from lightning_normreg._symmetries import Axis
        >>> weight = torch.tensor([[3.0, 4.0], [1.0, 1.0]])
        >>> sums = euler_sums(weight, torch.tensor([[4.0, -3.0], [1.0, 1.0]]), [Axis(0)])
        >>> sums.tables[Axis(0)].sums  # the first row's gradient is at a right angle to it
        tensor([0., 2.], dtype=torch.float64)

    Reference:
        Twan van Laarhoven, L2 Regularization versus Batch and Weight Normalization, 2017, arXiv:1706.05350, section 2.
    """
    wide = torch.float64 if weight.device.type != "mps" else torch.float32
    entries = euler_entries(weight, gradient, wide)
    tables = {axis: Table(*(v.cpu() for v in table)) for axis, table in Table.along(entries, looked_at).items()}
    return EulerSums(tables, next(iter(tables.values())).squares.sum(), weight.ndim < 2)


def euler_entries(weight: Tensor, gradient: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``E = w·g`` in a real type; a single number has one dimension."""
    weight = weight.detach()
    if gradient is None:
        entries = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
    else:
        gradient = gradient.detach().to_dense() if gradient.is_sparse else gradient.detach()
        entries = (weight.conj() * gradient).real if weight.is_complex() else weight.to(dtype) * gradient.to(dtype)
    return entries.to(dtype).reshape(1) if entries.ndim == 0 else entries.to(dtype)


def euler_draw(
    call: PrivateCall, point: Mapping[str, Tensor], axes: Mapping[str, Sequence[Axis]], *, seed: int, shrink: float
) -> Draw:
    """One forward and backward pass at ``point``, for each parameter that ``axes`` names.

    Raises:
        ProbeError: If the loss cannot be computed.
    """
    weights = [point[name] for name in axes]

    def backward(losses: Losses) -> tuple[list[float], Gradients, list[set[int]]]:
        gradients = losses.gradients(weights)
        return losses.values(), gradients, losses.reaching(weights)

    values, gradients, reaching = call.run(point, backward, seed=seed, shrink=shrink)
    pairs = zip(axes, weights, gradients, strict=True)
    sums = {name: euler_sums(weight, gradient, axes[name]) for name, weight, gradient in pairs}
    return Draw(values, sums, dict(zip(axes, reaching, strict=True)))


def pooled_statistic(sums: Tensor, squares: Tensor) -> Tensor:
    r"""How far a whole set of units is from scale-invariant, from gradients of training.

    .. math:: T = \frac{1}{K} \sum_k \frac{\sum_u S_{ku}^2}{\sum_u Q_{ku}}, \quad S = \sum E, \; Q = \sum E^2

    S and Q have shape ``(batches, units)``. T is about 1 without invariance, whatever the size of the units, and 0
    where nothing has a gradient.

    Examples:
        >>> pooled_statistic(torch.tensor([[3.0, 0.0]]), torch.tensor([[9.0, 9.0]]))
        tensor(0.5000)
    """
    ratios = sums.square().sum(1) / squares.sum(1).clamp_min(torch.finfo(squares.dtype).tiny)
    return ratios.mean()
