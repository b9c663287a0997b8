"""The exponent of single steps, where an absolute constant counts, against its measured derivative."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_normreg._optimizers import scale_exponent
from tests.optimizers._cases import PACKAGES, TORCH, Make, case

STEPS = 7
# Of the size of the gradients, so that the exponent is far from any integer.
EPS = 0.3
CASES: dict[str, Make] = {
    "adam": case("torch.optim.Adam", eps=EPS),
    "maximize": case("torch.optim.Adam", eps=EPS, maximize=True),
    "amsgrad": case("torch.optim.Adam", eps=EPS, amsgrad=True),
    "fused": case("torch.optim.Adam", eps=EPS, fused=True),
    "adamw": case("torch.optim.AdamW", eps=EPS, weight_decay=0.0),
    "nadam": case("torch.optim.NAdam", eps=EPS),
    "nadam-maximize": case("torch.optim.NAdam", eps=EPS, maximize=True),
    "radam": case("torch.optim.RAdam", eps=1e-2 * EPS),
    "rmsprop": case("torch.optim.RMSprop", eps=EPS),
    "centered": case("torch.optim.RMSprop", eps=EPS, centered=True),
    "adagrad": case("torch.optim.Adagrad", eps=EPS),
}


def gradients(steps: int) -> Tensor:
    """Given gradients, of different sizes."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-2, 1, 12, dtype=torch.float64)
    return sizes * torch.randn(STEPS, 5, 12, dtype=torch.float64, generator=generator)[:steps]


def run(make: Make, steps: int, alpha: float = 1.0) -> tuple[Optimizer, nn.Parameter, float]:
    """The optimizer after its last step, and the relative length of that, with gradients over alpha."""
    w = nn.Parameter(alpha * torch.ones(5, 12, dtype=torch.float64))
    optimizer, length = make([w], 1e-7), 0.0
    for gradient in gradients(steps):
        length = step(optimizer, w, gradient / alpha)
    return optimizer, w, length


def step(optimizer: Optimizer, w: nn.Parameter, gradient: Tensor) -> float:
    """Relative length of a step."""
    before = w.detach().clone()
    w.grad = gradient.clone()
    optimizer.step()
    return float((w.detach() - before).norm() / before.norm())


def exponent_of(optimizer: Optimizer, w: nn.Parameter) -> float:
    """What the package says."""
    found = scale_exponent(optimizer, w)
    assert found is not None
    assert found.shape == ()
    return float(found)


@pytest.mark.parametrize("steps", [1, STEPS])
@pytest.mark.parametrize("name", CASES)
def test_eps_against_the_derivative(name: str, steps: int) -> None:
    """A central difference over runs with weights times α and gradients over α gives the same exponent."""
    # Its own error is of order (log α)² = 1e-6; steps of 1e-7 in weights of 1 are known to 1e-9, which over 2 log α is
    # 1e-6 as well, and the weights move by 1e-6 at most.
    alpha = 1.001
    optimizer, w, _ = run(CASES[name], steps)
    more, less = run(CASES[name], steps, alpha)[2], run(CASES[name], steps, 1 / alpha)[2]
    found = exponent_of(optimizer, w)
    assert found == pytest.approx(-math.log(more / less) / (2 * math.log(alpha)), abs=1e-5)
    assert (found == 2.0) if name == "radam" and steps == 1 else 1.02 < found < 1.98


def test_momentum_of_rmsprop_against_the_derivative() -> None:
    """Its momentum is of steps: once the roots have settled, the exponent counts all of them alike."""
    alpha, w = 1.001, {}
    lengths = []
    for factor in (1.0, alpha, 1 / alpha):
        w[factor] = nn.Parameter(factor * torch.ones(5, 12, dtype=torch.float64))
        optimizer = case("torch.optim.RMSprop", eps=EPS, momentum=0.5, alpha=0.5)([w[factor]], 1e-9)
        for _ in range(60):  # 2^-60 of the start is left
            lengths.append(step(optimizer, w[factor], gradients(1)[0] / factor))
        if factor == 1.0:
            found = exponent_of(optimizer, w[factor])
    # As above, with steps that are 100 times shorter, and known to as many digits less.
    assert found == pytest.approx(-math.log(lengths[119] / lengths[179]) / (2 * math.log(alpha)), abs=1e-3)
    assert 1.02 < found < 1.98


@pytest.mark.parametrize("eps", [1e-6, 1e-3, 1.0])
@pytest.mark.parametrize("steps", [1, STEPS])
def test_adadelta_against_its_state_dependent_derivative(eps: float, steps: int) -> None:
    """The average of its own past steps stays as it is, and that of gradients follows, as in no fresh run."""
    make, alpha = case("torch.optim.Adadelta", eps=eps), 1.001
    optimizer, w, _ = run(make, steps)
    lengths = []
    for factor in (alpha, 1 / alpha):
        other, v, _ = run(make, steps - 1)
        with torch.no_grad():
            v.mul_(factor)
            for entry in other.state.values():
                entry["square_avg"].div_(factor**2)
        lengths.append(step(other, v, gradients(steps)[-1] / factor))
    # Steps of 1e-7 · √eps in weights of 1 are known to 1e-6 or better, which over 2 log α is 5e-4.
    found = exponent_of(optimizer, w)
    assert found == pytest.approx(-math.log(lengths[0] / lengths[1]) / (2 * math.log(alpha)), abs=1e-3)
    assert 1.0 < found < 2.0


@pytest.mark.parametrize("size, exponent", [(1e-2, 0.0), (1e-4, 1.0)])
def test_adafactor_on_both_sides_of_its_eps(size: float, exponent: float) -> None:
    """A weight of a root mean square under eps2 takes steps of its size no more."""
    lengths = []
    for factor in (1.0, 2.0):
        w = nn.Parameter(factor * size * torch.ones(5, 12, dtype=torch.float64))
        optimizer = case("torch.optim.Adafactor")([w], 1e-7)
        lengths.append(step(optimizer, w, gradients(1)[0] / factor))
        assert exponent_of(optimizer, w) == exponent
    # The weight moves by 1e-6 of itself, and the step is known to 1e-8.
    assert -math.log2(lengths[1] / lengths[0]) == pytest.approx(exponent, abs=1e-5)


@pytest.mark.parametrize("name, exponent", [("momentum", 2.0), ("muon", 1.0), ("rprop", 1.0)])
def test_no_constant_no_difference(name: str, exponent: float) -> None:
    """Where no constant counts the exponent of a step is that of the rule."""
    optimizer, w, _ = run(TORCH[name], 2)
    assert exponent_of(optimizer, w) == exponent


@pytest.mark.parametrize("make", [TORCH["adamax"], PACKAGES["pytorch_optimizer-SOAP"], PACKAGES["adamp"]])
def test_entangled_constants(make: Make) -> None:
    """No number is better than a wrong one."""
    optimizer, w, _ = run(make, 2)
    assert scale_exponent(optimizer, w) is None


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"capturable": False}])
def test_without_state_or_gradient(options: dict[str, Any]) -> None:
    """Before the first step, and for other parameters, nothing is known."""
    w = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([w], **options)
    assert scale_exponent(optimizer, w) is None
    assert scale_exponent(optimizer, nn.Parameter(torch.ones(3))) is None
    nadam = torch.optim.NAdam([w])
    w.grad = torch.ones(3)
    nadam.step()
    nadam.zero_grad()
    assert scale_exponent(nadam, w) is None


def test_no_gradient_no_difference() -> None:
    """A step of length 0 has the exponent of the rule, and no NaN."""
    w = nn.Parameter(torch.ones(3))
    w.grad = torch.zeros_like(w)
    optimizer = torch.optim.Adam([w])
    optimizer.step()
    assert exponent_of(optimizer, w) == 1.0


def test_low_precision_is_summed_in_float32() -> None:
    """The exponent of a bfloat16 weight is that of its state in float32."""
    optimizer, w, _ = run(case("torch.optim.Adam", eps=EPS), STEPS)
    twin = copy.deepcopy(optimizer)
    narrow = nn.Parameter(w.detach().bfloat16())
    narrow.grad = torch.zeros_like(narrow)
    other = torch.optim.Adam([narrow], eps=EPS)
    other.step()
    (state,) = twin.state.values()
    other.state[narrow] = {k: v if k == "step" else v.bfloat16() for k, v in state.items()}
    rounded = {k: v if k == "step" else v.bfloat16().double() for k, v in state.items()}
    optimizer.state[w] = rounded
    # Sixty terms in float32.
    assert exponent_of(other, narrow) == pytest.approx(exponent_of(optimizer, w), rel=1e-5)
