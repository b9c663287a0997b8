"""When an optimizer's groups are changed: between closure and arithmetic, and at no other time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import nn
from torch.optim import SGD, Optimizer

from lightning_normreg.steps import StepDispatcher, StepSubscriber, watch
from lightning_normreg.steps._decay_corrector import DecayCorrector

LR, DECAY, PEAK = 0.1, 0.5, 0.4


class Twice(SGD):
    """Evaluates its closure twice in a step, as line searches do, and computes with the groups that it then has."""

    def step(self, closure: Any = None) -> Any:
        """The second evaluation is at other weights."""
        for shift in (0.0, 1.0):
            with torch.enable_grad():
                loss = closure()
            assert len(self.param_groups) == 2  # split: it is the optimizer's turn
            with torch.no_grad():
                for group in self.param_groups:
                    for p in group["params"]:
                        p.add_(shift)
                        if shift:
                            p.sub_(group["lr"] * (p.grad + group["weight_decay"] * p))
        return loss


class Raises(SGD):
    """Its arithmetic raises when it is told to."""

    fails = False

    def step(self, closure: Any = None) -> Any:
        """SGD, or an exception."""
        if closure is not None:
            closure()
        if self.fails:
            raise ArithmeticError("no step")
        return super().step()


def start(kind: type[Optimizer]) -> tuple[Any, Any, Any, StepDispatcher, Callable[[], Any]]:
    """A target, another weight, the optimizer with both in one group, its dispatcher, and a closure."""
    torch.manual_seed(0)
    net = nn.ModuleDict({"a": nn.Linear(3, 2, bias=False), "b": nn.Linear(3, 2, bias=False)}).double()
    a, b = net["a"].weight, net["b"].weight
    optimizer: Any = kind([a, b], lr=LR, weight_decay=DECAY)
    corrector = DecayCorrector(watch(net, include=["a.weight"]), PEAK)
    dispatcher = StepDispatcher()
    dispatcher.subscribe(corrector)
    dispatcher.attach([optimizer])

    def closure() -> Any:
        """The user's code: one group, with its own decay."""
        (group,) = optimizer.param_groups
        assert (len(group["params"]), group["weight_decay"]) == (2, DECAY)
        optimizer.zero_grad()
        loss = (a**2).sum() + (b**2).sum()
        loss.backward()
        return loss

    return a, b, optimizer, dispatcher, closure


def sgd(weight: Any, decay: float) -> Any:
    """One step on the sum of squares."""
    return weight - LR * (2 * weight + decay * weight)


@pytest.mark.parametrize("way", ["argument", "keyword", "none", "scaler"])
def test_with_and_without_a_closure(way: str) -> None:
    """SGD by hand, to float64 roundoff; the groups are the user's list again after the step."""
    a, b, optimizer, _, closure = start(SGD)
    before, groups = [a.detach().clone(), b.detach().clone()], optimizer.param_groups
    if way == "none":
        closure()
        assert optimizer.step() is None
    elif way == "scaler":
        closure()
        scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
        scaler.scale(torch.zeros(()))  # its state is made when a loss is first scaled
        scaler.step(optimizer)
    else:
        loss = optimizer.step(closure) if way == "argument" else optimizer.step(closure=closure)
        assert loss.item() == pytest.approx(sum((w**2).sum().item() for w in before), rel=1e-14)
    assert a.detach() == pytest.approx(sgd(before[0], DECAY * LR / PEAK), rel=1e-14)
    assert b.detach() == pytest.approx(sgd(before[1], DECAY), rel=1e-14)
    assert optimizer.param_groups is groups


def test_a_closure_that_is_evaluated_again() -> None:
    """Restored before each evaluation, split after it."""
    a, b, optimizer, _, closure = start(Twice)
    before, groups = [a.detach().clone(), b.detach().clone()], optimizer.param_groups
    optimizer.step(closure)
    for w, old, decay in ((a, before[0], DECAY * LR / PEAK), (b, before[1], DECAY)):
        assert w.detach() == pytest.approx(old + 1 - LR * (2 * old + decay * (old + 1)), rel=1e-14)
    assert optimizer.param_groups is groups


@pytest.mark.parametrize("where", ["closure", "arithmetic", "arithmetic without a closure"])
def test_a_step_that_raises(where: str) -> None:
    """After an exception in the closure at once; after one in the arithmetic when the dispatcher is heard of again."""
    a, _, optimizer, dispatcher, closure = start(Raises)
    groups = optimizer.param_groups

    def broken() -> Any:
        raise ArithmeticError("no step")

    closure()
    optimizer.fails = where != "closure"
    with pytest.raises(ArithmeticError, match="no step"):
        optimizer.step({"closure": broken, "arithmetic": closure}.get(where))
    if where != "closure":
        dispatcher.attach([optimizer])
    assert optimizer.param_groups is groups
    optimizer.fails = False
    before = a.detach().clone()
    optimizer.step(closure)
    assert a.detach() == pytest.approx(sgd(before, DECAY * LR / PEAK), rel=1e-14)
    optimizer.fails = True
    with pytest.raises(ArithmeticError, match="no step"):
        optimizer.step(closure)
    dispatcher.remove()
    assert optimizer.param_groups is groups


def test_a_step_without_gradients_puts_the_groups_back() -> None:
    """No update is told of, and nothing stays changed."""
    _, _, optimizer, dispatcher, _ = start(SGD)
    groups = optimizer.param_groups
    optimizer.step()
    assert optimizer.param_groups is groups
    assert not dispatcher.has_seen_updates


class Order(StepSubscriber):
    """Writes down what it is told."""

    def __init__(self, told: list[str]) -> None:
        super().__init__()
        self.told = told

    def before_step(self, index: int, optimizer: Optimizer) -> None:
        """First."""
        self.told.append("before_step")

    def change_groups(self, index: int, optimizer: Optimizer) -> None:
        """After the closure."""
        self.told.append("change_groups")

    def after_step(self, index: int, optimizer: Optimizer, skipped: Any) -> None:
        """After the arithmetic."""
        self.told.append("after_step")

    def restore_groups(self, index: int, optimizer: Optimizer) -> None:
        """Last."""
        self.told.append("restore_groups")


def test_hooks_of_the_user_come_before_and_after() -> None:
    """Also those that are registered later, from the next time that the dispatcher is attached."""
    weight = nn.Parameter(torch.ones(2))
    optimizer, told = SGD([weight], lr=0.1), []
    dispatcher = StepDispatcher()
    dispatcher.subscribe(Order(told))
    dispatcher.attach([optimizer])
    optimizer.register_step_pre_hook(lambda *_: told.append("pre-hook"))
    optimizer.register_step_post_hook(lambda *_: told.append("post-hook"))
    dispatcher.attach([optimizer])

    def closure() -> Any:
        told.append("closure")
        (weight**2).sum().backward()

    optimizer.step(closure)
    events = ["before_step", "closure", "change_groups", "after_step", "restore_groups"]
    assert told == ["pre-hook", *events, "post-hook"]
    dispatcher.remove()
    optimizer.step(closure)
    assert told[len(events) + 2 :] == ["pre-hook", "closure", "post-hook"]


def test_the_highest_rate_so_far_goes_on_from_its_state(monkeypatch: Any) -> None:
    """What a schedule is told to reach counts; going above that is said once; a state has it."""
    monkeypatch.setattr(rank_zero_only, "rank", 0, raising=False)  # which Lightning sets when it is imported
    a, _, optimizer, dispatcher, closure = start(SGD)
    net = nn.ModuleDict({"a": nn.Linear(3, 2, bias=False)})
    net["a"].weight = a
    dispatcher.remove()
    corrector = DecayCorrector(watch(net))
    corrector.expect(0, [0.2])
    dispatcher = StepDispatcher()
    dispatcher.subscribe(corrector)
    dispatcher.attach([optimizer])

    def step(peak: float) -> None:
        before, lr = a.detach().clone(), optimizer.param_groups[0]["lr"]
        optimizer.step(closure)
        decay = DECAY * lr / peak
        assert a.detach() == pytest.approx(before - lr * (2 * before + decay * before), rel=1e-14)

    step(0.2)
    optimizer.param_groups[0]["lr"] = 0.25
    with pytest.warns(UserWarning, match=r"the learning rate 0\.25 is above 0\.2, the highest that the schedule was"):
        step(0.25)
    optimizer.param_groups[0]["lr"] = 0.26
    step(0.26)
    optimizer.param_groups[0]["lr"] = 0.1
    dispatcher.unsubscribe(corrector)
    resumed = DecayCorrector(watch(net))
    resumed.load_state_dict(corrector.state_dict())
    dispatcher.subscribe(resumed)
    step(0.26)
