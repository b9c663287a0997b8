"""Learning-rate schedulers go on after a group was split off, and when that run is resumed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer, lr_scheduler, swa_utils

from lightning_normreg import accept_rescaled, rescale_
from lightning_normreg._param_groups._scheduler_rates import _KNOWN, highest_rates

Scheduler = Any
STEPS, RESCALED, SAVED = 12, 5, 8


class Ramp:
    """A function with a state, which schedulers save."""

    def __init__(self, slope: float) -> None:
        self.slope = slope

    def __call__(self, epoch: int) -> float:
        """The factor of an epoch."""
        return 1 + self.slope * epoch


SCHEDULERS: dict[str, Callable[[Optimizer], Scheduler]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda t: 0.9**t, lambda t: 0.8**t]),
    "LambdaLR-objects": lambda o: lr_scheduler.LambdaLR(o, [Ramp(0.1), Ramp(0.2)]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, gamma=0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 7], gamma=0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, factor=0.5, total_iters=7),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=9),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=10, power=2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=STEPS),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=4),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, [0.01, 0.02], [0.1, 0.2], step_size_up=3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, [0.1, 0.2], total_steps=STEPS + 1),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, min_lr=[0.03, 0.01]),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, total_iters=7), lr_scheduler.LambdaLR(o, lambda t: 0.9**t)],
        milestones=[7],
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, total_iters=6), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: swa_utils.SWALR(o, [0.01, 0.02], anneal_epochs=9),
}


def make(name: str) -> tuple[list[nn.Parameter], Optimizer, Scheduler]:
    """Three weights in two groups, and the scheduler."""
    weights = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    optimizer = SGD([{"params": weights[:2]}, {"params": weights[2:], "lr": 0.2}], lr=0.1, momentum=0.9)
    return weights, optimizer, SCHEDULERS[name](optimizer)


def step(weights: list[nn.Parameter], optimizer: Optimizer, scheduler: Scheduler) -> dict[int, tuple[float, float]]:
    """Learning rate and momentum of every weight in a step."""
    for w in weights:
        w.grad = torch.ones_like(w)
    optimizer.step()
    used = {
        i: (g["lr"], g["momentum"])
        for g in optimizer.param_groups
        for i, w in enumerate(weights)
        if w in set(g["params"])
    }
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(1.0)
    else:
        scheduler.step()
    return used


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("which", [1, 2], ids=["split off", "alone"])
def test_the_schedule_goes_on(name: str, which: int) -> None:
    """The weight's learning rates are c^p times those of the run without, all others are the same."""
    plain, other = make(name), make(name)
    states: Any = None
    for t in range(STEPS):
        if t == RESCALED:
            rescale_(other[1], other[0][which], 3.0, schedulers=[other[2]])
        if t == SAVED:
            states = copy.deepcopy((other[1].state_dict(), other[2].state_dict()))
            expected = []
        used, there = step(*plain), step(*other)
        if t >= RESCALED:
            lr, momentum = used[which]
            # A few dozen roundings of 2^-53, of which PolynomialLR multiplies some.
            assert there[which] == pytest.approx((9.0 * lr, momentum), rel=1e-12)
            used[which] = there[which]
        assert there == used
        assert other[2].get_last_lr() == [group["lr"] for group in other[1].param_groups]
        if t >= SAVED:
            expected.append(there)

    weights, optimizer, scheduler = make(name)
    accept_rescaled(optimizer, [scheduler])
    optimizer.load_state_dict(states[0])
    scheduler.load_state_dict(states[1])
    assert [step(weights, optimizer, scheduler) for _ in range(SAVED, STEPS)] == expected


def test_two_weights_of_one_group_and_one_again() -> None:
    """Groups are split in the same order when the run is resumed; a group of one weight is not split."""
    weights, optimizer, scheduler = make("StepLR")
    for which, factor in ((1, 2.0), (0, 3.0), (1, 5.0)):
        rescale_(optimizer, weights[which], factor, schedulers=[scheduler])
    fresh = make("StepLR")
    accept_rescaled(fresh[1], [fresh[2]])
    for made in ((weights, optimizer, scheduler), fresh):
        places = [[i for w in g["params"] for i in range(3) if made[0][i] is w] for g in made[1].param_groups]
        assert places == ([[0], [2], [1]] if made[1] is optimizer else [[0, 1], [2]])
    fresh[1].load_state_dict(optimizer.state_dict())
    for a, b in zip(optimizer.param_groups, fresh[1].param_groups, strict=True):
        assert {k: v for k, v in a.items() if k != "params"} == {k: v for k, v in b.items() if k != "params"}
    assert [g["lr"] for g in fresh[1].param_groups] == pytest.approx([0.9, 0.2, 10.0])


def test_every_scheduler_of_torch_is_tried() -> None:
    """When torch adds one, somebody has to find out what it keeps."""
    found = {
        c
        for c in vars(lr_scheduler).values()
        if isinstance(c, type) and issubclass(c, lr_scheduler.LRScheduler) and not c.__name__.endswith("LRScheduler")
    }
    assert found | {swa_utils.SWALR} == set(_KNOWN)
    assert {type(make(name)[2]) for name in SCHEDULERS} == set(_KNOWN)


def test_a_scheduler_that_is_not_told_of() -> None:
    """It would fail at its next step, or set the wrong group's learning rate."""
    weights, optimizer, _ = make("StepLR")
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="`schedulers` must name the learning-rate schedulers of this SGD, got none"):
        rescale_(optimizer, weights[0], 2.0)
    with pytest.raises(ValueError, match="`schedulers` must name the learning-rate schedulers of this SGD, got none"):
        accept_rescaled(optimizer)
    assert optimizer.state_dict() == before
    assert torch.equal(weights[0], torch.ones(2))


def test_a_scheduler_of_ones_own() -> None:
    """What it keeps of each group is not known."""

    class Own(lr_scheduler.StepLR):
        pass

    weights, optimizer, _ = make("StepLR")
    nested = lr_scheduler.ChainedScheduler([Own(optimizer, 2)])
    with pytest.raises(
        TypeError, match=r"`schedulers` must be those of torch\.optim, got Own, of which it is not known"
    ):
        rescale_(optimizer, weights[0], 2.0, schedulers=[nested])


def test_a_scheduler_of_another_optimizer() -> None:
    """It is a mistake."""
    weights, optimizer, _ = make("StepLR")
    with pytest.raises(ValueError, match="`schedulers` must be those of `optimizer`, got a StepLR of another one"):
        rescale_(optimizer, weights[0], 2.0, schedulers=[make("StepLR")[2]])


@pytest.mark.parametrize(
    "cls, options",
    [(lr_scheduler.CosineAnnealingLR, {"T_max": 9}), (lr_scheduler.CosineAnnealingWarmRestarts, {"T_0": 9})],
)
def test_a_bound_that_all_groups_share(cls: Any, options: dict[str, Any]) -> None:
    """It cannot be multiplied for one of them, except where no learning rate changes."""
    weights = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = SGD(weights, lr=0.1)
    scheduler = cls(optimizer, eta_min=0.01, **options)
    with pytest.raises(ValueError, match=rf"`eta_min` of {cls.__name__} must be 0, got 0\.01"):
        rescale_(optimizer, weights[0], 2.0, schedulers=[scheduler])
    relative = torch.optim.Adafactor(weights)
    assert rescale_(relative, weights[0], 2.0, schedulers=[cls(relative, eta_min=0.01, **options)])["lr"] == 1e-2


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "ReduceLROnPlateau"])
@pytest.mark.parametrize("start", [0, 5])
@pytest.mark.parametrize("every", [1, 3])
def test_a_schedule_run_ahead_reaches_what_the_run_does(name: str, start: int, every: int) -> None:
    """From the beginning and from the middle, bit for bit; nobody notices."""
    weights, optimizer, scheduler = make(name)
    for _ in range(start):
        step(weights, optimizer, scheduler)

    def kept() -> str:
        groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        return repr((groups, scheduler.state_dict()))

    before = kept()
    rates = highest_rates(optimizer, [(scheduler, lambda t: t % every == 0)], range(start + 1, STEPS + 1))
    assert kept() == before
    real = [group["lr"] for group in optimizer.param_groups]
    for t in range(start + 1, STEPS):
        optimizer.step()
        if t % every == 0:
            scheduler.step()
        real = [max(a, group["lr"]) for a, group in zip(real, optimizer.param_groups, strict=True)]
    assert rates == real


def test_what_cannot_be_run_ahead() -> None:
    """A scheduler that follows a metric, or computes something of its own; one that is only made otherwise can."""

    class Own(lr_scheduler.StepLR):
        def get_lr(self) -> Any:
            return super().get_lr()

    class Halves(lr_scheduler.StepLR):
        def __init__(self, optimizer: Optimizer) -> None:
            super().__init__(optimizer, 1, gamma=0.5)

    weight = nn.Parameter(torch.ones(2))
    optimizer = SGD([weight], lr=0.1)
    for scheduler in (lr_scheduler.ReduceLROnPlateau(optimizer), Own(optimizer, 1)):
        with pytest.raises(TypeError, match=f"what {type(scheduler).__name__} will do is not known beforehand"):
            highest_rates(optimizer, [(scheduler, bool)], range(1, 5))
    assert highest_rates(optimizer, [(Halves(optimizer), bool)], range(1, 5)) == [0.1]


def test_the_models_method_is_called_on_numbers_and_not_copied() -> None:
    """At most 100 000 times; tensors that are learning rates stay as they are."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.asked = nn.Parameter(torch.ones(2)), []

        def factor(self, t: int) -> float:
            self.asked.append(t)
            return 1.0 + t

        def __deepcopy__(self, memo: Any) -> Any:
            raise AssertionError("copied")

    model = Model()
    optimizer = SGD([model.weight], lr=torch.tensor(1.0))
    scheduler = lr_scheduler.LambdaLR(optimizer, model.factor)
    assert highest_rates(optimizer, [(scheduler, bool)], range(1, 10**9)) == [1e5]
    assert model.asked == [0, *range(1, 10**5)]
    assert optimizer.param_groups[0]["lr"].item() == 1.0
