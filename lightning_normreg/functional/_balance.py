"""The balance between decay and updates that sets a norm, and the statistics of filtered gradients behind it.

Those of Muon's update are what Newton–Schulz makes of Gaussian matrices, and of correlated ones. To take its singular
values for 1 and its correlations for those of gradients is simpler, and wrong: with that
``test_random_walk_of_the_real_optimizer[Muon 16 × 64]``, which allows for 0.048, measures 0.877 of the predicted norm,
with this 0.999. For 32 × 32 (``tests/benchmarks/equilibrium_table.py``) it is 0.758 and 1.000; of the rotation, 1.163
and 1.000.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

NODES = 8192
"""Quadrature nodes over the singular values: 20 for each of the highest polynomials."""
ORDERS = 400
"""Odd powers of ρ kept; what is left out weighs less than 0.999^800 of correlations below 0.999."""
Coefficients = tuple[float, float, float]


@dataclass(frozen=True)
class Balance:
    r"""How the norm N of a scale-invariant unit moves: :math:`dN^2/dt = -2\kappa N^2 + \lVert\Delta\rVert^2 S`.

    Three numbers of an optimizer say everything else: the fraction κ of the norm that decay removes per step, the
    length ‖Δ‖ of the update without decay, and the sum S of its autocorrelation over all lags, negative ones too.
    """

    exponent: int  # p, where ‖Δ‖² = U·N^(2−2p)
    decay_exponent: int  # a, where κ = k·N^a: 1 where the optimizer normalizes the decay as well
    decay: float  # k, κ at norm 1, with the terms of higher order that make the equilibrium exact
    update_sq: float  # U, ‖Δ‖² at norm 1; nan where it needs a number that the caller did not give
    correlation: float  # S
    # Cosine between update and weight over −‖Δ‖/N, what past updates leave in the present one; 0 where the optimizer
    # takes the radial part out.
    memory: float
    versine: float  # 1 − cos θ at equilibrium

    @property
    def power(self) -> int:
        """s, the power of the norm that relaxes as an exponential; 0 where no norm is an equilibrium."""
        return 2 * self.exponent + self.decay_exponent

    def norm(self) -> float:
        """Norm at equilibrium, from N^s = U·S/(2k)."""
        return float((self.update_sq * self.correlation / (2 * self.decay)) ** (1 / self.power))

    def rotation(self) -> float:
        """Angle in radians between weights one step apart, at equilibrium."""
        return 2 * math.asin(math.sqrt(self.versine / 2))

    def rate(self) -> float:
        """Rate per step at which N^s approaches its equilibrium, once near it."""
        speed = self.norm() ** self.decay_exponent if self.decay_exponent else 1.0
        return self.power * self.decay * speed


@dataclass(frozen=True)
class Filter:
    """A linear filter of gradients with weights a₀, a₁, a₁β, a₁β², …: every momentum there is."""

    power: float  # Σa², so that white gradients of length 1 give an output of that length squared
    first: float  # ρ₁, correlation of outputs one step apart; ρ_k = ρ₁β^(k−1)
    beta: float

    @classmethod
    def of(cls, newest: float, next_one: float, beta: float) -> Filter:
        tail = next_one**2 / (1 - beta**2)
        power = newest**2 + tail
        return cls(power, (newest * next_one + beta * tail) / power, beta)

    @classmethod
    def average(cls, beta: float, nesterov: bool = False) -> Filter:
        """Exponential moving average of Adam; with a second look at the newest gradient, of NAdam and Muon."""
        if nesterov:
            return cls.of((1 - beta) * (1 + beta), (1 - beta) * beta**2, beta)
        return cls.of(1 - beta, (1 - beta) * beta, beta)

    def correlation(self, shrink: float = 1.0) -> float:
        """1 + 2Σρ_k q^k with q = ``shrink``, over k ≥ 1."""
        return 1 + 2 * self.first * shrink / (1 - self.beta * shrink)


@lru_cache(maxsize=4096)
def sign_correlation(response: Filter, shrink: float) -> float:
    """The same sum for the signs of what the filter gives out: for Gaussian numbers, (2/π)·arcsin ρ_k."""
    # Terms fall with β^k: beyond the last one here they are below 1e-17.
    lags = 1 + math.ceil(-40 / math.log(response.beta)) if response.beta > 0 else 1
    k = torch.arange(lags, dtype=torch.float64)
    terms = torch.asin(response.first * response.beta**k) * shrink ** (k + 1)
    return 1 + 4 / math.pi * float(terms.sum())


@lru_cache(maxsize=256)
def _spectrum(rows: int, columns: int, coefficients: Coefficients, steps: int) -> tuple[float, Tensor]:
    """Mean square singular value of the update, and the share of each odd power of ρ in its correlation.

    Singular values of a Gaussian matrix follow the Marchenko–Pastur law; Newton–Schulz, started from the matrix over
    its Frobenius norm, maps each by a polynomial. The polynomials that are orthogonal under that law, whose recurrence
    has the coefficients 1, y, 1, y, … with y the aspect ratio, are to matrices what Hermite polynomials are to
    numbers: of two Gaussian matrices with correlation ρ, those of degree k have the correlation ρ^k.
    """
    y = rows / columns
    angle = (torch.arange(NODES, dtype=torch.float64) + 0.5) * math.pi / NODES
    squares = 1 + y + 2 * math.sqrt(y) * torch.cos(angle)
    weights = torch.sin(angle) ** 2 / squares
    weights = weights / weights.sum()
    values = squares.sqrt()
    mapped = values / math.sqrt(rows)
    a, b, c = coefficients
    for _ in range(steps):
        mapped = a * mapped + b * mapped**3 + c * mapped**5
    before, now = torch.zeros_like(values), torch.ones_like(values)
    links = (0.0, *(1.0, y) * ORDERS)
    projections = []
    for degree in range(2 * ORDERS - 1):
        last, link = links[degree], links[degree + 1]
        before, now = now, (values * now - math.sqrt(last) * before) / math.sqrt(link)
        if degree % 2 == 0:
            projections.append((weights * mapped * now).sum())
    shares = torch.stack(projections) ** 2
    return float((weights * mapped**2).sum()), shares / shares.sum()


def update_power(shape: tuple[int, int], coefficients: Coefficients, steps: int) -> float:
    """Mean of ‖O‖² over Gaussian matrices of this shape, O being what Newton–Schulz makes of them."""
    rows, columns = sorted(shape)
    return rows * _spectrum(rows, columns, coefficients, steps)[0]


@lru_cache(maxsize=4096)
def update_correlation(
    shape: tuple[int, int], response: Filter, shrink: float, coefficients: Coefficients, steps: int
) -> float:
    """1 + 2Σf(ρ_k)q^k, f(ρ) being the correlation of what Newton–Schulz makes of matrices with correlation ρ."""
    rows, columns = sorted(shape)
    shares = _spectrum(rows, columns, coefficients, steps)[1]
    power = 2 * torch.arange(ORDERS, dtype=torch.float64) + 1
    # f(ρ) = Σ share·ρ^power, and the lags of each power are a geometric series.
    series = shares * response.first**power * shrink / (1 - response.beta**power * shrink)
    return 1 + 2 * float(series.sum())


def decoupled(exponent: int, decay: float, update_sq: float, correlation: float) -> Balance:
    r"""Balance of :math:`w' = qw - u` with :math:`q = 1-\eta\lambda`, exact at any q.

    With :math:`S_q = 1+2\sum_k\rho_kq^k` for ``correlation``: :math:`N^2 = \lVert u\rVert^2S_q/(1-q^2)`, and
    :math:`\langle w',w\rangle` has the past updates in u.
    """
    q = 1 - decay
    memory = (correlation - 1) / (2 * q)
    versine = decay * ((1 + q) - decay * correlation) / (2 * q * correlation)
    return Balance(exponent, 0, decay * (1 + q) / 2, update_sq, correlation, memory, versine)


def projecting(exponent: int, decay: float, update_sq: float) -> Balance:
    """Balance of :math:`w' = qw - u` where u has no part along w: its square simply adds, and cos θ = q."""
    return Balance(exponent, 0, decay * (2 - decay) / 2, update_sq, correlation=1.0, memory=0.0, versine=decay)


def coupled(gap: float, beta: float, shift: float = 0.0) -> tuple[float, float]:
    r"""Weights under coupled decay: :math:`w_{t+1} = \phi_1w_t + \phi_2w_{t-1} + \epsilon_t + m\epsilon_{t-1}`.

    An ARMA(2, 1) process, whose first two autocovariances follow from the Yule–Walker equations, written so that
    nothing cancels where the decay is small. ``gap`` is 1 − φ₁ − φ₂, what decay takes out, ``beta`` −φ₂ and ``shift``
    m. Returned are the noise power over the power of w, and 1 − the correlation of successive w.
    """
    phi = 1 + beta - gap
    below = (1 - beta) / (1 + beta) * gap * (1 + beta + phi)
    above = 1 + shift**2 + 2 * shift * phi / (1 + beta)
    ratio = below / above
    return ratio, (gap - shift * ratio) / (1 + beta)
