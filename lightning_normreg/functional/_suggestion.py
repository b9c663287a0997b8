"""Projection in the place of weight decay: where to project."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from lightning_normreg.functional._families import FamilyName
from lightning_normreg.functional._settings import POSITIVE, check, known_number, settled


class Projection(NamedTuple):
    """Settings of projection.

    Attributes:
        radius: Norm at which to hold each unit.
        lr: Learning rate to use with it, without decay.
    """

    radius: float
    lr: float


def suggest_projection(family: FamilyName, *, radius: float | None = None, **settings: Any) -> Projection:
    r"""Radius, or learning rate, at which projection turns a unit per step as far as decay does at equilibrium.

    Without ``radius``: the equilibrium norm at the same learning rate. With it: :math:`\eta(R/N_*)^p`, p = 2 for the
    SGD family and 1 for the others. To first order in κS, see :func:`equilibrium_half_life`.

    Under projection the rotation is proportional to the learning rate, under slow decay to its square root; so under a
    schedule call this for each learning rate with one radius, which takes the root for you.

    Args:
        family: Which optimizer, see :func:`equilibrium_norm`.
        radius: Norm of the unit under projection, where it is given already.
        **settings: See :func:`equilibrium_norm`.

    Returns:
        Radius and learning rate.

    Raises:
        TypeError: For a setting that the family does not have, or one that it lacks.
        ValueError: For a setting out of its range or one missing where needed, a decay of 0, η·λ of 1 or more, a family
            without equilibrium norm, and for LAMB, whose rotation does not depend on the radius.

    Examples:
        >>> suggestion = suggest_projection("adam_decoupled", lr=1e-3, weight_decay=0.1, entries=400)
        >>> round(suggestion.radius, 4), suggestion.lr
        (1.4136, 0.001)
        >>> round(suggest_projection("adam_decoupled", radius=1.0, lr=1e-3, weight_decay=0.1, entries=400).lr, 6)
        0.000707

    Reference:
        Derived here from :func:`equilibrium_norm`; Kosson et al. 2024, https://arxiv.org/abs/2305.17212, hold the
        rotation itself.
    """
    balance = settled(family, settings)
    if balance.exponent == 0:
        raise ValueError(
            f"`family` {family!r} turns by its learning rate at any radius. Keep `lr`, project as you like."
        )
    norm = known_number(family, balance.norm())
    lr = float(settings["lr"])
    if radius is None:
        return Projection(norm, lr)
    if not 0 < radius < math.inf:
        raise ValueError(f"`radius` must be positive, got {radius}. Leave it out for the equilibrium norm.")
    return Projection(radius, lr * (radius / norm) ** balance.exponent)


def suggest_decay(
    family: FamilyName, *, radius: float, lr: float, decayed_lr: float | None = None, **settings: Any
) -> float:
    r"""Weight decay whose equilibrium turns a unit per step as far as projection to a radius does.

    The inverse of :func:`suggest_projection`: the λ for which :math:`N_*(\eta,\lambda)=R\,(\eta/\eta_R)^{1/p}`, where
    :math:`\eta_R` is the learning rate under projection. Found by bisection of :math:`\log\lambda`, down to rounding.

    Args:
        family: Which optimizer, see :func:`equilibrium_norm`.
        radius: R, norm at which units are held, positive.
        lr: :math:`\eta_R`, positive.
        decayed_lr: η that the recipe with decay is to have; by default ``lr``.
        **settings: See :func:`equilibrium_norm`, without ``lr`` and ``weight_decay``.

    Returns:
        Weight decay λ, positive.

    Raises:
        TypeError: For a setting that the family does not have, or one that it lacks.
        ValueError: For a setting out of its range or one missing where needed, a family without equilibrium norm, LAMB,
            and where no decay with η·λ below 1 leads to that norm.

    Examples:
        >>> round(suggest_decay("adam_decoupled", radius=1.0, lr=0.000707, decayed_lr=1e-3, entries=400), 4)
        0.0999

    Reference:
        Derived here from :func:`equilibrium_norm`.
    """
    rate = lr if decayed_lr is None else decayed_lr
    for name, value in (("radius", radius), ("lr", lr), ("decayed_lr", rate)):
        check(name, value, POSITIVE)
    weak = _WEAKEST / rate
    exponent = settled(family, settings | {"lr": rate, "weight_decay": weak}).exponent
    suggest_projection(family, lr=rate, weight_decay=weak, **settings)  # refuses what has no such recipe
    norm = radius * (rate / lr) ** (1 / exponent)

    def is_weak(decay: float) -> bool:
        try:
            return bool(suggest_projection(family, lr=rate, weight_decay=decay, **settings).radius > norm)
        except ValueError:  # too strong to leave anything of the weight
            return False

    low, high = math.log(weak), -math.log(rate)
    if not is_weak(weak) or is_weak(math.exp(high) * (1 - 1e-12)):
        raise ValueError(
            f"`radius` must be a norm that a decay with {_WEAKEST:g} < lr·weight_decay < 1 settles at, got {radius:g}, "
            f"which stands for {norm:g} at lr {rate:g}. Use another `radius` or `decayed_lr`."
        )
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if is_weak(math.exp(middle)) else (low, middle)
    return math.exp(low)


_WEAKEST = 1e-16
"""Smallest lr·weight_decay that is looked at: below it rounding in float64 outweighs decay."""
