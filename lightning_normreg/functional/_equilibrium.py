"""Where weight decay settles a scale-invariant unit: norm and rotation at equilibrium, and the time to get there."""

from __future__ import annotations

import math
from typing import Any

import torch

from lightning_normreg.functional._families import FamilyName
from lightning_normreg.functional._settings import known_number, settled, slow


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
            ``entries`` C of the unit; ``shape`` of the matrix that Muon updates. β is ``momentum`` or ``betas[0]``,
            τ ``dampening``, r ``wd_ratio``.

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
