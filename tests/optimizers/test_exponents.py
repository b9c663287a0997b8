"""The exponent p of every optimizer, measured: weights times α, gradients over α, fresh state."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from lightning_normreg._optimizers import UpdateRule, find_rule, update_rule
from lightning_normreg._optimizers._packages import RULES
from tests.optimizers._cases import PACKAGES, TORCH, Make, case, radial_free

ALPHA = 2.0
STEPS = 8


def step_lengths(make: Make, alpha: float) -> tuple[list[float], Optimizer]:
    """‖Δ‖/(lr ‖w‖) of steps on given gradients that go with 1/α, from a weight that goes with α."""
    generator = torch.Generator().manual_seed(0)
    start = 0.1 * torch.randn(8, 12, dtype=torch.float64, generator=generator)
    w = nn.Parameter(alpha * start)
    optimizer = make([w], 1e-8)
    lengths = []
    for _ in range(STEPS):
        gradient = torch.randn(8, 12, dtype=torch.float64, generator=generator)
        w.grad = radial_free(start, gradient) / alpha
        before = w.detach().clone()
        optimizer.step()
        rule = update_rule(optimizer)
        assert rule is not None
        lengths.append(float((w.detach() - before).norm() / before.norm()) / float(rule.lr(optimizer.param_groups[0])))
    return lengths, optimizer


@pytest.mark.parametrize("name", [*TORCH, *PACKAGES])
def test_measured_exponent(name: str) -> None:
    """The exponent of the rule is that of the steps that the optimizer takes."""
    # The weight moves by less than 8 · 1e-6 of itself, an eps of 1e-8 beside gradients of 0.3 changes p by less than
    # 1e-6 (entries of gradients below 1e-4 are one in 1e4), and rounding 1e-16 of the weight in a step of 1e-9 is 1e-7:
    # together under 1e-4. Doubling rounds nothing, not even in the bfloat16 and float32 that some use inside.
    plain, optimizer = step_lengths({**TORCH, **PACKAGES}[name], 1.0)
    scaled, _ = step_lengths({**TORCH, **PACKAGES}[name], ALPHA)
    rule = update_rule(optimizer)
    assert rule is not None
    first = 5 if name.lower().endswith("radam") else 0
    exponents = [
        -math.log(b / a) / math.log(ALPHA) for a, b in zip(plain[first:], scaled[first:], strict=True) if a > 0
    ]
    assert len(exponents) >= 3  # some stand still at first
    assert exponents == pytest.approx([rule.exponent] * len(exponents), abs=1e-3)


def test_radam_before_it_rectifies() -> None:
    """Its first five steps go with lr/‖w‖², and the sixth with lr/‖w‖."""
    plain, _ = step_lengths(TORCH["radam"], 1.0)
    scaled, _ = step_lengths(TORCH["radam"], ALPHA)
    exponents = [-math.log(b / a) / math.log(ALPHA) for a, b in zip(plain, scaled, strict=True)]
    assert exponents == pytest.approx([2.0] * 5 + [1.0] * 3, abs=1e-3)


def test_every_optimizer_of_torch_is_classified() -> None:
    """When torch adds one, somebody has to find out what it does."""
    classes = {n for n, c in vars(torch.optim).items() if isinstance(c, type) and issubclass(c, Optimizer)}
    assert classes - {"Optimizer"} <= set(RULES["torch"])


def test_every_rule_of_torch_is_measured() -> None:
    """No rule that stands there has been left out of the measurements."""
    names = set()
    for make in TORCH.values():
        names.add(type(make([nn.Parameter(torch.ones(2, 2))], 0.1)).__name__)
    assert names == {name for name, rule in RULES["torch"].items() if isinstance(rule, UpdateRule)}


@pytest.mark.parametrize("package", ["adamp", "lion_pytorch", "prodigyopt", "pytorch_optimizer", "schedulefree"])
def test_every_rule_of_installed_packages_is_measured(package: str) -> None:
    """Nor in the packages that the tests install."""
    made = [make([nn.Parameter(torch.ones(2, 2))], 0.1) for name, make in PACKAGES.items()]
    mine = {type(o).__name__ for o in made if type(o).__module__.split(".")[0] == package}
    assert mine == {name.rpartition(".")[2] for name in RULES[package]}


def test_the_same_name_elsewhere_is_not_the_same_optimizer() -> None:
    """A class is known by its package, not by its name."""
    elsewhere = type("Adam", (Optimizer,), {"step": lambda self, closure=None: None, "__module__": "someones.optim"})
    optimizer = elsewhere([nn.Parameter(torch.ones(2))], {"lr": 0.1})
    assert find_rule(optimizer) is None
    for path, exponent in (("torch.optim.Adafactor", 0), ("transformers.optimization.Adafactor", 1)):
        options = {"relative_step": False, "scale_parameter": False} if exponent else {}
        rule = update_rule(case(path, **options)([nn.Parameter(torch.ones(2))], 0.1))
        assert rule is not None
        assert rule.exponent == exponent
