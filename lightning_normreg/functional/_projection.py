"""Putting units on a sphere, in place."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from lightning_normreg.functional._device import accumulator, is_wrapped
from lightning_normreg.functional._norms import CHUNKS, row_norms
from lightning_normreg.functional._units import Unit, over_units, split_units, unit_rows

_Function = TypeVar("_Function", bound=Callable[..., Tensor])


def dead_band(dtype: torch.dtype, entries: int) -> float:
    r"""Relative distance from the radius within which a unit counts as being on it.

    Projecting rounds each of the m entries and the factor, each time by at most ε/2, evenly spread: a variance of
    ε²/12 each. The norm is measured twice, to project and to see that it is done. Each time a root is taken (ε²/12),
    and sums of 256 squares have some 36 roundings in a row, of which the root keeps half: at most 3/4 ε², and that only
    where one entry outweighs all others. In float64 it is chunks of 64, with half of that, and as much again for each
    factor of 64 in m; in float32 chunks are added in float64. Five standard deviations of it all,

    .. math:: 5\,\epsilon\sqrt{1/3 + 3/2},\qquad 5\,\epsilon\sqrt{1/3 + 3/4\,\lceil\log_{64} m\rceil}\text{ in float64},

    are 8.1e-7 for a float32 row. Anything closer to the radius than this cannot be told from a projected unit, so it is
    left alone: a projected weight is projected again without changing a bit. (Rows can be made, of one entry and equal
    dust, in which all roundings agree and which settle only the second time.) A type narrower than the accumulator adds
    the ε_w/2 by which it rounds the entries.
    """
    kept = accumulator(dtype)
    levels = max(1, math.ceil(math.log(max(entries, 1), CHUNKS[kept])))
    sums = 3 / 2 if kept == torch.float32 else 3 / 4 * levels
    rounded, eps = torch.finfo(dtype).eps, torch.finfo(kept).eps
    return (rounded / 2 if rounded > eps else 0.0) + 5 * math.sqrt(1 / 3 + sums) * eps


class Limits(NamedTuple):
    """What the type of a weight allows, for units of some length; numbers, or tensors with one for each unit."""

    band: float | Tensor  # see dead_band
    shortest: float | Tensor  # radius at which entries, R/√m in the root mean square, begin to be subnormal
    longest: float | Tensor  # radius above which the entry that is all of a unit would overflow
    tiny: float | Tensor  # smallest factor, and smallest norm from which a unit can be moved
    huge: float | Tensor  # largest factor

    @classmethod
    def of(cls, dtype: torch.dtype, entries: int) -> Limits:
        """Those of units of so many entries."""
        info, kept = torch.finfo(dtype), torch.finfo(accumulator(dtype))
        longest = info.max * (1 - 4 * kept.eps)
        return cls(dead_band(dtype, entries), info.tiny * math.sqrt(entries), longest, kept.tiny, kept.max)

    def hold(self, radius: float | Tensor) -> Any:
        """Whether units can be at a radius."""
        return (radius >= self.shortest) & (radius <= self.longest)


def writes(function: _Function) -> _Function:
    """Write without autograd, and refuse a first argument through which it would have given a wrong gradient."""

    @wraps(function)
    def writing(weight: Tensor, *args: Any, **kwargs: Any) -> Any:
        base = weight._base if weight._base is not None else weight
        if torch.is_grad_enabled() and base.requires_grad and (is_wrapped(weight) or not base.is_leaf):
            raise ValueError(
                f"`weight` must be a parameter, or need no gradient: autograd would not see what {function.__name__} "
                "writes. Write under torch.no_grad(), or compute with `unit_norms`, which has a gradient."
            )
        with torch.no_grad():
            return function(weight, *args, **kwargs)

    return writing  # type: ignore[return-value]


@writes
def project_(
    weight: Tensor, radius: float | Tensor = 1.0, unit: Unit = "neuron", *, dim: int = 0, groups: int = 1
) -> Tensor:
    r"""Put every unit of a weight at a norm, in place: :math:`w_u \leftarrow R\,w_u/\lVert w_u\rVert`.

    Like an optimizer's step it is not seen by autograd, and a parameter stays one. For a penalty or a
    parametrization compute with :func:`unit_norms`, which has a gradient.

    A unit already at the radius (to a few units in the last place, :func:`dead_band`) keeps every bit. A zero unit
    stays zero, a unit with infinite or NaN entries is left as it is, and so is one whose quotient ‖w_u‖/R or whose
    entries at the radius the type cannot hold: a finite weight never becomes non-finite, nor zero.

    Args:
        weight: Tensor of any shape; written in place.
        radius: Target norm R > 0: one number, or one for each unit with shape ``(units,)``.
        unit: See :func:`unit_norms`.
        dim: See :func:`unit_norms`.
        groups: See :func:`unit_norms`.

    Returns:
        The norms before the projection, shape ``(units,)``.

    Raises:
        ValueError: If ``radius`` is a number that is not positive and finite, or a gradient is to flow through
            ``weight``.

    Examples:
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
    scale_(view, kept, factors(norms, radius, Limits.of(weight.dtype, rows.shape[1])))
    return norms.to(accumulator(weight.dtype))


def factors(norms: Tensor, radius: float | Tensor, limits: Limits) -> Tensor:
    """What each unit is to be multiplied by to come to the radius; 1 where it is there, or cannot come there."""
    target = radius.to(norms) if isinstance(radius, Tensor) else radius
    factor = target / torch.where(norms > 0, norms, 1.0)
    possible = norms.isfinite() & (norms >= limits.tiny) & (factor >= limits.tiny) & (factor <= limits.huge)
    return torch.where(possible & limits.hold(target) & ((norms / target - 1).abs() > limits.band), factor, 1.0)


def scale_(view: Tensor, kept: tuple[int, ...], values: Tensor) -> None:
    """Multiply each unit in the view of :func:`split_units` by its value, in place."""
    # In the type of the sums: another would make temporaries.
    view.mul_(over_units(values.to(accumulator(view.dtype)), view, kept))


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

    Examples:
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
