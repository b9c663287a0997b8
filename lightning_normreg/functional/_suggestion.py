"""Projection in the place of weight decay: where to project."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from lightning_normreg.functional._families import Family
from lightning_normreg.functional._settings import equilibrium_power, known_number, settled


class Projection(NamedTuple):
    """Settings of projection.

    Attributes:
        radius: Norm at which to hold each unit.
        lr: Learning rate to use with it, without decay.
    """

    radius: float
    lr: float


def suggest_projection(family: Family, *, radius: float | None = None, **settings: Any) -> Projection:
    r"""Radius, or learning rate, at which projection turns a unit per step as far as decay does at equilibrium.

    Without ``radius``: the equilibrium norm at the same learning rate. With it: :math:`\eta(R/N_*)^p`, p = 2 for the
    SGD family and 1 for the others. To first order in κS, see :func:`equilibrium_half_life`.

    Under projection the rotation goes with the learning rate, under slow decay with its square root; so under a
    schedule call this for each learning rate with one radius, which takes the root for you.

    Args:
        family: Which optimizer, see :func:`equilibrium_norm`.
        radius: Norm of the unit under projection, where it is given already.
        **settings: See :func:`equilibrium_norm`.

    Returns:
        Radius and learning rate.

    Raises:
        TypeError: For a setting that the family does not have, or one that it lacks.
        ValueError: As :func:`equilibrium_norm`, and for LAMB, whose rotation does not depend on the radius.

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
    equilibrium_power(family, balance)
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
