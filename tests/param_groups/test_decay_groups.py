from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning_utilities.core import rank_zero
from torch import nn
from torch.nn.utils import parametrizations

from lightning_normreg import DecayGroupsMixin, decay_groups
from tests.weights.test_roles import Tricky

Groups = list[dict[str, Any]]

# What each layer has, written by hand: the oracle for the partition.
LAYERS: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "linear": (lambda: nn.Linear(2, 3), {"weight": "weight", "bias": "bias"}),
    "conv": (lambda: nn.Conv2d(2, 3, 3, bias=False), {"weight": "weight"}),
    "norm": (lambda: nn.BatchNorm2d(3), {"weight": "gamma", "bias": "beta"}),
    "rms": (lambda: nn.RMSNorm([2, 2]), {"weight": "gamma"}),
    "embedding": (lambda: nn.Embedding(3, 2), {"weight": "embedding"}),
    "prelu": (lambda: nn.PReLU(3), {"weight": "other"}),
    "list": (lambda: nn.ParameterList([torch.ones(2, 2)]), {"0": "other"}),
    "relu": (nn.ReLU, {}),
    "weight_norm": (
        lambda: parametrizations.weight_norm(nn.Linear(2, 3)),
        {
            "bias": "bias",
            "parametrizations.weight.original0": "gamma",
            "parametrizations.weight.original1": "weight",
        },
    ),
}
BARE_VECTORS = ("prelu",)
DECAYS = st.sampled_from([0.0, 1e-4, 0.05, 0.05 + 2**-50, 1 / 3, 1.0])
TREES = st.recursive(st.sampled_from(sorted(LAYERS)), lambda inner: st.lists(inner, max_size=4), max_leaves=12)


def build(tree: str | list[Any], roles: dict[str, str], prefix: str = "") -> nn.Module:
    """The module of a tree of layers; the role of each parameter goes into ``roles``."""
    if isinstance(tree, str):
        make, own = LAYERS[tree]
        bare = {n: "other_vector" if tree in BARE_VECTORS else role for n, role in own.items()}
        roles.update({f"{prefix}{n}": role for n, role in bare.items()})
        return make()
    return nn.Sequential(*(build(inner, roles, f"{prefix}{i}.") for i, inner in enumerate(tree)))


def decays(groups: Groups) -> dict[str, float]:
    """Decay of each parameter by its name."""
    return {name: group["weight_decay"] for group in groups for name in group["param_names"]}


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """What has been said so far; Lightning's loggers keep it from their parents where a test runs alone."""
    logger: logging.Logger | None = rank_zero.log
    assert logger is not None
    caplog.set_level(logging.INFO, logger.name)
    while logger:
        monkeypatch.setattr(logger, "propagate", True)
        logger = logger.parent
    return lambda: caplog.messages


class Model(DecayGroupsMixin, nn.Module):
    """One parameter of each role, a bare vector and a bare matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.pos = nn.Parameter(torch.ones(1, 5, 4))
        self.embed = nn.Embedding(6, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)


BY_DEFAULT = {
    "head.weight": 0.1,
    "embed.weight": 0.1,
    "norm.weight": 0.0,
    "norm.bias": 0.0,
    "head.bias": 0.0,
    "scale": 0.0,
    "pos": 0.1,
}


@settings(max_examples=80)
@given(TREES, st.data())
def test_partition(tree: str | list[Any], data: st.DataObject) -> None:
    """Groups hold each trainable parameter once, under its name, at the decay of its role, in one order."""
    roles: dict[str, str] = {}
    module = build(tree, roles)
    arguments: dict[str, Any] = {role: data.draw(DECAYS | st.none()) for role in ("gamma", "beta", "bias", "embedding")}
    arguments["other"] = data.draw(DECAYS | st.none() | st.just("auto"))
    weight_decay = data.draw(DECAYS)
    parameters = dict(module.named_parameters())
    assert set(parameters) == set(roles)
    for parameter in parameters.values():
        parameter.requires_grad_(data.draw(st.booleans()))
    trainable = {name for name, p in parameters.items() if p.requires_grad}
    if not trainable:
        with pytest.raises(ValueError, match="`module` must have something to train"):
            decay_groups(module, weight_decay, **arguments)
        return

    groups = decay_groups(module, weight_decay, **arguments)
    names = [name for group in groups for name in group["param_names"]]
    assert sorted(names) == sorted(trainable)
    assert [id(p) for group in groups for p in group["params"]] == [id(parameters[name]) for name in names]
    assert all(set(group) == {"params", "name", "weight_decay", "param_names"} for group in groups)
    assert all(group["params"] for group in groups)
    assert len({group["name"] for group in groups}) == len(groups)

    def expected(role: str) -> Any:
        decay = arguments.get(role.removesuffix("_vector"))
        if decay == "auto":
            return 0.0 if role == "other_vector" else weight_decay
        return weight_decay if decay is None else decay

    assert decays(groups) == {name: expected(roles[name]) for name in trainable}
    order = list(parameters)
    assert all(group["param_names"] == sorted(group["param_names"], key=order.index) for group in groups)
    assert [g["name"] for g in decay_groups(module, weight_decay, **arguments)] == [g["name"] for g in groups]


def test_by_default() -> None:
    """Weights and embeddings decay and bare matrices with them; gains, shifts, biases and bare vectors do not."""
    groups = decay_groups(Model(), 0.1)
    assert list(decays(groups).items()) == list(BY_DEFAULT.items())
    assert [(g["name"], g["weight_decay"]) for g in groups] == [
        ("weight", 0.1),
        ("embedding", 0.1),
        ("gamma", 0.0),
        ("beta", 0.0),
        ("bias", 0.0),
        ("other_wd_0", 0.0),
        ("other", 0.1),
    ]


@pytest.mark.parametrize(
    "argument, names",
    [
        ("gamma", ["norm.weight"]),
        ("beta", ["norm.bias"]),
        ("bias", ["head.bias"]),
        ("embedding", ["embed.weight"]),
        ("other", ["scale", "pos"]),
    ],
)
@pytest.mark.parametrize("decay", [0.0, 0.3, 2, None, np.float32(0.5)])
def test_argument_of_a_role(argument: str, names: list[str], decay: Any) -> None:
    """Each role has an argument that moves its parameters and no others; None means as the weights."""
    used = 0.1 if decay is None else float(decay)
    groups = decay_groups(Model(), 0.1, **{argument: decay})
    assert decays(groups) == BY_DEFAULT | dict.fromkeys(names, used)
    assert {type(group["weight_decay"]) for group in groups} == {float}
    assert [g["name"] for g in groups if set(g["param_names"]) & set(names)] == [argument]


def test_gamma_and_beta_apart() -> None:
    """Gains and shifts can decay differently, from each other and from other biases."""
    found = decays(decay_groups(Model(), 0.1, gamma=0.01, beta=0.02, bias=0.03))
    assert (found["norm.weight"], found["norm.bias"], found["head.bias"]) == (0.01, 0.02, 0.03)


def test_mixin_is_the_function() -> None:
    """The method gives what the function gives, whatever is asked."""
    model = Model()
    arguments: dict[str, Any] = {"gamma": 0.01, "beta": 0.02, "bias": 0.03, "embedding": 0.04, "other": 0.05}
    for options in ({}, arguments, {"overrides": {"pos": 0.0, "*.bias": None}}):
        expected, actual = decay_groups(model, 0.1, **options), model.decay_groups(0.1, **options)
        assert [{**group, "params": list(map(id, group["params"]))} for group in expected] == [
            {**group, "params": list(map(id, group["params"]))} for group in actual
        ]


def test_mixin_on_a_non_module() -> None:
    """The mixin says so where it is mixed into something else."""
    with pytest.raises(TypeError, match=r"mixed into a torch\.nn\.Module, got Plain\."):
        type("Plain", (DecayGroupsMixin,), {})().decay_groups(0.1)


def test_tricky_position_embedding(said: Callable[[], list[str]]) -> None:
    """`pos` of the tricky model decays and is listed as the only such parameter; one override frees it."""
    assert decays(decay_groups(Tricky(), 0.05))["pos"] == 0.05
    listed = [message for message in said() if message.startswith("Decayed although")]
    assert listed == [
        "Decayed although neither weight nor embedding: pos (1×5×8). "
        "Free one by overrides={'<name>': 0.0}, all by other=0.0."
    ]
    assert decays(decay_groups(Tricky(), 0.05, overrides={"pos": 0.0}))["pos"] == 0.0
    assert [message for message in said() if message.startswith("Decayed although")] == listed


def test_what_is_said(said: Callable[[], list[str]]) -> None:
    """Groups with their decays, decayed bare parameters with their shapes, and frozen ones are said once."""
    model = Model()
    model.logit = nn.Parameter(torch.ones(()))
    model.head.requires_grad_(False)
    decay_groups(model, 0.1, other=0.25)
    assert said() == [
        "Decay groups: embedding 0.1 (1 parameters), gamma 0 (1 parameters), beta 0 (1 parameters), "
        "other 0.25 (3 parameters).",
        "Decayed although neither weight nor embedding: scale (4), pos (1×5×4), logit (scalar). "
        "Free one by overrides={'<name>': 0.0}, all by other=0.0.",
        "Frozen, so in no decay group: head.weight, head.bias.",
    ]


def test_dimensions_of_one_do_not_count(said: Callable[[], list[str]]) -> None:
    """Class token, gains of channels and temperatures are vectors in any shape, and are named, not only counted."""
    model = nn.Module()
    shapes = {"token": (1, 1, 8), "gain": (8, 1, 1, 1), "scale": (2, 1, 1), "position": (1, 5, 8), "flat": (24,)}
    for name, shape in shapes.items():
        model.register_parameter(name, nn.Parameter(torch.ones(shape)))
    assert decays(decay_groups(model, 0.1)) == {**dict.fromkeys(shapes, 0.0), "position": 0.1}
    assert (
        "Not decayed, as bare vectors: token (1×1×8), gain (8×1×1×1), scale (2×1×1), flat (24). Where a layer unfolds "
        "one into a matrix, give it a decay by overrides={'<name>': …}."
    ) in said()
    assert decays(decay_groups(model, 0.1, overrides={"flat": 0.1}))["flat"] == 0.1


def test_nothing_to_say(said: Callable[[], list[str]]) -> None:
    """Without bare and frozen parameters only the groups are said."""
    decay_groups(nn.Linear(2, 2), 0.1)
    assert said() == ["Decay groups: weight 0.1 (1 parameters), bias 0 (1 parameters)."]


NO_DECAY: list[Any] = [-1e-9, -1, math.nan, math.inf, -math.inf, "0.1", "auto", True, False, [0.1], 1j]


@pytest.mark.parametrize("decay", NO_DECAY, ids=repr)
@pytest.mark.parametrize("argument", ["weight_decay", "gamma", "beta", "bias", "embedding", "other", "overrides"])
def test_no_decay_at_all(argument: str, decay: Any) -> None:
    """Anything but a finite number of at least 0 is refused, by the argument that has it."""
    arguments: dict[str, Any] = {"weight_decay": 0.1, argument: {"pos": decay} if argument == "overrides" else decay}
    if argument == "other" and decay == "auto":
        assert decays(decay_groups(Model(), **arguments)) == BY_DEFAULT
        return
    named = r"overrides\['pos'\]" if argument == "overrides" else argument
    with pytest.raises(ValueError, match=rf"`{named}` must be a decay of at least 0, got .*Use 0\.0 for none"):
        decay_groups(Model(), **arguments)


def test_weight_decay_is_a_number() -> None:
    """None means as `weight_decay`, so it is no `weight_decay` itself."""
    none: Any = None
    with pytest.raises(ValueError, match=r"`weight_decay` must be a decay of at least 0, got None\."):
        decay_groups(Model(), none)


@pytest.mark.parametrize(
    "module, problem",
    [
        (nn.ReLU(), "have something to train, but ReLU has no parameters"),
        (nn.Linear(2, 2).requires_grad_(False), "have something to train, but Linear has only frozen parameters"),
        (nn.LazyLinear(2), "be materialized, but LazyLinear has an uninitialized 'weight'.* Run one batch"),
    ],
)
def test_nothing_to_train(module: nn.Module, problem: str) -> None:
    """A module without anything to train, or a lazy one, is refused in words."""
    with pytest.raises(ValueError, match=f"`module` must {problem}"):
        decay_groups(module, 0.1)


@pytest.mark.parametrize("overrides", [None, {}])
def test_no_overrides(overrides: Mapping[str, float] | None) -> None:
    """No overrides change nothing."""
    assert decays(decay_groups(Model(), 0.1, overrides=overrides)) == BY_DEFAULT
