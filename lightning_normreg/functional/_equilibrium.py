"""Where weight decay settles a scale-invariant unit, the time to get there, and the projection that does the same."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from lightning_normreg.functional._families import FamilyName
from lightning_normreg.functional._settings import POSITIVE, check, known_number, settled, slow


def equilibrium_norm(family: FamilyName, **settings: Any) -> float:
    r"""Norm of a scale-invariant unit where decay and updates balance, :math:`N^2=\lVert\Delta\rVert^2S/(2\kappa)`.

    To first order in ηλ, with the settings of each family besides ``lr`` and ``weight_decay``:

    * ``"sgd"``: N⁴ = η(1−τ)G²/(2λ(1−β)); ``gradient_norm``, ``momentum=0``, ``dampening=0``
    * ``"nesterov"``, SGD with Nesterov momentum: N⁴ = ηG²/(2λ(1−β)); ``gradient_norm``, ``momentum=0.9``
    * ``"adam_l2"``, Adam: N³ = η√C·G/(2λ); ``gradient_norm``, ``entries``, ``betas=(0.9, 0.999)``
    * ``"rmsprop_l2"``, RMSprop: N³ = η√C·G/(2λ(1−β)); ``gradient_norm``, ``entries``, ``momentum=0``
    * ``"adam_decoupled"``, AdamW, AMSGrad and RAdam with decoupled decay: N² = ηC/(2λ); ``entries``,
      ``betas=(0.9, 0.999)``
    * ``"nadam_decoupled"``, NAdam with decoupled decay once its μ_t has settled: as AdamW
    * ``"lion"``: N² = ηCS/(2λ); ``entries``, ``betas=(0.9, 0.99)``
    * ``"muon"``, torch's: N² = ηa²QS/(2λ) with a of ``adjust_lr_fn`` and Q the mean square norm of what Newton–Schulz
      gives; ``shape``, ``momentum=0.95``, ``nesterov=True``, ``ns_coefficients``, ``ns_steps=5``, ``adjust_lr_fn=None``
    * ``"sgdp"``, SGDP without Nesterov while it projects: N⁴ = η(1−τ)²G²/(2λr(1+β)); ``gradient_norm``,
      ``momentum=0``, ``dampening=0``, ``wd_ratio=0.1``
    * ``"adamp"``, AdamP if it projects: N² = ηC(1−β)/(2λr(1+β)); ``entries``, ``betas=(0.9, 0.999)``, ``wd_ratio=0.1``
    * ``"lamb"`` with the decay inside its trust ratio, below its clamp: N = ηS√(C(1−β)/(1+β))/(2λ); ``entries``,
      ``betas=(0.9, 0.999)``
    * ``"adafactor"``, torch's: none, its log drifts

    The number returned has the higher terms too: SGD's is :math:`N^4=\eta G^2/(\lambda(2-\eta\lambda))`, and that of a
    decoupled decay :math:`N^2=\lVert\Delta\rVert^2S_q/(1-q^2)`, where :math:`q=1-\eta\lambda`,
    :math:`S_q=1+2\sum_k\rho_kq^k`.

    Valid where gradients are perpendicular to the unit and independent from step to step (with a signal in them, expect
    ±15 %, for Muon ±35 %), eps is negligible and the second moment, where there is one, is an average over many steps
    in which the norm hardly moves. Muon: for gradients with independent Gaussian entries.

    Args:
        family: Which optimizer, see the table.
        **settings: Settings of that optimizer, called as in torch, and of the unit: ``lr`` η, ``weight_decay`` λ;
            ``gradient_norm`` G, the root mean square of ‖gradient‖·‖w‖, that is the norm of the gradient at norm 1;
            ``entries`` C of the unit; ``shape`` of the matrix that Muon updates, or the shapes of all in a set. β is
            ``momentum`` or ``betas[0]``, τ ``dampening``, r ``wd_ratio``.

    Returns:
        L2 norm of the unit, positive.

    Raises:
        TypeError: For a setting that the family does not have, or one that it lacks.
        ValueError: For a setting out of its range, ``gradient_norm`` or ``entries`` missing where needed, a decay of 0,
            η·λ of 1 or more, or a family that has no equilibrium norm.

    Examples:
        >>> round(equilibrium_norm("sgd", lr=0.1, weight_decay=5e-4, momentum=0.9, gradient_norm=0.1), 4)
        1.7783
        >>> round(equilibrium_norm("adam_decoupled", lr=1e-3, weight_decay=0.1, entries=400), 4)
        1.4136

    Reference:
        van Laarhoven 2017, https://arxiv.org/abs/1706.05350 (SGD); Kosson et al. 2024, https://arxiv.org/abs/2305.17212,
        table 1 (momentum, AdamW, Lion to first order). The sum over lags, the other families and the higher terms are
        derived here, and measured against the optimizers by ``tests/benchmarks/equilibrium_table.py``.
    """
    return known_number(family, settled(family, settings).norm())


def equilibrium_rotation(family: FamilyName, **settings: Any) -> float:
    r"""Angle by which a scale-invariant unit turns per step at equilibrium, about :math:`\theta=\sqrt{2\kappa/S}`.

    * ``"sgd"``: √(2η(1−τ)λ/(1+β)), exactly cos θ = 1 − η(1−τ)λ/(1+β), so cos θ = 1 − ηλ without momentum
    * ``"nesterov"``: √(2ηλ(1+2β−2β³)/(1+β))
    * ``"adam_l2"``: √((1−β)/(1+β))·(2η²λC/G)^(1/3)
    * ``"rmsprop_l2"``: η√(C/(1−β²))/N
    * ``"adam_decoupled"``: √(2ηλ(1−β)/(1+β))
    * ``"nadam_decoupled"``: √(2ηλ(1−β)(1+2β−2β³)/(1+β))
    * ``"lion"``: √(2ηλ/S), S = 1 + 2Σ(2/π)·arcsin ρ_k with ρ_k of its filter (1−β₁), β₁(1−β₂)β₂^(k−1)
    * ``"muon"``: √(2ηλ/S), S = 1 + 2Σf(ρ_k), f(ρ) the correlation that Newton–Schulz leaves of ρ
    * ``"sgdp"``, ``"adamp"``: exactly cos θ = 1 − κ, where κ = ηλr/(1−β) and ηλr
    * ``"lamb"``: 2·arcsin(η/2)
    * ``"adafactor"``: tan θ = ρ/(1−ηλ), at any norm

    The number returned has the higher terms too: for a decoupled decay
    :math:`1-\cos\theta=(1-q)\,[(1+q)-(1-q)S_q]/(2qS_q)`.

    Args:
        family: Which optimizer, see :func:`equilibrium_norm`.
        **settings: See :func:`equilibrium_norm`; ``gradient_norm`` and ``entries`` are needed for ``"adam_l2"`` and
            ``"rmsprop_l2"`` alone. ``relative_step`` is Adafactor's min(lr, 1/√t), by default lr.

    Returns:
        Radians per step, between the weights before and after.

    Raises:
        TypeError: For a setting that the family does not have, or one that it lacks.
        ValueError: For a setting out of its range, one missing where needed, a decay of 0, or η·λ of 1 or more.

    Examples:
        >>> round(equilibrium_rotation("sgd", lr=0.1, weight_decay=5e-4, momentum=0.9), 6)
        0.007255
        >>> round(equilibrium_rotation("adam_decoupled", lr=1e-3, weight_decay=0.1), 6)
        0.003245
        >>> round(equilibrium_rotation("lion", lr=1e-4, weight_decay=1.0), 6)
        0.002095

    Reference:
        Kosson et al. 2024, https://arxiv.org/abs/2305.17212, table 1, for SGD with momentum, AdamW and Lion to first
        order; Wan et al. 2021, https://arxiv.org/abs/2006.08419, for SGD. The rest is derived here, see
        :func:`equilibrium_norm`.
    """
    return known_number(family, settled(family, settings, norm=False).rotation())


def equilibrium_half_life(family: FamilyName, *, initial_norm: float | None = None, **settings: Any) -> float:
    r"""Steps in which :math:`N^s` comes half-way to its equilibrium: :math:`\ln 2/(s\kappa)`.

    s is 4 for the SGD family, 2 for decoupled decay, 3 for Adam and RMSprop with L2, 1 for LAMB. For Adam and RMSprop
    with L2 and for LAMB, κ grows with the norm, so the time depends on where one starts:
    :math:`\int_0^{\ln 2}d\zeta/(s\kappa(N(\zeta)))` with :math:`N^s-N_*^s\propto e^{-\zeta}`.

    Valid where the norm moves slowly against the optimizer's memory, κS ≪ 1. From below, optimizers with a second
    moment take longer while it forgets the larger gradients.

    Args:
        family: Which optimizer, see :func:`equilibrium_norm`.
        initial_norm: Norm at the start; by default one near the equilibrium. Without effect where κ does not depend on
            the norm.
        **settings: See :func:`equilibrium_norm`; ``gradient_norm`` and ``entries`` are needed for ``"adam_l2"`` and
            ``"rmsprop_l2"``, ``entries`` for ``"lamb"``.

    Returns:
        Steps, as a float.

    Raises:
        TypeError: For a setting that the family does not have, or one that it lacks.
        ValueError: For a setting out of its range or one missing where needed, a decay of 0, η·λ of 1 or more, a family
            without equilibrium norm, and where κS is 1 or more: the norm follows the momentum's memory then.

    Examples:
        >>> round(equilibrium_half_life("sgd", lr=0.1, weight_decay=5e-4, momentum=0.9))
        347
        >>> round(equilibrium_half_life("adam_decoupled", lr=1e-3, weight_decay=0.1))
        3466

    Reference:
        Derived here from :math:`dN^2/dt=-2\kappa N^2+\lVert\Delta\rVert^2S`. Wang and Aitchison 2024,
        https://arxiv.org/abs/2405.13698, have 1/(ηλ) for AdamW, twice the e-folding time of N².
    """
    balance = settled(family, settings)
    if not balance.decay_exponent:
        return slow(balance, math.log(2) / balance.rate())
    norm, power = known_number(family, balance.norm()), balance.power
    excess = (initial_norm / norm) ** power - 1 if initial_norm is not None else 0.0
    zeta = torch.linspace(0, math.log(2), 257, dtype=torch.float64)
    slowness = (1 + excess * torch.exp(-zeta)) ** (-balance.decay_exponent / power)
    return slow(balance, float(torch.trapezoid(slowness, zeta)) / balance.rate())


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
    check("radius", radius, POSITIVE)
    return Projection(radius, lr * (radius / norm) ** balance.exponent)


def suggest_decay(
    family: FamilyName,
    *,
    lr: float,
    radius: float | None = None,
    rotation: float | None = None,
    decayed_lr: float | None = None,
    **settings: Any,
) -> float:
    r"""Weight decay whose equilibrium turns a unit per step as far as projection to a radius does, or by an angle.

    With ``radius`` the inverse of :func:`suggest_projection`: the λ for which
    :math:`N_*(\eta,\lambda)=R\,(\eta/\eta_R)^{1/p}`, where :math:`\eta_R` is the learning rate under projection. With
    ``rotation`` that of :func:`equilibrium_rotation`. Found by bisection of :math:`\log\lambda`, down to rounding.

    Args:
        family: Which optimizer, see :func:`equilibrium_norm`.
        lr: :math:`\eta_R`, positive; with ``rotation`` the learning rate that the recipe with decay has.
        radius: R, norm at which units are held, positive.
        rotation: Angle per step, in radians, in place of the radius.
        decayed_lr: η that the recipe with decay is to have; by default ``lr``.
        **settings: See :func:`equilibrium_norm`, without ``lr`` and ``weight_decay``.

    Returns:
        Weight decay λ, positive.

    Raises:
        TypeError: For a setting that the family does not have, or one that it lacks, and unless one of ``radius`` and
            ``rotation`` is given.
        ValueError: For a setting out of its range or one missing where needed, a family without equilibrium norm, LAMB,
            and where no decay with η·λ below 1 leads to that norm or angle.

    Examples:
        >>> round(suggest_decay("adam_decoupled", radius=1.0, lr=0.000707, decayed_lr=1e-3, entries=400), 4)
        0.0999
        >>> round(suggest_decay("adam_decoupled", rotation=0.003245, lr=1e-3), 4)
        0.1

    Reference:
        Derived here from :func:`equilibrium_norm`.
    """
    if (radius is None) == (rotation is None):
        raise TypeError("`radius` or `rotation` must be given, and not both.")
    rate = lr if decayed_lr is None else decayed_lr
    wanted = ("radius", radius) if rotation is None else ("rotation", rotation)
    for name, value in (wanted, ("lr", lr), ("decayed_lr", rate)):
        check(name, 0.0 if value is None else value, POSITIVE)
    weak = _WEAKEST / rate
    exponent = settled(family, settings | {"lr": rate, "weight_decay": weak}, norm=rotation is None).exponent
    if radius is not None:
        suggest_projection(family, lr=rate, weight_decay=weak, **settings)  # refuses what has no such recipe
        norm = radius * (rate / lr) ** (1 / exponent)

    def is_weak(decay: float) -> bool:
        try:
            if rotation is not None:
                return equilibrium_rotation(family, lr=rate, weight_decay=decay, **settings) < rotation
            return bool(suggest_projection(family, lr=rate, weight_decay=decay, **settings).radius > norm)
        except ValueError:  # too strong to leave anything of the weight
            return False

    low, high = math.log(weak), -math.log(rate)
    if not is_weak(weak) or is_weak(math.exp(high) * (1 - 1e-12)):
        kind, stands = ("a norm", f", which stands for {norm:g}") if rotation is None else ("an angle", "")
        raise ValueError(
            f"`{wanted[0]}` must be {kind} that a decay with {_WEAKEST:g} < lr·weight_decay < 1 settles at, got "
            f"{wanted[1]:g}{stands} at lr {rate:g}. Use another `{wanted[0]}` or `decayed_lr`."
        )
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if is_weak(math.exp(middle)) else (low, middle)
    return math.exp(low)


_WEAKEST = 1e-16
"""Smallest lr·weight_decay that is looked at: below it rounding in float64 outweighs decay."""
