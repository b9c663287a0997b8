"""Families of optimizers: the equation of each, which makes its balance, and what it takes. Settings are torch's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from lightning_normreg.functional import _balance
from lightning_normreg.functional._balance import Balance, Filter, coupled, decoupled, projecting

FamilyName = Literal[
    "sgd",
    "nesterov",
    "adam_l2",
    "adam_decoupled",
    "nadam_decoupled",
    "rmsprop_l2",
    "lion",
    "muon",
    "sgdp",
    "adamp",
    "lamb",
    "adafactor",
]
Betas = tuple[float, float]
UNKNOWN = math.nan
"""Default of the two numbers that only some of the results need."""


@dataclass(frozen=True)
class Family:
    """Optimizers that one equation describes."""

    name: FamilyName
    equation: Callable[..., Balance]  # makes the balance of all the settings
    defaults: Mapping[str, Any]  # settings that may be left out, with torch's values
    required: tuple[str, ...] = ("lr", "weight_decay")  # settings that may not
    tolerance: float = 0.15  # distance from the prediction, relative, at which networks that learn are at equilibrium
    settles: bool = True  # whether the norm has an equilibrium; if not, its log drifts
    turns_matrix: bool = False  # whether a step turns the matrix as a whole, and not each of its units

    @property
    def settings(self) -> tuple[str, ...]:
        return (*self.required, *self.defaults)

    def balance(self, settings: Mapping[str, Any]) -> Balance:
        """The balance with some settings, and the defaults of the others."""
        return self.equation(**{**self.defaults, **settings})


def _sgd(lr: float, weight_decay: float, gradient_norm: float, momentum: float, dampening: float) -> Balance:
    gain = lr * (1 - dampening) if momentum else lr  # torch dampens nothing without momentum
    ratio, versine = coupled(gap=gain * weight_decay, beta=momentum)
    return _sgd_balance(gain * gradient_norm, ratio, Filter.of(1.0, momentum, momentum), versine)


def _nesterov(lr: float, weight_decay: float, gradient_norm: float, momentum: float) -> Balance:
    shrunk = momentum * (1 - lr * weight_decay)
    ratio, versine = coupled(lr * weight_decay, beta=shrunk, shift=-momentum / (1 + momentum))
    noise = (1 + momentum) ** 2
    return _sgd_balance(lr * gradient_norm, ratio / noise, Filter.of(1 + momentum, momentum**2, momentum), versine)


def _sgd_balance(step: float, ratio: float, response: Filter, versine: float) -> Balance:
    """Balance of w under gradients of length ``step`` at norm 1, where w² = gradient² / ``ratio``."""
    correlation = response.correlation()
    decay = response.power * correlation * ratio / 2
    update_sq = step**2 * response.power
    return Balance(2, 0, decay, update_sq, correlation, (correlation - 1) / 2, versine)


def _adam_l2(lr: float, weight_decay: float, gradient_norm: float, entries: float, betas: Betas) -> Balance:
    return _normalized_l2(lr, weight_decay, gradient_norm, entries, beta=betas[0], gain=1 - betas[0])


def _rmsprop_l2(lr: float, weight_decay: float, gradient_norm: float, entries: float, momentum: float) -> Balance:
    return _normalized_l2(lr, weight_decay, gradient_norm, entries, beta=momentum, gain=1.0)


def _normalized_l2(lr: float, decay: float, gradient: float, entries: float, *, beta: float, gain: float) -> Balance:
    """Heavy ball whose gradient and decay are both divided by σ = √(((G/N)² + (λN)²)/C)."""
    # x = ηλ/σ solves x²(1 + ψ) = b√ψ, where ψ = (λN²/G)² follows from the weights' variance under heavy ball.
    b = lr**2 * decay * entries / gradient
    x = (b**2 / 2) ** (1 / 3)
    if x >= 1:
        raise ValueError(_too_strong("lr²·weight_decay·entries/gradient_norm", b))
    for _ in range(100):  # each brings x closer by a third at least
        psi = _share_of_decay(x, beta, gain)
        x = (b * math.sqrt(psi / x) / (1 + psi)) ** (2 / 3) if x > 0 else x
    response = Filter.of(gain, gain * beta, beta)
    correlation = response.correlation()
    update_sq = lr**2 * entries * response.power
    norm = (_share_of_decay(x, beta, gain) * gradient**2 / decay**2) ** 0.25 if decay else math.inf
    strength = update_sq * correlation / (2 * norm**3)
    return Balance(1, 1, strength, update_sq, correlation, (correlation - 1) / 2, gain * x / (1 + beta))


def _share_of_decay(x: float, beta: float, gain: float) -> float:
    return x * gain * (1 + beta) / ((1 - beta) * (2 * (1 + beta) - gain * x))


def _averaged(lr: float, weight_decay: float, entries: float, betas: Betas, *, nesterov: bool) -> Balance:
    """Decoupled decay, and averages of normalized gradients."""
    response = Filter.average(betas[0], nesterov)
    correlation = response.correlation(1 - lr * weight_decay)
    return decoupled(1, lr * weight_decay, lr**2 * entries * response.power, correlation)


def _lion(lr: float, weight_decay: float, entries: float, betas: Betas) -> Balance:
    response = Filter.of(1 - betas[0], betas[0] * (1 - betas[1]), betas[1])
    correlation = _balance.sign_correlation(response, 1 - lr * weight_decay)
    return decoupled(1, lr * weight_decay, lr**2 * entries, correlation)


def _muon(
    *,
    lr: float,
    weight_decay: float,
    shape: tuple[int, int] | tuple[tuple[int, int], ...],
    momentum: float,
    nesterov: bool,
    ns_coefficients: tuple[float, float, float],
    ns_steps: int,
    adjust_lr_fn: str | None,
) -> Balance:
    response = Filter.average(momentum, nesterov)
    update_sq = correlated = 0.0
    for rows, columns in (shape,) if isinstance(shape[0], int) else shape:
        if adjust_lr_fn == "match_rms_adamw":
            adjusted = 0.2 * lr * math.sqrt(max(rows, columns))
        else:
            adjusted = lr * math.sqrt(max(1.0, rows / columns))
        power = adjusted**2 * _balance.update_power((rows, columns), ns_coefficients, ns_steps)
        correlated += power * _balance.update_correlation(
            (rows, columns), response, 1 - lr * weight_decay, ns_coefficients, ns_steps
        )
        update_sq += power
    return decoupled(1, lr * weight_decay, update_sq, correlated / update_sq)


def _sgdp(
    *, lr: float, weight_decay: float, gradient_norm: float, momentum: float, dampening: float, wd_ratio: float
) -> Balance:
    # SGDP's projection works in place, so the momentum loses its radial part along with the update.
    decay = lr * weight_decay * wd_ratio / (1 - momentum)
    if decay >= 1:
        raise ValueError(_too_strong("lr·weight_decay·wd_ratio/(1 − momentum)", decay))
    noise = (lr * (1 - dampening) * gradient_norm) ** 2
    return projecting(2, decay, noise / (1 - (momentum * (1 - decay)) ** 2))


def _adamp(lr: float, weight_decay: float, entries: float, betas: Betas, wd_ratio: float) -> Balance:
    decay, beta = lr * weight_decay * wd_ratio, betas[0]
    # AdamP's momentum keeps the part along the weight, whose tangent to it this is; the update loses it.
    tangent = beta * math.sqrt(decay * (2 - decay)) / (1 - beta * (1 - decay))
    power = Filter.average(beta).power / (1 + tangent**2)
    return projecting(1, decay, lr**2 * entries * power)


def _lamb(lr: float, weight_decay: float, entries: float, betas: Betas) -> Balance:
    # Each step is lr·N long, whatever else; at equilibrium it is one of AdamW with lr·N/‖r‖ for its learning rate,
    # whose part in the decay, x, follows from the angle: versine(x) = lr²/2.
    response = Filter.average(betas[0])
    x = lr**2 * (1 + betas[0]) / (2 * (1 - betas[0]) + betas[0] * lr**2)
    likewise = decoupled(1, x, x**2 * entries * response.power, response.correlation(1 - x))
    norm = likewise.norm() / weight_decay if weight_decay else math.inf
    correlation = response.correlation()
    return Balance(0, 1, lr**2 * correlation / (2 * norm), lr**2, correlation, 0.0, lr**2 / 2)


def _adafactor(lr: float, weight_decay: float, relative_step: float) -> Balance:
    step = lr if math.isnan(relative_step) else relative_step
    q = 1 - lr * weight_decay
    turned = 2 * math.sin(math.atan2(step, q) / 2) ** 2
    return Balance(0, 0, lr * weight_decay * (1 + q) / 2, step**2, 1.0, 0.0, turned)


def _too_strong(product: str, value: float) -> str:
    return f"{product} must be below 1, or decay leaves nothing of the weight, got {value:g}. Use a smaller `lr`."


_GRADIENT = {"gradient_norm": UNKNOWN}
_ENTRIES = {"entries": UNKNOWN}
_ADAM = {"betas": (0.9, 0.999)}
_SGD = {"momentum": 0.0, "dampening": 0.0}
_MUON = {
    "momentum": 0.95,
    "nesterov": True,
    "ns_coefficients": (3.4445, -4.7750, 2.0315),
    "ns_steps": 5,
    "adjust_lr_fn": None,
}
_ALL = (
    Family("sgd", _sgd, _GRADIENT | _SGD),
    Family("nesterov", _nesterov, _GRADIENT | {"momentum": 0.9}),
    Family("adam_l2", _adam_l2, _GRADIENT | _ENTRIES | _ADAM),
    Family("adam_decoupled", partial(_averaged, nesterov=False), _ENTRIES | _ADAM),
    Family("nadam_decoupled", partial(_averaged, nesterov=True), _ENTRIES | _ADAM),
    Family("rmsprop_l2", _rmsprop_l2, _GRADIENT | _ENTRIES | {"momentum": 0.0}),
    Family("lion", _lion, _ENTRIES | {"betas": (0.9, 0.99)}),
    # Newton–Schulz turns a gradient with a signal in it into another step than it turns noise into.
    Family("muon", _muon, _MUON, ("lr", "weight_decay", "shape"), tolerance=0.35, turns_matrix=True),
    Family("sgdp", _sgdp, _GRADIENT | _SGD | {"wd_ratio": 0.1}),
    Family("adamp", _adamp, _ENTRIES | _ADAM | {"wd_ratio": 0.1}),
    Family("lamb", _lamb, _ENTRIES | _ADAM),
    Family("adafactor", _adafactor, {"relative_step": UNKNOWN}, settles=False),
)
FAMILIES: Mapping[str, Family] = {family.name: family for family in _ALL}
