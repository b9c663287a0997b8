from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from lightning_normreg import register_update_rule
from lightning_normreg._optimizers import UpdateRule, _lookup, update_rule, why_no_rule


@pytest.fixture(autouse=True)
def own_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(_lookup, "_REGISTERED", dict(_lookup._REGISTERED))


def over_one(cls: Callable[..., Optimizer], **options: Any) -> Optimizer:
    """An optimizer of one parameter."""
    return cls([nn.Parameter(torch.ones(2))], **options)


@pytest.mark.parametrize(
    "cls, options, exponent, decay",
    [
        (SGD, {"lr": 0.1}, 2, "coupled"),
        (Adam, {}, 1, "coupled"),
        (Adam, {"decoupled_weight_decay": True}, 1, "decoupled"),
        (AdamW, {}, 1, "decoupled"),
        (RMSprop, {}, 1, "coupled"),
    ],
)
def test_rules(cls: type[Optimizer], options: dict[str, Any], exponent: int, decay: str) -> None:
    """The optimizers of torch that are described have their exponent and their kind of decay."""
    optimizer = over_one(cls, **options)
    rule = update_rule(optimizer)
    assert rule is not None
    assert (rule.exponent, rule.decay) == (exponent, decay)


@pytest.mark.parametrize(
    "cls, why",
    [
        (torch.optim.LBFGS, "takes steps of the size that its closure and its past steps suggest"),
        (torch.optim.SparseAdam, "moves only the entries that have a gradient"),
    ],
)
def test_no_rule(cls: type[Optimizer], why: str) -> None:
    """An optimizer whose steps do not go with any power of the norm has no rule, and why is said."""
    assert update_rule(over_one(cls)) is None
    assert why_no_rule(over_one(cls)).startswith(why)


def test_nothing_is_known() -> None:
    """An optimizer that nobody has described has neither a rule nor a reason."""
    optimizer = over_one(fresh()["base"])
    assert update_rule(optimizer) is None
    assert why_no_rule(optimizer) == ""


def test_rule_of_a_group() -> None:
    """Settings that a rule depends on are those of the group."""
    weights = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = Adam([{"params": weights[:1]}, {"params": weights[1:], "decoupled_weight_decay": True}])
    rules = [update_rule(optimizer, group) for group in optimizer.param_groups]
    assert [rule and (rule.decay, rule.family) for rule in rules] == [
        ("coupled", "adam_l2"),
        ("decoupled", "adam_decoupled"),
    ]


@pytest.mark.parametrize(
    "cls, options, gain",
    [
        (SGD, {}, 1.0),
        (SGD, {"dampening": 0.5}, 1.0),  # which is ignored without momentum
        (SGD, {"momentum": 0.9}, 10.0),
        (SGD, {"momentum": 0.9, "dampening": 0.5}, 5.0),
        (SGD, {"momentum": 0.9, "nesterov": True}, 10.0),
        (RMSprop, {"momentum": 0.5}, 2.0),
        (Adam, {}, 1.0),
    ],
)
def test_momentum_gain_measured(cls: type[Optimizer], options: dict[str, Any], gain: float) -> None:
    """Without momentum's start, a run on a constant gradient is as long as one at gain times the learning rate."""
    # RMSprop and Adam divide the gradient by its size, once their averages have forgotten their start: 1000 steps of
    # at least 1 %, so 4e-5 of it is left.
    lengths = []
    for setting in (options, {}):
        w = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        optimizer = cls([w], lr=1e-2, **setting)
        for t in range(1001):
            before = w.detach().clone()
            w.grad = torch.ones_like(w) if t else torch.zeros_like(w)
            optimizer.step()
        lengths.append(float((w.detach() - before).norm()))
        if setting is options:
            rule = update_rule(optimizer)
            assert rule is not None
            assert rule.momentum_gain(optimizer.param_groups[0]) == pytest.approx(gain, rel=1e-12)
    assert lengths[0] / lengths[1] == pytest.approx(gain, rel=1e-3)


def test_learning_rate_is_read_live() -> None:
    """A rule reads the learning rate of the group as it stands, a number or a tensor."""
    optimizer = over_one(SGD, lr=0.1)
    rule, group = update_rule(optimizer), optimizer.param_groups[0]
    assert rule is not None
    assert rule.lr(group) == 0.1
    group["lr"] = tensor = torch.tensor(0.3)
    assert rule.lr(group) is tensor


def fresh() -> dict[str, type[Optimizer]]:
    """A described optimizer, a subclass that shares its step, one of that, and one with a step of its own."""

    class Base(Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": 0.1})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            """Nothing."""

    class Shares(Base):
        def zero_grad(self, set_to_none: bool = True) -> None:
            """Nothing either."""

    class SharesToo(Shares):
        pass

    class Own(Shares):
        def step(self, closure: Any = None) -> None:
            """Its own."""
            super().step(closure)

    return {"base": Base, "shares": Shares, "shares_too": SharesToo, "own": Own}


@pytest.mark.parametrize("first", ["base", "shares", "shares_too", "own"])
def test_subclass(first: str) -> None:
    """A subclass has the rule of its parent while it shares its step, whichever class was instantiated first."""
    # torch wraps `step` of a class when the first object of it is made, so each case needs classes of its own.
    classes = fresh()
    register_update_rule(classes["base"], exponent=1, decay="none")
    over_one(classes[first])
    rules = {name: update_rule(over_one(cls)) for name, cls in classes.items()}
    rule = UpdateRule(exponent=1, decay="none", state_degrees=None)
    assert rules == {"base": rule, "shares": rule, "shares_too": rule, "own": None}


@pytest.mark.parametrize("first", ["subclass", "parent"])
@pytest.mark.parametrize("cls", [SGD, Adam, RMSprop])
def test_subclass_of_torch(cls: type[Optimizer], first: str) -> None:
    """The same holds for the optimizers of torch, whose `step` is wrapped twice; their classes are loaded anew."""
    spec = importlib.util.spec_from_file_location("torch.optim.loaded_anew", inspect.getfile(cls))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    parent = getattr(module, cls.__name__)
    parent.__module__ = __name__  # whoever looks for all optimizers (jsonargparse) imports their modules
    assert not hasattr(parent.step, "hooked")
    rule = UpdateRule(exponent=1, decay="coupled", state_degrees=None)
    register_update_rule(parent, exponent=rule.exponent, decay=rule.decay)
    shares = type("Shares", (parent,), {})
    own = type("Own", (parent,), {"step": lambda self, closure=None: None})
    for made in (shares, own, parent) if first == "subclass" else (parent, own, shares):
        over_one(made, lr=0.1)
    assert [update_rule(over_one(made, lr=0.1)) for made in (shares, own, parent)] == [rule, None, rule]


def test_register() -> None:
    """A registered rule is found for the class and for its subclasses; a second one replaces it."""
    classes = fresh()
    register_update_rule(classes["base"], exponent=0, decay="decoupled", lr_key="rate")
    optimizer = over_one(classes["shares"])
    rule = update_rule(optimizer)
    assert rule == UpdateRule(exponent=0, decay="decoupled", lr_key="rate", state_degrees=None)
    assert rule is not None
    assert rule.lr({"rate": 0.3, "lr": 0.1}) == 0.3
    degrees = {"momentum": -1}
    register_update_rule(classes["base"], exponent=2, decay="coupled", state_degrees=degrees, group_degrees={"eps": -1})
    assert update_rule(optimizer) == UpdateRule(
        exponent=2, decay="coupled", state_degrees=degrees, group_degrees={"eps": -1}
    )


def test_register_a_subclass_with_its_own_step() -> None:
    """A subclass with its own step can be described itself, which leaves its parents alone."""
    classes = fresh()
    register_update_rule(classes["base"], exponent=1, decay="none")
    register_update_rule(classes["own"], exponent=2, decay="none")
    exponents = {name: rule and rule.exponent for name, c in classes.items() for rule in [update_rule(over_one(c))]}
    assert exponents == {"base": 1, "shares": 1, "shares_too": 1, "own": 2}


@pytest.mark.parametrize(
    "cls", [nn.Linear, "SGD", None, over_one(SGD, lr=0.1)], ids=["module", "str", "none", "object"]
)
def test_register_something_else(cls: Any) -> None:
    """Only a class of optimizers has a rule."""
    with pytest.raises(TypeError, match=r"`optimizer_class` must be a subclass of torch\.optim\.Optimizer, got "):
        register_update_rule(cls, exponent=1, decay="none")


@pytest.mark.parametrize("exponent", [3, -1, 1.5, "1", None])
def test_register_an_exponent_that_is_none(exponent: Any) -> None:
    """An exponent is 0, 1 or 2."""
    before = dict(_lookup._REGISTERED)
    with pytest.raises(ValueError, match=rf"`exponent` must be 0, 1 or 2, got {exponent!r}\."):
        register_update_rule(SGD, exponent=exponent, decay="none")
    assert before == _lookup._REGISTERED


@pytest.mark.parametrize("decay", ["Coupled", "", None, True])
def test_register_an_unknown_decay(decay: Any) -> None:
    """A decay is coupled, decoupled or none."""
    with pytest.raises(ValueError, match=rf'`decay` must be "coupled", "decoupled" or "none", got {decay!r}\.'):
        register_update_rule(SGD, exponent=1, decay=decay)
