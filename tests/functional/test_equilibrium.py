from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim._muon import _zeropower_via_newtonschulz

from lightning_normreg import functional as F
from lightning_normreg._metrics import EQUILIBRIUM_TOLERANCE
from lightning_normreg.functional._balance import Filter, update_correlation, update_power
from lightning_normreg.functional._families import FAMILIES, Family, FamilyName
from tests import random_walk
from tests.random_walk import ADAFACTOR, CASES, FILLING, Walk, at_equilibrium

NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315), 5)


def impulse_response(step: Callable[[Tensor, Tensor], None], steps: int) -> Tensor:
    """What one gradient of 1 does to a weight of 0 over the steps after it, decay included."""
    w, g, response = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64), []
    for _ in range(steps):
        step(w, g)
        response.append(float(w))
        g = torch.zeros_like(g)
    return torch.tensor(response, dtype=torch.float64)


def power_and_cosine(response: Tensor) -> tuple[float, float]:
    """Square of a weight that is the sum of such responses to white noise, and the correlation of successive ones."""
    power = float((response**2).sum())
    return power, float((response[1:] * response[:-1]).sum()) / power


@pytest.mark.slow
@pytest.mark.parametrize("product", [3e-3, 0.03, 0.5])
@pytest.mark.parametrize(
    "family, settings, options",
    [
        ("sgd", {}, {}),
        ("sgd", {"dampening": 0.7}, {}),
        ("sgd", {"momentum": 0.5}, {}),
        ("sgd", {"momentum": 0.9, "dampening": 0.3}, {}),
        ("nesterov", {"momentum": 0.9}, {"nesterov": True}),
        ("nesterov", {"momentum": 0.3}, {"nesterov": True}),
    ],
)
def test_sgd_from_the_response_of_the_real_optimizer(
    family: FamilyName, settings: dict[str, Any], options: dict[str, Any], product: float
) -> None:
    """Norm and rotation under SGD, at any ηλ, are those of what torch's optimizer makes of white gradients."""
    lr, g = 0.2, 3.0
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    # A first step without gradient: the undampened first step of torch is over then.
    optimizer = SGD([weight], lr=lr, weight_decay=product / lr, **settings, **options)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()

    def step(w: Tensor, gradient: Tensor) -> None:
        weight.grad = gradient
        optimizer.step()
        w.copy_(weight.detach())

    # The slowest response falls with about exp(-product) per step; 30 e-foldings leave 1e-26 of its square.
    power, cosine = power_and_cosine(
        impulse_response(step, 400 + int(40 / product / (1 - settings.get("dampening", 0.0))))
    )
    recipe = {"lr": lr, "weight_decay": product / lr, **settings}
    # N² = (G/N)²·power. Sums of at most 1e5 terms, each with a few roundings of 2^-53; the cosine is near 1.
    assert F.equilibrium_norm(family, gradient_norm=g, **recipe) == pytest.approx((g**2 * power) ** 0.25, rel=1e-9)
    assert math.cos(F.equilibrium_rotation(family, **recipe)) == pytest.approx(cosine, abs=1e-9)


@pytest.mark.parametrize("product", [3e-3, 0.03, 0.5])
@pytest.mark.parametrize("nesterov", [False, True])
def test_decoupled_decay_from_its_response(nesterov: bool, product: float) -> None:
    """Norm and rotation under AdamW and NAdamW, at any ηλ, are those of moving averages of normalized noise."""
    lr, entries, beta = 0.2, 50, 0.9
    average = torch.zeros(1, dtype=torch.float64)

    def step(w: Tensor, gradient: Tensor) -> None:
        average.mul_(beta).add_(gradient, alpha=1 - beta)
        update = beta * average + (1 - beta) * gradient if nesterov else average
        w.mul_(1 - product).sub_(update, alpha=lr)

    power, cosine = power_and_cosine(impulse_response(step, int(40 / product) + 400))
    family: FamilyName = "nadam_decoupled" if nesterov else "adam_decoupled"
    recipe: dict[str, Any] = {"lr": lr, "weight_decay": product / lr, "betas": (beta, 0.999), "entries": entries}
    assert F.equilibrium_norm(family, **recipe) == pytest.approx(math.sqrt(entries * power), rel=1e-9)
    assert math.cos(F.equilibrium_rotation(family, **recipe)) == pytest.approx(cosine, abs=1e-9)


@pytest.mark.parametrize("decay", [0.03, 1.0])
@pytest.mark.parametrize(
    "family, beta, gain", [("adam_l2", 0.9, 0.1), ("rmsprop_l2", 0.0, 1.0), ("rmsprop_l2", 0.8, 1.0)]
)
def test_normalized_decay_from_its_response(family: FamilyName, beta: float, gain: float, decay: float) -> None:
    """With L2 the root of the second moment, which divides gradient and decay, follows from the norm that it makes."""
    lr, g, entries = 0.01, 2.0, 100
    momentum = {"betas": (beta, 0.999)} if family == "adam_l2" else {"momentum": beta}
    recipe: dict[str, Any] = {"lr": lr, "weight_decay": decay, "gradient_norm": g, "entries": entries, **momentum}
    norm = F.equilibrium_norm(family, **recipe)
    sigma = math.sqrt(((g / norm) ** 2 + (decay * norm) ** 2) / entries)
    buffer = torch.zeros(1, dtype=torch.float64)

    def step(w: Tensor, gradient: Tensor) -> None:
        buffer.mul_(beta).add_((gradient + decay * w) / sigma, alpha=gain)
        w.sub_(buffer, alpha=lr)

    power, cosine = power_and_cosine(impulse_response(step, 20_000))
    assert norm == pytest.approx(math.sqrt((g / norm) ** 2 * power), rel=1e-9)
    assert math.cos(F.equilibrium_rotation(family, **recipe)) == pytest.approx(cosine, abs=1e-9)


def test_first_order_formulas() -> None:
    """For small ηλ the numbers are the published ones: Kosson et al. 2024, table 1, and van Laarhoven 2017."""
    lr, decay, g, entries, beta = 1e-4, 1e-4, 2.0, 300, 0.9
    sgd: dict[str, Any] = {"lr": lr, "weight_decay": decay, "momentum": beta}
    adamw: dict[str, Any] = {"lr": lr, "weight_decay": decay}
    # Left out is a share of the order of ηλS, 1e-8 · 46.
    close = {"rel": 1e-6}
    assert F.equilibrium_norm("sgd", gradient_norm=g, **sgd) ** 4 == pytest.approx(
        lr * g**2 / (2 * decay * (1 - beta)), **close
    )
    assert F.equilibrium_rotation("sgd", **sgd) == pytest.approx(math.sqrt(2 * lr * decay / (1 + beta)), **close)
    assert F.equilibrium_norm("adam_decoupled", entries=entries, **adamw) ** 2 == pytest.approx(
        lr * entries / (2 * decay), **close
    )
    assert F.equilibrium_rotation("adam_decoupled", **adamw) == pytest.approx(
        math.sqrt(2 * lr * decay * (1 - beta) / (1 + beta)), **close
    )
    # Lion's published form takes signs for Gaussian, (2/π)·arcsin ρ for ρ: some per cent above at these betas.
    kosson = math.sqrt(math.pi * lr * decay * (0.1**2 + 0.9**2 * 0.01 / 1.99))
    assert 1.0 < kosson / F.equilibrium_rotation("lion", **adamw) < 1.06
    # Plain SGD: cos θ = 1 − ηλ and N⁴ = ηG²/(λ(2 − ηλ)), at any ηλ.
    assert math.cos(F.equilibrium_rotation("sgd", lr=0.5, weight_decay=0.6)) == pytest.approx(0.7, rel=1e-15)
    assert F.equilibrium_norm("sgd", lr=0.5, weight_decay=0.6, gradient_norm=g) ** 4 == pytest.approx(
        0.5 * g**2 / (0.6 * (2 - 0.3)), rel=1e-14
    )


@pytest.mark.parametrize("shape", [(32, 32), (96, 24), (24, 96)])
def test_statistics_of_newton_schulz(shape: tuple[int, int]) -> None:
    """Length and correlation of Muon's updates are those of torch's own Newton–Schulz on Gaussian matrices."""
    random = torch.Generator().manual_seed(0)
    rho, pairs = 0.6, 100
    power, product = [], []
    for _ in range(pairs):
        x, y = (torch.randn(shape, generator=random) for _ in range(2))
        a, b = (
            _zeropower_via_newtonschulz(m, *NEWTON_SCHULZ, 1e-7).double()
            for m in (x, rho * x + math.sqrt(1 - rho**2) * y)
        )
        power.append(float((a**2).sum()))
        product.append(float((a * b).sum()))
    # f(ρ) alone: a filter that remembers one step, S = 1 + 2f.
    response = Filter(power=1.0, first=rho, beta=0.0)
    f = (update_correlation(shape, response, 1.0, *NEWTON_SCHULZ) - 1) / 2
    measured = torch.tensor([power, product], dtype=torch.float64)
    error = measured.std(dim=1) / math.sqrt(pairs)
    # Four standard errors, half a percent for bfloat16 and the same for 1/24² of a matrix that is not infinite.
    expected = update_power(shape, *NEWTON_SCHULZ)
    assert abs(float(measured[0].mean()) - expected) < 4 * error[0] + 0.01 * expected
    assert abs(float(measured[1].mean()) - f * expected) < 4 * error[1] + 0.01 * expected
    # What is linear would keep ρ.
    assert f < 0.99 * rho


FAST = ["SGD", "momentum 0.9", "Nesterov 0.9", "AdamW", "NAdamW", "Lion, ηλ = 1e-3", "Muon 16 × 64", "SGDP", "AdamP"]
SLOW = ["Adam + L2", "RMSprop + L2"]


@pytest.mark.parametrize("name", FAST + [pytest.param(name, marks=pytest.mark.slow) for name in SLOW])
def test_random_walk_of_the_real_optimizer(name: str) -> None:
    """Under pure noise each optimizer stays at the predicted norm, and turns by the predicted angle."""
    result = at_equilibrium(CASES[name], relaxations=32 if CASES[name].family in ("sgd", "nesterov", "sgdp") else 10)
    assert result.norm == pytest.approx(1.0, abs=result.norm_tolerance)
    assert result.rotation == pytest.approx(1.0, abs=result.rotation_tolerance)


@pytest.mark.parametrize("name", ["SGD", "momentum 0.9", "AdamW", "SGDP"])
def test_half_life_of_the_real_optimizer(name: str) -> None:
    """From three times the equilibrium norm, N^s comes half-way in the predicted number of steps."""
    # A quarter of the decay: the memory of the momentum, 9 steps, and of the second moment are short against it.
    case = replace(CASES[name], weight_decay=CASES[name].weight_decay / 4)
    measured, predicted = random_walk.half_life(case)
    assert measured == pytest.approx(predicted, rel=0.1)


@pytest.mark.parametrize("decay", [0.0, 0.02])
def test_adafactor_drifts(decay: float) -> None:
    """Adafactor's log-norm moves by a constant per step, and the rotation does not depend on it."""
    case, steps = replace(ADAFACTOR, weight_decay=decay), 1000
    walk = Walk(case, 20.0, seed=0)
    cosines = [float(cosine) for _, cosine in walk.run(steps)]
    end = F.predicted_norm("adafactor", [case.lr] * steps, initial_norm=20.0, weight_decay=decay)[-1]
    # The clip at RMS 1 shortens steps: the RMS over C numbers scatters by 1/sqrt(2C), above 1 half of the times, which
    # is 0.4 % on average. While the norm grows the second moment lags by its memory, t^0.8 steps at step t, over which
    # the gradients' square falls at twice the drift; the update's square follows that.
    drift = case.lr**2 / 2
    share = 2 * 0.004 + 2 * drift * (FILLING + steps) ** 0.8
    assert math.log(float(walk.norms()) / end) / steps == pytest.approx(0.0, abs=share * drift)
    turned = math.acos(sum(cosines) / steps)
    assert turned == pytest.approx(
        F.predicted_rotation("adafactor", 20.0, lr=case.lr, weight_decay=decay), rel=share / 2
    )


@pytest.mark.parametrize("name", list(CASES))
def test_norm_equation_ends_at_the_equilibrium(name: str) -> None:
    """Integrated from far above and far below, the norm arrives, half of the way in the half-life."""
    case = CASES[name]
    recipe = case.recipe()
    lr, settled = recipe["lr"], F.equilibrium_norm(case.family, **recipe)
    rest = {key: value for key, value in recipe.items() if key != "lr"}
    half_life = F.equilibrium_half_life(case.family, **recipe) if "large" not in name else 5.0
    for start in (0.2, 3.0):
        norms = F.predicted_norm(case.family, [lr] * int(30 * half_life), initial_norm=start * settled, **rest)
        # 30 half-lives leave 2^-30 of the way, some of which, where κ is proportional to the norm, start slowly.
        assert norms[-1] == pytest.approx(settled, rel=1e-5)
        assert all(b > a if start < 1 else b < a for a, b in itertools.pairwise(norms[:50]))


@pytest.mark.parametrize("name", [n for n in CASES if "large" not in n and "0.03" not in n])
def test_half_life_agrees_with_the_norm_equation(name: str) -> None:
    """The time that the closed form gives is the one in which the integrated norm comes half-way."""
    case = CASES[name]
    recipe = case.recipe()
    settled = F.equilibrium_norm(case.family, **recipe)
    power = {"sgd": 4, "nesterov": 4, "sgdp": 4, "adam_l2": 3, "rmsprop_l2": 3, "lamb": 1}.get(case.family, 2)
    steps = F.equilibrium_half_life(case.family, initial_norm=3 * settled, **recipe)
    rest = {key: value for key, value in recipe.items() if key != "lr"}
    norms = F.predicted_norm(case.family, [case.lr] * math.ceil(steps), initial_norm=3 * settled, **rest)
    half_way = (3**power + 1) / 2
    # One step off the whole number is one part in the half-life of the way left.
    assert (norms[-1] / settled) ** power == pytest.approx(half_way, rel=2 / steps)


@pytest.mark.parametrize("name", list(CASES))
def test_rotation_at_the_equilibrium_norm(name: str) -> None:
    """Off the equilibrium and on it there is one formula for the rotation."""
    case = CASES[name]
    recipe = case.recipe()
    there = F.predicted_rotation(case.family, F.equilibrium_norm(case.family, **recipe), **recipe)
    share = there / F.equilibrium_rotation(case.family, **recipe) - 1
    balance = FAMILIES[case.family].balance(recipe)
    kappa = balance.decay * F.equilibrium_norm(case.family, **recipe) ** balance.decay_exponent
    beta = 0.9 if case.family == "adam_l2" else case.settings.get("momentum", 0.0)
    left_out = kappa * beta**2 / (1 - beta**2)
    if case.family in ("nesterov", "lamb"):
        assert -left_out < share < kappa * (case.family == "lamb")
        return
    l2 = kappa / 4 - left_out
    expected = {"sgd": -left_out, "adam_l2": l2, "rmsprop_l2": l2}.get(case.family, 0.0)
    # What is left out is said to first order in κS, exactly where nothing is.
    assert share == pytest.approx(expected, abs=(kappa * balance.correlation) ** 2 if expected else 1e-9)


def test_what_momentum_remembers_of_decay_is_left_out_of_the_prediction() -> None:
    """The optimizer turns by the equilibrium's angle, and by 4 % more than off-equilibrium formulas say at its norm."""
    case = replace(CASES["momentum 0.9"], lr=0.1, weight_decay=0.01)
    recipe = case.recipe()
    result = at_equilibrium(case, relaxations=100)
    assert result.norm == pytest.approx(1.0, abs=result.norm_tolerance)
    assert result.rotation == pytest.approx(1.0, abs=result.rotation_tolerance)
    assert result.rotation_tolerance < 0.015  # so that 4 % show
    predicted = F.predicted_rotation("sgd", F.equilibrium_norm("sgd", **recipe), **recipe)
    assert predicted / F.equilibrium_rotation("sgd", **recipe) == pytest.approx(1 - 0.01 * 0.81 / 0.19, abs=1e-3)


def test_schedule_of_the_real_optimizer() -> None:
    """Along a cosine schedule the norm follows the integrated equation, not each step's own equilibrium."""
    case = replace(CASES["momentum 0.9"], weight_decay=5e-5)
    recipe = case.recipe()
    start = F.equilibrium_norm(case.family, **recipe)
    rest = {key: value for key, value in recipe.items() if key != "lr"}
    steps = 1500
    lrs = [case.lr * (1 + math.cos(math.pi * t / steps)) / 2 for t in range(steps)]
    predicted = F.predicted_norm(case.family, lrs, initial_norm=start, **rest)
    walk = Walk(case, start, seed=0)
    measured, turned = [], []
    for lr in lrs:
        walk.optimizer.param_groups[0]["lr"] = lr
        ((_, cosine),) = walk.run(1)
        measured.append(float((walk.norms() ** 2).mean().sqrt()))
        turned.append(math.acos(min(1.0, float(cosine.mean()))))
    # 16 rows of 400 entries: each norm scatters by 3.5 % of itself at most, their mean by a quarter of that, and three
    # times that is 2.7 %. The rotation is proportional to its square.
    assert max(abs(m / p - 1) for m, p in zip(measured, predicted, strict=True)) < 0.027
    late = recipe | {"lr": lrs[1200]}
    assert predicted[1199] > 1.3 * F.equilibrium_norm(case.family, **late)
    angle = F.predicted_rotation(case.family, predicted[1199], **late)
    assert sum(turned[1190:1211]) / 21 == pytest.approx(angle, rel=0.053)
    assert angle < 0.6 * F.equilibrium_rotation(case.family, **late)


def test_growth_without_decay() -> None:
    """Without decay the norm under SGD and Adam grows as the published power of time, and nothing is an equilibrium."""
    steps, g, entries, lr = 400, 3.0, 50, 0.1
    norms = F.predicted_norm("sgd", [lr] * steps, initial_norm=2.0, weight_decay=0.0, momentum=0.5, gradient_norm=g)
    assert norms[-1] ** 4 == pytest.approx(2.0**4 + 2 * (lr * g / 0.5) ** 2 * steps, rel=1e-12)
    norms = F.predicted_norm("adam_l2", [lr] * steps, initial_norm=2.0, weight_decay=0.0, gradient_norm=g, entries=50)
    assert norms[-1] ** 2 == pytest.approx(2.0**2 + lr**2 * entries * steps, rel=1e-12)
    # A decay too small to matter gives the same.
    norms = F.predicted_norm("adam_l2", [lr] * steps, initial_norm=2.0, weight_decay=1e-9, gradient_norm=g, entries=50)
    assert norms[-1] ** 2 == pytest.approx(2.0**2 + lr**2 * entries * steps, rel=1e-3)
    for function in (F.equilibrium_norm, F.equilibrium_rotation, F.equilibrium_half_life):
        with pytest.raises(ValueError, match=r"`weight_decay` must be positive, got 0: without it"):
            function("sgd", lr=lr, weight_decay=0.0, gradient_norm=g)


def test_warm_up_from_zero() -> None:
    """A learning rate of 0 leaves the norm as it is."""
    assert F.predicted_norm("lion", [0.0, 0.0], initial_norm=2.0, weight_decay=0.1, entries=4) == [2.0, 2.0]


def test_tensors_for_numbers() -> None:
    """Settings as they stand in a parameter group, tensors included."""
    number = F.equilibrium_rotation("sgd", lr=torch.tensor(0.5, dtype=torch.float64), weight_decay=0.5)
    assert number == F.equilibrium_rotation("sgd", lr=0.5, weight_decay=0.5)


SGD_RECIPE: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"lr": 0.0}, "`lr` must be positive, got 0.0"),
        ({"lr": math.nan}, "`lr` must be positive, got nan"),
        ({"weight_decay": -1.0}, "`weight_decay` must be at least 0, got -1.0"),
        ({"lr": 20.0}, "`lr` times `weight_decay` must be below 1, got 2"),
        ({"momentum": 1.0}, r"`momentum` must be in \[0, 1\), got 1.0"),
        ({"gradient_norm": 0.0}, "`gradient_norm` must be positive, got 0.0"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    """The error names the argument, the rule and the value."""
    with pytest.raises(ValueError, match=message):
        F.equilibrium_rotation("sgd", **(SGD_RECIPE | settings))


def test_settings_that_do_not_fit() -> None:
    """Unknown families and settings, and missing ones, are named."""
    with pytest.raises(ValueError, match=r"`family` must be one of sgd, nesterov, .*, got 'adam'"):
        F.equilibrium_rotation("adam", **SGD_RECIPE)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`betas` is not a setting of family 'sgd', which has lr, weight_decay, "):
        F.equilibrium_rotation("sgd", betas=(0.9, 0.99), **SGD_RECIPE)
    with pytest.raises(TypeError, match="`shape` is needed for family 'muon'"):
        F.equilibrium_rotation("muon", **SGD_RECIPE)
    with pytest.raises(ValueError, match="`gradient_norm` and `entries` must be given"):
        F.equilibrium_rotation("adam_l2", **SGD_RECIPE)
    with pytest.raises(ValueError, match="`entries` must be given"):
        F.equilibrium_norm("adam_decoupled", **SGD_RECIPE)
    with pytest.raises(ValueError, match="`gradient_norm` must be given"):
        F.predicted_norm("sgd", [0.1], initial_norm=1.0, weight_decay=0.1)
    with pytest.raises(ValueError, match=r"`betas` must have 2 numbers, got \(0.9,\)"):
        F.equilibrium_rotation("lion", betas=(0.9,), **SGD_RECIPE)
    with pytest.raises(ValueError, match=r"`adjust_lr_fn` must be one of .*, got 'rms'"):
        F.equilibrium_rotation("muon", shape=(4, 4), adjust_lr_fn="rms", **SGD_RECIPE)


def test_where_there_is_no_equilibrium() -> None:
    """A drifting log-norm, a norm faster than the momentum, and steps longer than it are refused in words."""
    with pytest.raises(ValueError, match="'adafactor' has no equilibrium norm"):
        F.equilibrium_norm("adafactor", **SGD_RECIPE)
    with pytest.raises(ValueError, match=r"κ·S must be below 1, got "):
        F.equilibrium_half_life("sgd", lr=0.1, weight_decay=0.1, momentum=0.99)
    with pytest.raises(ValueError, match="`norm` must be large against the length of the steps"):
        F.predicted_rotation("adam_decoupled", 0.01, lr=1e-2, weight_decay=0.1, entries=400)
    with pytest.raises(ValueError, match=r"lr²·weight_decay·entries/gradient_norm must be below 1"):
        F.equilibrium_norm("adam_l2", lr=0.9, weight_decay=0.9, entries=400, gradient_norm=1e-3)


def test_families_are_those_of_the_type() -> None:
    """Every name in the type has its function, and the defaults of that are torch's."""
    assert list(FAMILIES) == list(get_args(FamilyName))
    for name in ("muon", "adam_l2", "adam_decoupled", "nadam_decoupled"):
        theirs = inspect.signature(
            CASES[{"muon": "Muon 16 × 64", "adam_l2": "Adam + L2"}.get(name, "AdamW")].make
        ).parameters
        for key, default in FAMILIES[name].defaults.items():
            if key in theirs:
                assert default == theirs[key].default, (name, key)
        assert theirs.keys() & {*FAMILIES[name].required} == {"lr", "weight_decay"}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_family_lists_what_its_equation_takes(family: Family) -> None:
    """Names and order of the settings, and who drifts; the tolerance that pictures show is that of most families."""
    parameters = inspect.signature(family.equation).parameters.values()
    wanted = [p.name for p in parameters if p.default is p.empty]  # one that `partial` has bound has a default
    assert list(family.settings) == wanted
    unit = {"shape": (4, 4)} if "shape" in family.required else {}
    assert family.settles == (family.balance({"lr": 0.1, "weight_decay": 0.1, **unit}).power > 0)
    assert family.tolerance == (0.35 if family.name == "muon" else EQUILIBRIUM_TOLERANCE)
