"""Settings of a family as the caller gave them: known, complete and in range."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lightning_normreg.functional._balance import Balance
from lightning_normreg.functional._device import is_transformed
from lightning_normreg.functional._families import FAMILIES, Family

_Range = tuple[Callable[[float], bool], str]
FRACTION: _Range = (lambda x: 0 <= x < 1, "in [0, 1)")
POSITIVE: _Range = (lambda x: 0 < x < math.inf, "positive")
NOT_NEGATIVE: _Range = (lambda x: 0 <= x < math.inf, "at least 0")
_PAIRS = {"betas": FRACTION, "shape": POSITIVE}
_NUMBERS = dict.fromkeys(("lr", "gradient_norm", "entries", "wd_ratio", "relative_step"), POSITIVE)
_NUMBERS |= {"weight_decay": NOT_NEGATIVE, "momentum": FRACTION, "dampening": FRACTION}
_LR_ADJUSTMENTS = (None, "original", "match_rms_adamw")


def check(name: str, number: float, allowed: _Range) -> None:
    """Raise a ``ValueError`` unless a number is in its range, and a ``TypeError`` if its gradient would be lost."""
    if isinstance(number, Tensor) and is_transformed(number):
        raise TypeError(
            f"`{name}` must be a number: this formula has no gradient, and works outside of torch.func only. "
            f"Pass float({name})."
        )
    if not allowed[0](number):
        raise ValueError(f"`{name}` must be {allowed[1]}, got {number}.")


def family_of(name: str) -> Family:
    """The family of a name; a ``ValueError`` lists the names that there are."""
    if name not in FAMILIES:
        raise ValueError(f"`family` must be one of {', '.join(FAMILIES)}, got {name!r}.")
    return FAMILIES[name]


def balance_of(name: str, settings: Mapping[str, Any]) -> Balance:
    """Balance of a family with the caller's settings, which are checked."""
    family = family_of(name)
    for key in settings:
        if key not in family.settings:
            raise TypeError(f"`{key}` is not a setting of family {name!r}, which has {', '.join(family.settings)}.")
    for key in family.required:
        if key not in settings:
            raise TypeError(f"`{key}` is needed for family {name!r}. Pass it by name.")
    checked = {key: _checked(key, value) for key, value in settings.items()}
    product = checked["lr"] * checked["weight_decay"]
    if product >= 1:
        raise ValueError(f"`lr` times `weight_decay` must be below 1, got {product:g}. Use a smaller `lr`.")
    return family.balance(checked)


def settled(name: str, settings: Mapping[str, Any], *, norm: bool = True) -> Balance:
    """The same where there has to be an equilibrium, by default one of the norm as well."""
    balance = balance_of(name, settings)
    if settings["weight_decay"] == 0:
        raise ValueError(f"`weight_decay` must be positive, got 0: without it there is no equilibrium. {_GROWTH}")
    if norm and not FAMILIES[name].settles:
        raise ValueError(f"`family` {name!r} has no equilibrium norm: its log drifts steadily. {_GROWTH}")
    return balance


def known_number(name: str, value: float) -> float:
    """A result, unless it is nan because a number behind it is missing."""
    if math.isnan(value):
        names = " and ".join(f"`{key}`" for key in ("gradient_norm", "entries") if key in FAMILIES[name].settings)
        raise ValueError(f"{names} must be given, or this number of family {name!r} is unknown.")
    return value


def slow(balance: Balance, steps: float) -> float:
    """A relaxation time, unless the optimizer's memory is the longer one."""
    strength = balance.correlation * math.log(2) / (max(1, balance.power) * steps)
    if strength >= 1:
        raise ValueError(
            f"κ·S must be below 1, got {strength:.2g}: the norm would follow the momentum's memory. Use a smaller `lr`."
        )
    return steps


_GROWTH = "See `predicted_norm` for how it moves."


def _checked(name: str, value: Any) -> Any:
    if name in _NUMBERS:
        check(name, value, _NUMBERS[name])
        return float(value)
    if name == "shape" and value and not isinstance(value[0], (int, float)):  # of several matrices
        return tuple(_checked(name, each) for each in value)
    if name in _PAIRS:
        if len(value) != 2:
            raise ValueError(f"`{name}` must have 2 numbers, got {value!r}.")
        for number in value:
            check(name, number, _PAIRS[name])
        return tuple(map(float, value)) if name == "betas" else tuple(value)
    if name == "adjust_lr_fn" and value not in _LR_ADJUSTMENTS:
        raise ValueError(f"`{name}` must be one of {_LR_ADJUSTMENTS}, got {value!r}.")
    return tuple(value) if name == "ns_coefficients" else value
