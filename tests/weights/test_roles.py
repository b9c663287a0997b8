from __future__ import annotations

from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from lightning_normreg import decay_groups, parameter_roles
from lightning_normreg._param_groups._decay_groups import DecayGroupsMixin


def roles(module: nn.Module) -> dict[str, str]:
    """Role of each parameter by its name."""
    return {name: role.role for name, role in parameter_roles(module).items()}


def owning(name: str, base: type[nn.Module] = nn.Module, **shapes: tuple[int, ...]) -> nn.Module:
    """A module of a new class with this name and base that owns parameters of these shapes and nothing else."""
    module = type(name, (base,), {})()
    for parameter, shape in shapes.items():
        module.register_parameter(parameter, nn.Parameter(torch.ones(shape)))
    return module


class Tricky(nn.Module):
    """The model on which eight other rules decay a gain or a shift."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn1 = nn.BatchNorm2d(8)
        self.rms = nn.RMSNorm(8)
        self.pre = owning("RMSNorm", g=(8,))
        self.gn = nn.GroupNorm(2, 8)
        self.ln2 = nn.LayerNorm([4, 4])
        self.gamma = nn.Parameter(torch.ones(8))
        self.logit_scale = nn.Parameter(torch.ones(()))
        self.prelu = nn.PReLU(8)
        self.wn = parametrizations.weight_norm(nn.Linear(8, 8))
        self.pos = nn.Parameter(torch.zeros(1, 5, 8))
        self.head = nn.Linear(8, 10)


# Name, role, decay by default of a model that decays by 0.05.
TRICKY: list[tuple[str, str, float]] = [
    ("gamma", "other", 0.0),
    ("logit_scale", "other", 0.0),
    ("pos", "other", 0.05),
    ("conv.weight", "weight", 0.05),
    ("conv.bias", "bias", 0.0),
    ("bn1.weight", "gamma", 0.0),
    ("bn1.bias", "beta", 0.0),
    ("rms.weight", "gamma", 0.0),
    ("pre.g", "gamma", 0.0),
    ("gn.weight", "gamma", 0.0),
    ("gn.bias", "beta", 0.0),
    ("ln2.weight", "gamma", 0.0),
    ("ln2.bias", "beta", 0.0),
    ("prelu.weight", "other", 0.0),
    ("wn.bias", "bias", 0.0),
    ("wn.parametrizations.weight.original0", "gamma", 0.0),
    ("wn.parametrizations.weight.original1", "weight", 0.05),
    ("head.weight", "weight", 0.05),
    ("head.bias", "bias", 0.0),
]


def test_tricky_model() -> None:
    """Every parameter of the tricky model has its role, in the order of named_parameters()."""
    assert list(roles(Tricky()).items()) == [(name, role) for name, role, _ in TRICKY]


def test_tricky_model_decays() -> None:
    """By default no gain and no shift of the tricky model decays, and `pos` alone of the bare parameters does."""
    groups = decay_groups(Tricky(), 0.05)
    assert {n: g["weight_decay"] for g in groups for n in g["param_names"]} == {n: decay for n, _, decay in TRICKY}


def test_owner_and_rule() -> None:
    """A role says the type that owns the parameter and the rule that decided."""
    found = parameter_roles(Tricky())
    said = {name: (found[name].module, found[name].rule) for name in ("pre.g", "bn1.bias", "pos", "wn.bias")}
    assert said == {
        "pre.g": ("RMSNorm", "gain of a normalization, by the name of its class"),
        "bn1.bias": ("BatchNorm2d", "shift of a normalization, by its type"),
        "pos": ("Tricky", "a bare parameter, neither weight nor bias nor part of a normalization"),
        "wn.bias": ("Linear", "named as a bias"),
    }


@pytest.mark.parametrize(
    "name, shapes, expected",
    [
        ("LlamaRMSNorm", {"weight": (4,)}, {"weight": "gamma"}),
        ("ScaleNorm", {"g": (1,)}, {"g": "gamma"}),
        ("L2NORM", {"scale": ()}, {"scale": "gamma"}),
        ("layer_norm", {"gamma": (4,), "beta": (4,)}, {"gamma": "gamma", "beta": "beta"}),
        ("LayerNormalization", {"scale": (4,), "offset": (4,)}, {"scale": "gamma", "offset": "beta"}),
        ("BatchNormalisation", {"scale": (4,), "shift": (4,)}, {"scale": "gamma", "shift": "beta"}),
        ("GlobalResponseNorm", {"weight": (1, 1, 1, 4), "bias": (1, 1, 1, 4)}, {"weight": "gamma", "bias": "beta"}),
        ("LayerNorm2d", {"weight": (4, 1, 1), "bias": (4, 1, 1)}, {"weight": "gamma", "bias": "beta"}),
        ("LayerNorm", {"a_2": (4,), "b_2": (4,)}, {"a_2": "gamma", "b_2": "beta"}),
        ("ActNorm", {"loc": (1, 4, 1, 1), "scale": (1, 4, 1, 1)}, {"loc": "beta", "scale": "gamma"}),
    ],
)
def test_home_made_norm(name: str, shapes: dict[str, tuple[int, ...]], expected: dict[str, str]) -> None:
    """A class named after a norm that owns vectors and nothing else is one, whatever its parameters are called."""
    assert roles(owning(name, **shapes)) == expected


def test_norm_by_the_name_of_a_base() -> None:
    """A class is a norm, too, when only a base says so."""
    base = type("RMSNormBase", (nn.Module,), {})
    assert roles(owning("Special", base, weight=(4,))) == {"weight": "gamma"}
    assert roles(owning("Special", weight=(4,))) == {"weight": "other"}


@pytest.mark.parametrize(
    "name", ["NormalHead", "LogNormal", "MultivariateNormal", "Abnormality", "TruncatedNormalInit"]
)
def test_normal_distribution_is_no_norm(name: str) -> None:
    """A class named after the normal distribution is no norm."""
    module = owning(name, loc=(4,), scale=(4,), bias=(4,))
    assert roles(module) == {"loc": "other", "scale": "other", "bias": "bias"}


def test_norm_with_a_matrix_is_no_norm() -> None:
    """A class named after a norm that owns a matrix is a layer."""
    assert roles(owning("NormedProjection", weight=(4, 4), bias=(4,))) == {"weight": "weight", "bias": "bias"}


@pytest.mark.parametrize(
    "base, arguments, expected",
    [
        (nn.Linear, (4, 1), {"weight": "weight", "bias": "bias"}),
        (nn.Conv1d, (1, 1, 3), {"weight": "weight", "bias": "bias"}),
        (nn.Embedding, (5, 1), {"weight": "embedding"}),
        (nn.EmbeddingBag, (5, 1), {"weight": "embedding"}),
    ],
)
def test_layer_named_after_a_norm(base: type[nn.Module], arguments: tuple[int, ...], expected: dict[str, str]) -> None:
    """A subclass of a layer stays a layer, though it says norm and its weight is a vector."""
    assert roles(type("NormedLayer", (base,), {})(*arguments)) == expected


def test_prenorm_wrapper() -> None:
    """A wrapper called PreNorm leaves its children what they are, with or without a bare parameter of its own."""
    wrapper = owning("PreNorm")
    wrapper.norm, wrapper.fn = nn.LayerNorm(4), nn.Linear(4, 4)
    children = {"norm.weight": "gamma", "norm.bias": "beta", "fn.weight": "weight", "fn.bias": "bias"}
    assert roles(wrapper) == children
    wrapper.scale = nn.Parameter(torch.ones(4))
    assert roles(wrapper) == {"scale": "other", **children}


def test_model_named_after_a_norm() -> None:
    """A LightningModule called MyNormNet is no norm: its bare parameters are bare, its head is a weight."""

    class MyNormNet(DecayGroupsMixin, LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))
            self.bias = nn.Parameter(torch.ones(4))
            self.head = nn.Linear(4, 1)

    assert roles(MyNormNet()) == {"scale": "other", "bias": "bias", "head.weight": "weight", "head.bias": "bias"}


def test_parametrized_home_made_norm() -> None:
    """A home-made norm stays one when its gain is parametrized."""

    class PlusOne(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    norm = owning("RMSNorm", weight=(4,), bias=(4,))
    parametrize.register_parametrization(norm, "weight", PlusOne())
    assert roles(norm) == {"bias": "beta", "parametrizations.weight.original": "gamma"}
    assert parameter_roles(norm)["parametrizations.weight.original"].module == "RMSNorm"


@pytest.mark.parametrize(
    "name, shape, role",
    [
        ("gamma", (8,), "other"),
        ("beta", (8,), "other"),
        ("layer_scale", (8, 1, 1), "other"),
        ("logit_scale", (), "other"),
        ("cls_token", (1, 1, 8), "other"),
        ("A_log", (8, 4), "other"),
        ("dt_bias", (8,), "bias"),
        ("relative_position_bias_table", (9, 2), "other"),
        ("bias_table", (9, 2), "other"),
        ("kernel", (4, 4), "other"),
        ("weight_gate", (4, 4), "weight"),
        ("out_weight", (4, 4), "weight"),
        ("weight", (4,), "other"),
        ("lightweight", (4, 4), "other"),
        ("out_bias", (1, 4, 1, 1), "bias"),
        ("unbiased", (4,), "other"),
    ],
)
def test_bare_parameter(name: str, shape: tuple[int, ...], role: str) -> None:
    """Outside a norm the words `weight` and `bias` decide, with the shape; `gamma` and `beta` say nothing."""
    assert roles(owning("Block", **{name: shape})) == {name: role}


def test_tied_weights_appear_once() -> None:
    """A tied parameter appears once, under its first name and first owner, with its other names as aliases."""
    model = nn.ModuleDict({"embed": nn.Embedding(6, 4), "body": nn.Linear(4, 4), "head": nn.Linear(4, 6)})
    model["head"].weight = model["embed"].weight
    model["again"] = model["body"]
    found = parameter_roles(model)
    assert {name: (role.role, role.aliases) for name, role in found.items()} == {
        "embed.weight": ("embedding", ("head.weight",)),
        "body.weight": ("weight", ("again.weight",)),
        "body.bias": ("bias", ("again.bias",)),
        "head.bias": ("bias", ()),
    }
    assert found["embed.weight"].module == "Embedding"


def test_frozen_and_read_only() -> None:
    """A frozen parameter has its role, too, and nothing about the module changes."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert roles(model) == {"0.weight": "weight", "0.bias": "bias", "1.weight": "gamma", "1.bias": "beta"}
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(p.requires_grad for p in model.parameters())


def test_parameter_containers() -> None:
    """Entries of a ParameterList are bare; keys of a ParameterDict are names like any other."""
    entries = nn.ParameterList([torch.ones(3), torch.ones(3, 3)])
    named: dict[str, Any] = {"bias": torch.ones(3), "weight": torch.ones(3, 3), "w": torch.ones(3, 3)}
    assert roles(entries) == {"0": "other", "1": "other"}
    assert roles(nn.ParameterDict(named)) == {"bias": "bias", "weight": "weight", "w": "other"}


def test_compiled_submodules() -> None:
    """A compiled module, or part of one, has the names and roles that it has without."""
    plain = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), owning("RMSNorm", g=(2,)))
    expected = parameter_roles(plain)
    whole = torch.compile(plain, backend="eager")
    parts = nn.Sequential(*(torch.compile(part, backend="eager") for part in plain))
    assert expected == parameter_roles(parts) == parameter_roles(whole)
    assert set(roles(plain)) == {"0.0.weight", "0.0.bias", "0.1.weight", "0.1.bias", "1.g"}


class LazyRMSNorm(nn.Module):
    """A home-made norm whose shift is lazy."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.bias = nn.UninitializedParameter()


@pytest.mark.parametrize("lazy", [nn.LazyConv2d(2, 1), nn.LazyBatchNorm1d(), LazyRMSNorm()])
def test_lazy_module(lazy: nn.Module) -> None:
    """A lazy module is refused before its first batch, with what to do."""
    name = type(lazy).__name__
    with pytest.raises(ValueError, match=rf"materialized, but {name} has an uninitialized.*Run one batch"):
        parameter_roles(nn.Sequential(nn.Linear(2, 2), lazy))


def test_lazy_module_after_its_first_batch() -> None:
    """A lazy module has roles once it has seen a batch."""
    module = nn.LazyLinear(2)
    module(torch.ones(1, 3))
    assert roles(module) == {"weight": "weight", "bias": "bias"}
