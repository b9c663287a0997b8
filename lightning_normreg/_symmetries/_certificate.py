"""Proof of the whole: all accepted units are rescaled at once, each by its own power of two, and the loss must stay.

Floating-point numbers scale by powers of two without any error, so nothing but the rest of eps may change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_normreg._symmetries._call import PrivateCall
from lightning_normreg._symmetries._slices import Axis, scale_slices, unit_of_slice
from lightning_normreg._symmetries._thresholds import Thresholds
from lightning_normreg._weights import ScaleInvariance

ROUNDS = 2
_EXPONENTS = torch.tensor([-3, -2, -1, 1, 2, 3])
"""Several, so that two weights that only move together (q and k) rarely cancel each other."""


@dataclass(frozen=True)
class Accepted:
    """A parameter with scale-invariant units, as the certificate needs it."""

    name: str
    bias: str | None
    verdict: ScaleInvariance
    slices: int


def rescaled(point: Mapping[str, Tensor], accepted: Iterable[Accepted], seed: int) -> dict[str, Tensor]:
    """The point with every unit multiplied by a power of two from 1/8 to 8, but not 1, of its own."""
    generator = torch.Generator().manual_seed(seed)
    result = dict(point)
    for item in accepted:
        units = unit_of_slice(item.verdict, item.slices)
        drawn = torch.randint(len(_EXPONENTS), (int(units.max()) + 1,), generator=generator)
        factors = torch.where(units >= 0, 2.0 ** _EXPONENTS[drawn][units], 1.0)
        for name in (item.name, item.bias):
            if name is not None:
                result[name] = _scale(result[name], factors, item.verdict)
    return result


def _scale(tensor: Tensor, factors: Tensor, verdict: ScaleInvariance) -> Tensor:
    factors = factors.to(tensor.device, tensor.dtype.to_real())
    if verdict.dim is None:
        return tensor * factors[0]
    return scale_slices(tensor, factors, Axis(verdict.dim, verdict.groups))


def certify(
    call: PrivateCall, point: Mapping[str, Tensor], accepted: list[Accepted], limits: Thresholds, *, seed: int
) -> dict[str, float] | None:
    """Find the accepted parameters that do change the loss after all.

    Costs three forward passes when all is well. Otherwise the set is halved until the culprits are alone.

    Args:
        call: Computes the loss.
        point: A generic point that no draw has used.
        accepted: What to rescale.
        limits: With the largest relative change of the loss that counts as none.
        seed: Of the powers of two, and of what the loss draws.

    Returns:
        Name → relative change of the loss, for those that fail by themselves; None where the loss at the point is not
        finite, and so says nothing.
    """
    if not accepted:
        return {}

    def loss_at(where: Mapping[str, Tensor]) -> float:
        leaves = {name: t.detach().requires_grad_(point[name].requires_grad) for name, t in where.items()}
        return call.run(leaves, lambda loss: float(loss.detach()), seed=seed, shrink=limits.shrink)

    base = loss_at(point)
    if not math.isfinite(base):
        return None

    def change(items: list[Accepted]) -> float:
        losses = [loss_at(rescaled(point, items, seed + r)) for r in range(ROUNDS)]
        return max(_relative(loss, base) for loss in losses)

    return _culprits(accepted, change, limits.certificate)


def _culprits(items: list[Accepted], change: Callable[[list[Accepted]], float], limit: float) -> dict[str, float]:
    moved = change(items)
    if moved <= limit:
        return {}
    if len(items) == 1:
        return {items[0].name: moved}
    half = len(items) // 2
    found = {**_culprits(items[:half], change, limit), **_culprits(items[half:], change, limit)}
    # Together they change the loss, but in neither half: then none of them can be told to be innocent.
    return found or {item.name: moved for item in items}


def _relative(loss: float, base: float) -> float:
    if loss == base:
        return 0.0
    change = abs(loss - base) / max(abs(base), torch.finfo(torch.float32).tiny)
    return float("inf") if math.isnan(change) else change
