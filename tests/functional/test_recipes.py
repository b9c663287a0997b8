"""Recipes with decay against recipes without it, on real optimizers in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Muon, NAdam, Optimizer

from lightning_normreg import functional as F
from tests.random_walk import CASES, Walk
from tests.twins import Lion

STEPS = 60
# 60 steps of some dozen roundings of 2^-53, each of which a step may magnify a little.
EXACT = 1e-12
SCHEDULES: dict[str, Callable[[int], float]] = {
    "constant": lambda t: 1.0,
    "cosine": lambda t: (1 + math.cos(math.pi * t / STEPS)) / 2,
    "step": lambda t: 0.1 ** (t // 20),
    "warm-up": lambda t: min(1.0, (t + 1) / 20),
}
over_schedules = pytest.mark.parametrize("schedule", list(SCHEDULES))
DECAY = 0.5


def lrs_of(schedule: str, lr: float) -> list[float]:
    """Learning rates of all steps."""
    return [lr * SCHEDULES[schedule](t) for t in range(STEPS)]


def start() -> nn.Parameter:
    """The weight that every run starts from."""
    return nn.Parameter(torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))


def set_gradient(w: nn.Parameter, t: int) -> None:
    """Gradient of a loss that does not see the weight's norm, on the data of step t."""
    x = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(t + 1))
    w.grad = None
    unit = w / w.norm()
    (unit * x).sum().add((unit**2 * x).sum(), alpha=3.0).tanh().backward()


def train(
    optimizer: Optimizer,
    lrs: list[float],
    before: Callable[[int, dict[str, Any], nn.Parameter], None] = lambda t, group, w: None,
    after: Callable[[int, nn.Parameter], None] = lambda t, w: None,
) -> list[Tensor]:
    """The weight after each step."""
    (group,) = optimizer.param_groups
    (w,) = group["params"]
    weights = []
    for t, lr in enumerate(lrs):
        group["lr"] = lr
        set_gradient(w, t)
        before(t, group, w)
        optimizer.step()
        after(t, w)
        weights.append(w.detach().clone())
    return weights


def largest_angle(one: list[Tensor], other: list[Tensor]) -> float:
    """Largest angle between the two runs in any step, good for small ones."""
    angles = []
    for pair in zip(one, other, strict=True):
        a, b = (w / w.norm() for w in pair)
        angles.append(2 * math.atan2(float((a - b).norm()), float((a + b).norm())))
    return max(angles)


def rescale(optimizer: Optimizer, factor: float) -> None:
    """First moments and momentum by a factor, second moments by its square."""
    for state in optimizer.state.values():
        for key, degree in {"exp_avg": 1, "momentum_buffer": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}.items():
            if key in state:
                state[key].mul_(factor**degree)


@over_schedules
@pytest.mark.parametrize(
    "momentum, dampening, lr", [(0.0, 0.0, 0.3), (0.0, 0.5, 0.3), (0.9, 0.0, 5e-3), (0.9, 0.8, 0.02), (0.5, 0.0, 0.1)]
)
def test_sgd_with_coupled_decay(momentum: float, dampening: float, lr: float, schedule: str) -> None:
    """SGD and heavy ball without decay, at the converted learning rates, turn the weight as decay does."""
    lrs, settings = lrs_of(schedule, lr), {"momentum": momentum, "dampening": dampening}
    decayed = train(SGD([start()], lr=lr, weight_decay=DECAY, **settings), lrs)
    recipe = F.without_decay("sgd", lrs, DECAY, **settings)
    free = train(SGD([start()], lr=lr, **settings), recipe.lrs)
    assert largest_angle(decayed, free) < EXACT
    # The scale is the one between the two weights.
    torch.testing.assert_close(decayed[-1], recipe.scales[-1] * free[-1], rtol=EXACT, atol=EXACT)
    # Decay matters here, and so does the momentum's part in it.
    assert largest_angle(decayed, train(SGD([start()], lr=lr, **settings), lrs)) > 1e-3
    if momentum:
        naive = F.without_decay("sgd", lrs, DECAY).lrs
        assert largest_angle(decayed, train(SGD([start()], lr=lr, **settings), naive)) > 1e-3


@over_schedules
def test_scale_is_a_run_on_one_number(schedule: str) -> None:
    """Under heavy ball s is torch's SGD on 1.0 without gradient."""
    lrs = lrs_of(schedule, 0.01)
    w = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = SGD([w], lr=0.01, momentum=0.9, dampening=0.3, weight_decay=DECAY)
    scales = [1.0]
    for lr in lrs:
        optimizer.param_groups[0]["lr"] = lr
        w.grad = torch.zeros_like(w)
        optimizer.step()
        scales.append(float(w.detach()))
    assert F.without_decay("sgd", lrs, DECAY, momentum=0.9, dampening=0.3).scales == pytest.approx(scales, rel=1e-13)


def test_constant_rate_is_li_and_arora() -> None:
    """At a constant learning rate without momentum: lr·(1 − lr·decay)^(−2t−1)."""
    expected = [0.1 * (1 - 0.05) ** (-2 * t - 1) for t in range(STEPS)]
    assert F.without_decay("sgd", [0.1] * STEPS, 0.5).lrs == pytest.approx(expected, rel=1e-13)


@over_schedules
def test_sgd_with_decoupled_decay(schedule: str) -> None:
    """Where decay shrinks the weight itself, the momentum of each step is converted as well."""
    lr, momentum = 0.05, 0.9
    lrs = lrs_of(schedule, lr)

    def shrink(t: int, group: dict[str, Any], w: nn.Parameter) -> None:
        w.data.mul_(1 - group["lr"] * DECAY)

    decayed = train(SGD([start()], lr=lr, momentum=momentum), lrs, shrink)
    recipe = F.without_decay("sgd_decoupled", lrs, DECAY, momentum=momentum)

    def set_momentum(t: int, group: dict[str, Any], w: nn.Parameter) -> None:
        group["momentum"] = recipe.momenta[t]

    free = train(SGD([start()], lr=lr, momentum=momentum), recipe.lrs, set_momentum)
    assert largest_angle(decayed, free) < EXACT
    assert largest_angle(decayed, train(SGD([start()], lr=lr, momentum=momentum), recipe.lrs)) > 1e-4


ADAPTIVE: dict[str, tuple[Any, Callable[..., Optimizer], dict[str, Any]]] = {
    "AdamW": ("adam_decoupled", AdamW, {"eps": 1e-2}),
    "AMSGrad": ("adam_decoupled", AdamW, {"eps": 1e-2, "amsgrad": True}),
    "NAdamW": ("nadam_decoupled", NAdam, {"eps": 1e-2, "decoupled_weight_decay": True}),
    "Lion": ("lion", Lion, {}),
    "Muon": ("muon", Muon, {}),
}


@pytest.fixture
def exact_muon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets torch's Muon work in the float64 of the weights where it would go to bfloat16."""
    monkeypatch.setattr(Tensor, "bfloat16", Tensor.clone)
    as_it_sees_torch = SimpleNamespace(**vars(torch) | {"bfloat16": torch.float64})  # by which torch 2.15 says it
    monkeypatch.setattr("torch.optim._muon.torch", as_it_sees_torch)


@over_schedules
@pytest.mark.parametrize("name", list(ADAPTIVE))
@pytest.mark.usefixtures("exact_muon")
def test_decoupled_decay(name: str, schedule: str) -> None:
    """AdamW, NAdamW, Lion and Muon without decay turn alike if state and eps follow the scale, and only then."""
    family, make, options = ADAPTIVE[name]
    lr = 0.03
    lrs = lrs_of(schedule, lr)
    decayed = train(make([start()], lr=lr, weight_decay=DECAY, **options), lrs)
    recipe = F.without_decay(family, lrs, DECAY)
    optimizer = make([start()], lr=lr, weight_decay=0.0, **options)

    def follow(t: int, group: dict[str, Any], w: nn.Parameter) -> None:
        if t:
            rescale(optimizer, recipe.scales[t] / recipe.scales[t - 1])
        if "eps" in options:
            group["eps"] = options["eps"] * recipe.scales[t]

    assert largest_angle(decayed, train(optimizer, recipe.lrs, follow)) < EXACT
    lr_alone = train(make([start()], lr=lr, weight_decay=0.0, **options), recipe.lrs)
    assert largest_angle(decayed, lr_alone) > 1e-4


@over_schedules
def test_muon_in_bfloat16(schedule: str) -> None:
    """As it is, Muon rounds to 2^-8, which does not commute with factors that are no powers of 2."""
    lrs = lrs_of(schedule, 0.01)
    decayed = train(Muon([start()], lr=0.01, weight_decay=DECAY), lrs)
    recipe = F.without_decay("muon", lrs, DECAY)
    optimizer = Muon([start()], lr=0.01, weight_decay=0.0)

    def follow(t: int, group: dict[str, Any], w: nn.Parameter) -> None:
        if t:
            rescale(optimizer, recipe.scales[t] / recipe.scales[t - 1])

    # 2^-8 of the way, which is at most 60 steps of 0.01 times sqrt(5 · 1.2) over a norm of 5: 1e-3, in one direction.
    assert largest_angle(decayed, train(optimizer, recipe.lrs, follow)) < 3e-3


@over_schedules
@pytest.mark.parametrize("name, radius", [("SGD", 0.7), ("AdamW", 0.7), ("Lion", 3.0), ("Muon", 3.0)])
@pytest.mark.usefixtures("exact_muon")
def test_decay_as_projection(name: str, radius: float, schedule: str) -> None:
    """Projection after each step, with the norm under decay carried along as a number, is decay."""
    _, make, options = ADAPTIVE.get(name, ("sgd", SGD, {}))
    lr, exponent = (0.3, 2) if name == "SGD" else (0.03, 1)
    lrs = lrs_of(schedule, lr)
    decayed = train(make([start()], lr=lr, weight_decay=DECAY, **options), lrs)
    w = start()
    virtual = [float(w.norm().detach())]
    w.data.mul_(radius / virtual[0])
    optimizer = make([w], lr=lr, weight_decay=0.0, **options)

    def convert(t: int, group: dict[str, Any], w: nn.Parameter) -> None:
        group["lr"] = F.matched_lr(lrs[t], DECAY, norm=radius, decayed_norm=virtual[t], exponent=exponent)
        if name == "AdamW":
            group["eps"] = options["eps"] * virtual[t] / radius

    def project(t: int, w: nn.Parameter) -> None:
        growth = float(w.norm().detach()) / radius
        virtual.append(virtual[t] * (1 - lrs[t] * DECAY) * growth)
        w.data.div_(growth)
        rescale(optimizer, virtual[-1] / virtual[-2])

    assert largest_angle(decayed, train(optimizer, lrs, convert, project)) < EXACT
    assert virtual[-1] == pytest.approx(float(decayed[-1].norm()), rel=EXACT)


@over_schedules
def test_norms_of_a_run_with_decay(schedule: str) -> None:
    """Hoffer's correction by recorded norms is exact with the factor 1/(1 − lr·decay), and close without."""
    lr = 0.3
    lrs = lrs_of(schedule, lr)
    decayed = train(SGD([start()], lr=lr, weight_decay=DECAY), lrs)
    norms = [float(w.norm()) for w in [start().detach(), *decayed]]

    def matched(t: int, group: dict[str, Any], w: nn.Parameter) -> None:
        norm = float(w.detach().norm())
        group["lr"] = F.matched_lr(lrs[t], DECAY, norm=norm, decayed_norm=norms[t], exponent=2)

    def without_the_factor(t: int, group: dict[str, Any], w: nn.Parameter) -> None:
        group["lr"] = lrs[t] * float(w.detach().norm()) ** 2 / norms[t] ** 2

    assert largest_angle(decayed, train(SGD([start()], lr=lr), lrs, matched)) < EXACT
    plain = largest_angle(decayed, train(SGD([start()], lr=lr), lrs))
    assert 1e-4 < largest_angle(decayed, train(SGD([start()], lr=lr), lrs, without_the_factor)) < plain


@over_schedules
@pytest.mark.parametrize("family, momentum", [("sgd", 0.0), ("sgd", 0.9), ("sgd_decoupled", 0.9), ("lion", 0.0)])
def test_there_and_back(family: Any, momentum: float, schedule: str) -> None:
    """Decay that is taken out and put in again gives the same learning rates, momenta and scales."""
    lrs = lrs_of(schedule, 5e-3)
    there = F.without_decay(family, lrs, DECAY, momentum=momentum, dampening=0.1)
    listed = there.momenta if family == "sgd_decoupled" else momentum
    back = F.with_decay(family, there.lrs, DECAY, momentum=listed, dampening=0.1)
    # 60 steps of a few roundings each.
    assert back.lrs == pytest.approx(lrs, rel=EXACT, abs=1e-16)
    assert back.momenta == pytest.approx([momentum] * STEPS, rel=EXACT)
    assert back.scales == pytest.approx(there.scales, rel=EXACT)


@over_schedules
def test_decay_added_to_a_schedule_without(schedule: str) -> None:
    """A plain schedule and its twin with decay turn the weight alike."""
    lrs = lrs_of(schedule, 0.02)
    recipe = F.with_decay("sgd", lrs, DECAY, momentum=0.9)
    plain = train(SGD([start()], lr=0.1, momentum=0.9), lrs)
    decayed = train(SGD([start()], lr=0.1, momentum=0.9, weight_decay=DECAY), recipe.lrs)
    assert largest_angle(plain, decayed) < EXACT


def test_nesterov_is_only_approximate() -> None:
    """The recipe of heavy ball, with s of Nesterov's own scalar run, is better than nothing, not exact, and refused."""
    lr, settings = 5e-3, {"momentum": 0.9, "nesterov": True}
    number = SGD([nn.Parameter(torch.ones(1, dtype=torch.float64))], lr=lr, weight_decay=DECAY, **settings)
    (s,) = number.param_groups[0]["params"]
    scales = [1.0]
    for _ in range(STEPS):
        s.grad = torch.zeros_like(s)
        number.step()
        scales.append(float(s.detach()))
    lrs = [lr / (a * b) for a, b in itertools.pairwise(scales)]
    decayed = train(SGD([start()], lr=lr, weight_decay=DECAY, **settings), [lr] * STEPS)
    error = largest_angle(decayed, train(SGD([start()], lr=lr, **settings), lrs))
    plain = largest_angle(decayed, train(SGD([start()], lr=lr, **settings), [lr] * STEPS))
    assert 1e-6 < error < plain / 3
    with pytest.raises(ValueError, match="`family` 'nesterov' has no exact conversion: its conversion is only approx"):
        F.without_decay("nesterov", [lr], DECAY)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: F.without_decay("adam_l2", [0.1], 0.1), "'adam_l2' has no exact conversion: its decay is divided"),
        (lambda: F.without_decay("adagrad", [0.1], 0.1), "`family` must be one of sgd, .*, got 'adagrad'"),
        (lambda: F.without_decay("sgd", [-0.1], 0.1), "`lrs` must be at least 0, got -0.1"),
        (lambda: F.without_decay("sgd", [0.1], -0.1), "`weight_decay` must be at least 0, got -0.1"),
        (lambda: F.with_decay("sgd", [0.1], 0.1, momentum=1.0), r"`momentum` must be in \[0, 1\), got 1.0"),
        (
            lambda: F.without_decay("sgd", [0.02] * 400, 1.0, momentum=0.9),
            r"overshooting 0: .*, got 0.02 against 0.00263",
        ),
        (
            lambda: F.without_decay("lion", [2.0], 0.5),
            "`weight_decay` must let the weight shrink without overshooting 0",
        ),
        (lambda: F.matched_lr(0.1, 0.1, norm=0.0, decayed_norm=1.0, exponent=2), "`norm` must be positive, got 0.0"),
        (lambda: F.matched_lr(0.1, 0.1, norm=1.0, decayed_norm=1.0, exponent=0), "`exponent` must be 1 or 2, got 0"),
        (lambda: F.matched_lr(2.0, 0.5, norm=1.0, decayed_norm=1.0, exponent=2), "must be in .*, got 1. Use"),
        (
            lambda: F.suggest_projection("lamb", lr=0.1, weight_decay=0.1, entries=4),
            "'lamb' turns by its learning rate at any radius",
        ),
        (
            lambda: F.suggest_projection("lion", radius=0.0, lr=0.1, weight_decay=0.1, entries=4),
            "`radius` must be positive, got 0.0",
        ),
    ],
)
def test_words_for_what_does_not_convert(call: Callable[[], Any], message: str) -> None:
    """Refused recipes and arguments out of range name the argument, the rule and the value."""
    with pytest.raises(ValueError, match=message):
        call()


def test_heavy_ball_up_to_its_bound() -> None:
    """At lr·(1 − dampening)·decay = (1 − √momentum)² the scalar never overshoots, however long the run."""
    bound = (1 - math.sqrt(0.9)) ** 2
    assert F.without_decay("sgd", [0.999 * bound] * 2000, 1.0, momentum=0.9).scales[-1] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SGD", "momentum 0.9", "AdamW", "Lion, ηλ = 1e-3", "Muon 16 × 64"])
@pytest.mark.parametrize("radius", [None, 2.5])
def test_suggested_projection(name: str, radius: float | None) -> None:
    """Under pure noise, projection at the suggested radius and learning rate turns as decay does at equilibrium."""
    case = CASES[name]
    recipe = case.recipe()
    suggestion = F.suggest_projection(case.family, radius=radius, **recipe)
    assert radius in (None, suggestion.radius)
    walk = Walk(case, suggestion.radius, seed=0)
    walk.optimizer.param_groups[0].update(lr=suggestion.lr, weight_decay=0.0)
    steps, cosines = 400, 0.0
    for _ in range(steps):
        ((_, cosine),) = walk.run(1)
        factors = (suggestion.radius / walk.norms()).repeat_interleave(case.shape[0] // case.units).unsqueeze(1)
        walk.weight.data.mul_(factors)
        cosines += float(cosine.mean())
    # The square of an update's norm scatters by sqrt(2/C) of itself per unit, for some S steps: less than 0.3 % of the
    # mean angle. What the suggestion leaves out is of the order of ηλS: 2 % for AdamW, 6 % for Lion, 3 % for Muon.
    correlation = recipe["lr"] * recipe["weight_decay"] * 60
    expected = F.equilibrium_rotation(case.family, **recipe)
    assert math.acos(cosines / steps) == pytest.approx(expected, rel=0.01 + correlation / 2)
