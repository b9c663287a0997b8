"""The norm equation along a schedule, and the rotation on the way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from lightning_normreg.functional._balance import Balance
from lightning_normreg.functional._families import FamilyName
from lightning_normreg.functional._settings import NOT_NEGATIVE, POSITIVE, balance_of, check, known_number

SETTLED = 40.0
"""E-foldings after which nothing is left of the start in float64."""


def predicted_norm(family: FamilyName, lrs: Sequence[float], *, initial_norm: float, **settings: Any) -> list[float]:
    r"""Norm of a scale-invariant unit after each step of a learning-rate schedule, decay or not.

    Over steps with one learning rate, :math:`N^s` approaches that rate's equilibrium as :math:`e^{-s\kappa t}`; without
    decay :math:`N^{2p}` grows by :math:`p\lVert\Delta\rVert^2SN^{2p-2}` per step, p = 2 for SGD and 1 for Adam. Where κ
    grows with the norm (Adam and RMSprop with L2, LAMB) the equation is integrated. Adafactor's log-norm moves by
    :math:`\tfrac12\ln((1-\eta\lambda)^2+\rho^2)` per step.

    Valid where the norm moves slowly against the optimizer's memory, κS ≪ 1, so not for the first 1/(1−β) steps; a
    momentum that is itself scheduled is not covered. While the gradients grow or shrink, give the next stretch of steps
    its own ``gradient_norm`` and start it from the last norm.

    Args:
        family: Which optimizer, see :func:`equilibrium_norm`.
        lrs: Learning rate of each step, at least 0.
        initial_norm: L2 norm of the unit before the first step.
        **settings: See :func:`equilibrium_norm`, without ``lr``.

    Returns:
        The norm after each step, as many as there are learning rates.

    Raises:
        TypeError: For a setting that the family does not have, or one that it lacks.
        ValueError: For a setting out of its range or one missing where needed.

    Examples:
        >>> warm_up = [0.02, 0.04, 0.06, 0.08] + [0.1] * 1000
        >>> norms = predicted_norm("sgd", warm_up, initial_norm=1.0, weight_decay=5e-4, momentum=0.9, gradient_norm=0.1)
        >>> [round(norms[i], 4) for i in (0, 499, 1003)]
        [1.0001, 1.6071, 1.7216]

    Reference:
        Derived here from the norm equation of :func:`equilibrium_half_life`.
    """
    check("initial_norm", initial_norm, POSITIVE)
    for lr in lrs:
        check("lrs", lr, NOT_NEGATIVE)
    norms: list[float] = []
    norm = float(initial_norm)
    for lr, repeated in groupby(float(lr) for lr in lrs):
        balance = balance_of(family, settings | {"lr": lr}) if lr else None
        for _ in repeated:
            norm = _after_a_step(balance, norm) if balance else norm
            norms.append(known_number(family, norm))
    return norms


def predicted_rotation(family: FamilyName, norm: float, **settings: Any) -> float:
    r"""Angle by which the next step turns a scale-invariant unit of a given norm, in equilibrium or not.

    .. math:: \tan\theta=\frac{x\sqrt{1-f^2}}{q+xf},\qquad x=\lVert\Delta\rVert/N,\quad q=\sqrt{1-2\kappa},

    where :math:`f=x(S-1)/2` is the part of the update along the weight that the momentum's past leaves in it.

    Valid where the norm moves slowly against the optimizer's memory, κS ≪ 1. At the equilibrium norm this is exactly
    :func:`equilibrium_rotation` for decoupled decay, SGDP, AdamP and SGD without momentum. Where decay goes through the
    momentum, what that remembers of it is left out: the angle is then too small by a share of
    :math:`\kappa\beta^2/(1-\beta^2)` to first order, with κ = η(1−τ)λ/(1−β) for ``"sgd"``, which is 0.4 % for β = 0.9
    and ηλ = 1e-4, and 4 % for ηλ = 1e-3; less for ``"nesterov"``, κ/4 less for ``"adam_l2"`` and ``"rmsprop_l2"``. For
    ``"lamb"`` it is too large by κ at most.

    Args:
        family: Which optimizer, see :func:`equilibrium_norm`.
        norm: L2 norm of the unit before the step.
        **settings: See :func:`equilibrium_norm`.

    Returns:
        Radians per step.

    Raises:
        TypeError: For a setting that the family does not have, or one that it lacks.
        ValueError: For a setting out of its range or one missing where needed, and where f is 1 or more: steps so long
            against the norm outrun the momentum's memory, and have no such angle.

    Examples:
        >>> round(predicted_rotation("adam_decoupled", 2.0, lr=1e-3, weight_decay=0.1, entries=400), 6)
        0.002294

    Reference:
        Derived here.
    """
    check("norm", norm, POSITIVE)
    norm = float(norm)
    balance = balance_of(family, settings)
    step = math.sqrt(known_number(family, balance.update_sq)) / norm**balance.exponent
    radial = step * balance.memory
    if radial >= 1:
        raise ValueError(
            f"`norm` must be large against the length of the steps that the momentum remembers, got {norm}, where they "
            f"reach {radial:.2g} times that. Start at a larger norm or with a smaller `lr`."
        )
    shrunk = math.sqrt(max(0.0, 1 - 2 * balance.decay * norm**balance.decay_exponent))
    return math.atan2(step * math.sqrt(1 - radial**2), shrunk + step * radial)


def _after_a_step(balance: Balance, norm: float) -> float:
    power = balance.power
    if power == 0 or balance.decay == 0:  # there is nothing to settle at
        if balance.exponent == 0:
            return norm * math.sqrt(1 - 2 * balance.decay + balance.update_sq * balance.correlation)
        power = 2 * balance.exponent
        growth = balance.exponent * balance.update_sq * balance.correlation
        return float(norm * (1 + growth / norm**power) ** (1 / power))
    settled = balance.norm()
    excess = (norm / settled) ** power - 1
    left = _elapsed(excess, power, balance)
    # (1 + excess·e^−left) with nothing cancelling far below the equilibrium.
    return float(settled * ((norm / settled) ** power * math.exp(-left) - math.expm1(-left)) ** (1 / power))


def _elapsed(excess: float, power: int, balance: Balance) -> float:
    """E-foldings of N^s in one step: its rate, which is proportional to the norm to the power a, over the step."""
    rate = balance.rate()
    if not balance.decay_exponent:
        return rate
    share = balance.decay_exponent / power

    def level(elapsed: float) -> float:
        return (1 + excess) * math.exp(-elapsed) - math.expm1(-elapsed)

    def speed(elapsed: float) -> float:
        return float(rate * level(elapsed) ** share)

    # Midpoint rule, in parts that change N^s by a tenth at most.
    elapsed, remaining = 0.0, 1.0
    while remaining > 0 and elapsed < SETTLED:
        now = level(elapsed)
        part = min(remaining, 0.1 / (speed(elapsed) * max(1.0, abs(now - 1) / now)))
        elapsed += part * speed(elapsed + part * speed(elapsed) / 2)
        remaining -= part
    return elapsed
