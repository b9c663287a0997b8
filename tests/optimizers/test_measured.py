from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from lightning_normreg._optimizers import UpdateRule, update_rule
from lightning_normreg._optimizers._rule import Decay

ALPHAS = [2.0, 4.0, 0.5]
# Vanishes in the rounding beside the root of any gradient above 1e-84.
EPS = 1e-100
CASES: dict[str, tuple[Callable[..., Optimizer], dict[str, Any]]] = {
    "sgd": (SGD, {}),
    "momentum": (SGD, {"momentum": 0.9}),
    "nesterov": (SGD, {"momentum": 0.9, "nesterov": True}),
    "dampening": (SGD, {"momentum": 0.9, "dampening": 0.5}),
    "adam": (Adam, {"eps": EPS}),
    "amsgrad": (Adam, {"eps": EPS, "amsgrad": True}),
    "adam-decoupled": (Adam, {"eps": EPS, "decoupled_weight_decay": True}),
    "adamw": (AdamW, {"eps": EPS, "weight_decay": 0.0}),
    "rmsprop": (RMSprop, {"eps": EPS}),
    "rmsprop-momentum": (RMSprop, {"eps": EPS, "momentum": 0.9}),
    "rmsprop-centered": (RMSprop, {"eps": EPS, "centered": True}),
}
case = pytest.mark.parametrize("make, options", CASES.values(), ids=list(CASES))


def rule_of(make: Callable[..., Optimizer], options: dict[str, Any]) -> UpdateRule:
    """Rule of an optimizer made this way."""
    rule = update_rule(make([nn.Parameter(torch.ones(2))], lr=0.1, **options))
    assert rule is not None
    return rule


def numbers(seed: int) -> Tensor:
    """Random numbers in float64, at least 0.1 in size."""
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x + 0.1 * x.sign()


def angle(a: Tensor, b: Tensor) -> float:
    """Angle between two tensors, good for small ones: from the difference and the sum of the unit vectors."""
    a, b = a / a.norm(), b / b.norm()
    return 2 * math.atan2(float((a - b).norm()), float((a + b).norm()))


def rotations(make: Callable[..., Optimizer], options: dict[str, Any], alpha: float, lr: float, steps: int) -> Tensor:
    """Rotation of each step on a loss that does not see the norm, from alpha times the same weight."""
    w = nn.Parameter(alpha * numbers(seed=0))
    optimizer = make([w], lr=lr, **options)
    angles = []
    for _ in range(steps):
        before = w.detach().clone()
        optimizer.zero_grad()
        (w / w.norm() * numbers(seed=1)).sum().backward()
        optimizer.step()
        angles.append(angle(before, w.detach()))
    return torch.tensor(angles, dtype=torch.float64)


@pytest.mark.parametrize("alpha", ALPHAS)
@case
def test_rotation_of_a_scaled_weight(make: Callable[..., Optimizer], options: dict[str, Any], alpha: float) -> None:
    """A weight alpha times as large turns alpha^-p as far in its first step, at one learning rate."""
    # lr is such that the plain weight turns by about 3e-8. Small angles grow with lr / n^p up to their own size where
    # the update has a part along the weight (p = 1), and up to its square where it has none (p = 2): at most 6e-8 times
    # the ratio of the two parts, which is of order 1. Three roundings of 2^-53 of the weight are 2e-7 of the smallest
    # angle, 3e-8 / 16. Both stay under 1e-6, and a wrong p is off by a factor of 2.
    lr = 3e-8 * 1e-3 / float(rotations(make, options, 1.0, 1e-3, 1))
    ratio = float(rotations(make, options, alpha, lr, 1) / rotations(make, options, 1.0, lr, 1))
    assert ratio == pytest.approx(alpha ** -rule_of(make, options).exponent, rel=1e-6)


@pytest.mark.parametrize("alpha", ALPHAS)
@case
def test_ten_steps_of_a_scaled_weight(make: Callable[..., Optimizer], options: dict[str, Any], alpha: float) -> None:
    """Of 0, 1 and 2 the exponent alone makes ten long steps at lr * alpha^p turn as they did, momentum included."""
    # Multiplying by a power of two rounds nothing in any operation on the way, and eps vanishes beside the roots, so
    # the right exponent gives the same bits, however far the steps go; another one, another first angle.
    plain = rotations(make, options, 1.0, 0.05, 10)
    scaled = {p: rotations(make, options, alpha, 0.05 * alpha**p, 10) for p in (0, 1, 2)}
    fitting = [p for p, angles in scaled.items() if torch.equal(angles, plain)]
    assert fitting == [rule_of(make, options).exponent]


def without_gradient(
    make: Callable[..., Optimizer], options: dict[str, Any], steps: int
) -> tuple[Tensor, Tensor, Decay]:
    """A weight before and after steps with lr = 1/4, decay = 1/2 and no gradient, and the decay that the rule says."""
    w = nn.Parameter(numbers(seed=0))
    before = w.detach().clone()
    optimizer = make([w], lr=2**-2, **(options | {"weight_decay": 2**-1}))
    for _ in range(steps):
        w.grad = torch.zeros_like(w)
        optimizer.step()
    return before, w.detach(), rule_of(make, options).decay


@pytest.mark.parametrize("name", [name for name in CASES if name != "sgd"])
def test_kind_of_decay(name: str) -> None:
    """A decoupled decay takes lr * decay of the weight each step; a coupled one goes through momentum or the root."""
    # Powers of two leave one rounding per step and one here, 2^-53 each. Plain SGD cannot tell the two apart.
    before, after, kind = without_gradient(*CASES[name], steps=2)
    shrinks = torch.allclose(after, before * (1 - 2**-3) ** 2, rtol=2**-51, atol=0.0)
    assert kind == ("decoupled" if shrinks else "coupled")


def test_coupled_decay_of_sgd() -> None:
    """Without momentum SGD's coupled decay takes lr * decay of the weight; with it, the first step's part again."""
    before, after, _ = without_gradient(SGD, {}, steps=1)
    assert torch.equal(after, before * (1 - 2**-3))
    # w1 = w0 (1 - 1/8), w2 = w1 - 1/4 (1/2 · w0/2 + w1/2) = w0 (7/8 - 1/16 - 7/64) = w0 · 45/64. Four roundings of
    # 2^-53 of the weight on the way, and one here; w0 / w2 < 2.
    before, after, _ = without_gradient(SGD, {"momentum": 0.5}, steps=2)
    torch.testing.assert_close(after, before * 45 / 64, rtol=10 * 2**-53, atol=0.0)


@pytest.mark.parametrize("make, gain", [(Adam, 1.0), (RMSprop, (1 - 0.99) ** -0.5)])
def test_coupled_decay_is_normalized_away(make: Callable[..., Optimizer], gain: float) -> None:
    """The first step of Adam and RMSprop takes the same from every entry, whatever its size and the decay."""
    # Adam divides the decay's gradient by its own size, RMSprop by the root of 1 - alpha of its square. A dozen
    # roundings of 2^-53 (bias corrections, root, division) on a step of 2.5 and two on a weight under 8 are under 60.
    before, after, _ = without_gradient(make, {"eps": EPS}, steps=1)
    torch.testing.assert_close(before - after, gain * 2**-2 * before.sign(), rtol=0.0, atol=60 * 2**-53)
