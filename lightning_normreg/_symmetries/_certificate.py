"""Proof of the whole: all accepted units are rescaled at once, each by its own power of two, and the loss must stay.

Floating-point numbers scale by powers of two without any error, so nothing but the rest of eps may change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_normreg._symmetries._call import Call
from lightning_normreg._symmetries._slices import Axis, unit_of_slice
from lightning_normreg._symmetries._thresholds import Thresholds
from lightning_normreg._weights import ScaleInvariance, Shard
from lightning_normreg.functional._units import over_units

ROUNDS = 2
_EXPONENTS = torch.tensor([-3, -2, -1, 1, 2, 3])
"""Several, so that two weights that only move together (q and k) rarely cancel each other."""


def rescaled(
    call: Call, point: Mapping[str, Tensor], accepted: Mapping[str, ScaleInvariance], seed: int
) -> dict[str, Tensor]:
    """The point with every unit multiplied by a power of two from 1/8 to 8, but not 1, of its own."""
    generator = torch.Generator().manual_seed(seed)
    result = dict(point)
    for name, verdict in accepted.items():
        slices = 1 if verdict.dim is None else call.shape(name, result[name])[verdict.dim] * verdict.groups
        units = unit_of_slice(verdict, slices)
        drawn = torch.randint(len(_EXPONENTS), (int(units.max()) + 1,), generator=generator)
        factors = torch.where(units >= 0, 2.0 ** _EXPONENTS[drawn][units], 1.0)
        for each in (name, verdict.needs_bias):
            if each is not None:
                axis = None if verdict.dim is None else Axis(verdict.dim, verdict.groups)
                result[each] = scaled(result[each], factors, axis, call.shards.get(each))
    return result


def scaled(tensor: Tensor, factors: Tensor, axis: Axis | None, shard: Shard | None) -> Tensor:
    """Multiply each slice by its factor, the whole tensor by the only one where there is no axis."""
    factors = factors.to(tensor.device, tensor.dtype.to_real())
    if axis is None:
        return tensor * factors[0]
    if shard is not None:
        kept, slices = shard.slices(*axis) if len(shard.shape) > 1 else shard.slices(0)
        return tensor * over_units(factors[slices.to(factors.device)], tensor, kept)
    if tensor.ndim < 2:
        return tensor * factors.reshape(tensor.shape)
    view = tensor.reshape(axis.groups, len(tensor) // axis.groups, *tensor.shape[1:])
    return (view * over_units(factors, view, (0, axis.dim + 1))).reshape(tensor.shape)


class Refuted(NamedTuple):
    """What the certificate found."""

    changes: dict[str, float]  # name → relative change of the loss, of the parameters that do change it after all
    steady: bool = True  # False where two calls at the same point differ, so that nothing can be compared


def certify(
    call: Call,
    point: Mapping[str, Tensor],
    accepted: Mapping[str, ScaleInvariance],
    limits: Thresholds,
    *,
    seed: int,
    reaching: Mapping[str, set[int]],
) -> Refuted | None:
    """Rescale the accepted parameters, and find those that change a loss that reaches them.

    Costs a call, and two for each loss, when all is well. Otherwise the finding is repeated, and the set is halved
    until the culprits are alone. The point must be a generic one that no draw has used; None where a loss there is not
    finite, and so says nothing.
    """
    if not accepted:
        return Refuted({})

    def losses_at(where: Mapping[str, Tensor]) -> list[float]:
        leaves = {name: t.detach().requires_grad_(point[name].requires_grad) for name, t in where.items()}
        return call.run(leaves, lambda losses: losses.values(), seed=seed, shrink=limits.shrink)

    base = losses_at(point)
    if call.largest(float(not all(map(math.isfinite, base)))):
        return None

    found: dict[str, float] = {}
    for index in range(len(base)):  # mostly there is only one

        def change(names: list[str], index: int = index) -> float:
            part = {name: accepted[name] for name in names}
            moved = [losses_at(rescaled(call, point, part, seed + r)) for r in range(ROUNDS)]
            return call.largest(max(relative_change(losses, base, index) for losses in moved))

        names = [name for name in accepted if index in reaching[name]]
        if change(names) <= limits.certificate:
            continue
        # Of two changes that differ, or a base that does not come back, one at least is not the weights' doing.
        again = call.largest(relative_change(losses_at(point), base, index))
        if again > limits.certificate or change(names) <= limits.certificate:
            return Refuted({}, steady=False)
        found |= _culprits(names, change, limits.certificate)
    return Refuted(found)


def moving(
    call: Call, point: Mapping[str, Tensor], other: Mapping[str, Tensor], names: list[str], *, shrink: float
) -> set[str]:
    """Those of some parameters that change a loss when they are as at another point; roundoff is no change."""

    def losses_at(where: Mapping[str, Tensor]) -> list[float]:
        leaves = {name: t.detach().requires_grad_(point[name].requires_grad) for name, t in where.items()}
        return call.run(leaves, lambda losses: losses.values(), seed=0, shrink=shrink)

    base = losses_at(point)

    def change(names: list[str]) -> float:
        moved = losses_at({**point, **{name: other[name] for name in names}})
        return call.largest(max(relative_change(moved, base, index) for index in range(len(base))))

    return set(_culprits(names, change, 1e3 * torch.finfo(call.dtype).eps)) if names else set()


def _culprits(names: list[str], change: Callable[[list[str]], float], limit: float) -> dict[str, float]:
    moved = change(names)
    if moved <= limit:
        return {}
    found = {}
    if len(names) > 1:
        half = len(names) // 2
        found = {**_culprits(names[:half], change, limit), **_culprits(names[half:], change, limit)}
    # Together they change the loss, but in neither half: then none of them can be told to be innocent.
    return found or dict.fromkeys(names, moved)


def relative_change(losses: list[float], base: list[float], index: int) -> float:
    """Relative change of one of the losses; infinite where there are more or fewer of them."""
    if len(losses) != len(base):
        return float("inf")
    if losses[index] == base[index]:
        return 0.0
    change = abs(losses[index] - base[index]) / max(abs(base[index]), torch.finfo(torch.float32).tiny)
    return float("inf") if math.isnan(change) else change
