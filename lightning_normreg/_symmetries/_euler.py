"""Euler's relation: a loss that does not change when w is scaled has ``Σ w·∂L/∂w = 0``, wherever it is taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_normreg._symmetries._call import Call
from lightning_normreg._symmetries._losses import Gradients, Losses
from lightning_normreg._symmetries._slices import Axis, Table, Tables


@dataclass(frozen=True)
class EulerSums:
    """Sums of ``E = w·∂L/∂w`` of one parameter in one draw, or of several draws stacked in front, on the CPU."""

    tables: Tables  # along each axis
    total: Tensor  # Σ E² over the tensor, shape () or (draws,)
    is_vector: bool  # it has less than two dimensions, and so no units but itself

    @staticmethod
    def of(tables: Tables, shape: torch.Size) -> EulerSums:
        """Those of a parameter of some shape."""
        return EulerSums(tables, next(iter(tables.values())).squares.sum(), len(shape) < 2)

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
    masked: dict[str, Tensor]  # entries that a mask keeps from the loss, of those that have one
    ones: dict[str, EulerSums]  # sums of (w + 1)·∂L/∂w, where they were asked for


def euler_sums(
    call: Call, weights: Mapping[str, Tensor], gradients: Gradients, axes: Mapping[str, Sequence[Axis]]
) -> dict[str, EulerSums]:
    """Sum ``E = w·g`` and ``E²`` over the slices along some axes, of each weight, over all processes.

    Accumulates in float64, because E cancels. For complex weights E is Re(w̄·g), by torch's convention of gradients.

    Reference:
        Twan van Laarhoven, L2 Regularization versus Batch and Weight Normalization, 2017, arXiv:1706.05350, section 2.
    """
    found = {}
    for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
        entries = euler_entries(weight, gradient, wide(weight))
        found[name] = Table.along(entries, axes[name], call.shards.get(name))
    sums = call.summed(found)
    return {name: EulerSums.of(tables, call.shape(name, weights[name])) for name, tables in sums.items()}


def wide(tensor: Tensor) -> torch.dtype:
    """The widest type of its device."""
    return torch.float64 if tensor.device.type != "mps" else torch.float32


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
    call: Call,
    point: Mapping[str, Tensor],
    axes: Mapping[str, Sequence[Axis]],
    *,
    seed: int,
    shrink: float,
    ones: Sequence[str] = (),
) -> Draw:
    """One forward and backward pass at ``point``, for each parameter that ``axes`` names, and 1 plus those in ``ones``.

    Raises:
        ProbeError: If the loss cannot be computed.
    """
    weights = {name: point[name] for name in axes}

    def backward(losses: Losses) -> tuple[list[float], Gradients, list[set[int]]]:
        tensors = list(weights.values())
        gradients = losses.gradients(tensors)
        return losses.values(), gradients, losses.reaching(tensors)

    values, gradients, reaching = call.run(point, backward, seed=seed, shrink=shrink)
    sums = euler_sums(call, weights, gradients, axes)
    by_name = dict(zip(axes, gradients, strict=True))
    more = euler_sums(call, {n: weights[n] + 1 for n in ones}, tuple(by_name[n] for n in ones), axes)
    silent = {n: g == 0 for n, g in zip(axes, gradients, strict=True) if n in call.masked and g is not None}
    masked = {name: call.masked[name] & zero for name, zero in silent.items()}
    return Draw(values, sums, dict(zip(axes, reaching, strict=True)), masked, more)


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
