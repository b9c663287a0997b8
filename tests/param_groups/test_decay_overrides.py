from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_normreg import decay_groups


class Inner(nn.Module):
    """Two bare parameters, of which it asks one not to decay, and a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.pos = nn.Parameter(torch.ones(3, 4))
        self.table = nn.Parameter(torch.ones(3, 4))
        self.proj = nn.Linear(4, 4)

    def no_weight_decay(self) -> set[str]:
        """As the models of timm have it; names that are not there are usual."""
        return {"pos", "cls_token"}


class Outer(nn.Module):
    """The same inside, and a bare parameter of the same name that it wants decayed."""

    def __init__(self) -> None:
        super().__init__()
        self.pos = nn.Parameter(torch.ones(3, 4))
        self.blocks = nn.ModuleList([Inner()])


class Wrapper(nn.Module):
    """Holds a module under a name that a wrapper of torch uses, and passes on nothing else."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module


def decays(module: nn.Module, **arguments: Any) -> dict[str, float]:
    """Decay of each parameter by its name, for weights that decay by 0.1."""
    return {n: g["weight_decay"] for g in decay_groups(module, 0.1, **arguments) for n in g["param_names"]}


INNER = {"pos": 0.0, "table": 0.1, "proj.weight": 0.1, "proj.bias": 0.0}
OUTER = {"pos": 0.1} | {f"blocks.0.{name}": decay for name, decay in INNER.items()}


@pytest.mark.parametrize("wrap", [lambda m: m, Wrapper, lambda m: torch.compile(m, backend="eager")])
def test_no_weight_decay(wrap: Callable[[nn.Module], nn.Module]) -> None:
    """A module's no_weight_decay() counts at the root, in a submodule for its own parameters, and in a wrapper."""
    assert decays(wrap(Inner())) == INNER
    assert decays(wrap(Outer())) == OUTER
    outer = Outer()
    outer.blocks[0] = wrap(outer.blocks[0])
    assert decays(outer) == OUTER


def test_no_weight_decay_goes_before_roles_and_after_overrides() -> None:
    """A model's own wish beats an argument, and an override beats both."""
    assert decays(Inner(), other=0.3) == INNER | {"table": 0.3}
    assert decays(Inner(), overrides={"pos": 0.2}) == INNER | {"pos": 0.2}
    assert decays(Inner(), overrides={"pos": None}) == INNER | {"pos": 0.1}


def test_no_weight_decay_of_a_weight() -> None:
    """A weight that a model names goes into a group of its own."""
    inner = Inner()
    inner.no_weight_decay = lambda: ["proj.*"]  # type: ignore[method-assign, assignment, return-value]
    groups = decay_groups(inner, 0.1)
    assert [(g["name"], g["param_names"]) for g in groups] == [
        ("weight_wd_0", ["proj.weight"]),
        ("bias", ["proj.bias"]),
        ("other", ["pos", "table"]),
    ]


def test_no_weight_decay_by_an_alias() -> None:
    """A tied parameter is freed under any of its names."""
    model = nn.ModuleDict({"table": nn.Embedding(3, 4), "inner": Inner()})
    model["inner"].pos = model["table"].weight
    assert decays(model)["table.weight"] == 0.0


def test_an_attribute_of_that_name() -> None:
    """Something called no_weight_decay that cannot be called is left alone."""
    model = nn.Linear(2, 2)
    model.no_weight_decay = {"weight"}  # type: ignore[assignment]
    assert decays(model) == {"weight": 0.1, "bias": 0.0}


def test_overrides() -> None:
    """An override goes by glob over clean names, before every role; None is the decay of the weights."""
    overrides = {"*.bias": 0.3, "*.table": 0.0, "blocks.0.pos": None}
    expected = OUTER | {"blocks.0.proj.bias": 0.3, "blocks.0.table": 0.0, "blocks.0.pos": 0.1}
    assert decays(Outer(), overrides=overrides) == expected
    assert decays(torch.compile(Outer(), backend="eager"), overrides=overrides) == expected


@pytest.mark.parametrize("name", ["embed.weight", "head.weight"])
def test_override_by_an_alias(name: str) -> None:
    """A tied weight is matched by any of its names and appears under its first."""
    model = nn.ModuleDict({"embed": nn.Embedding(3, 4), "head": nn.Linear(4, 3)})
    model["head"].weight = model["embed"].weight
    assert decays(model, overrides={name: 0.2}) == {"embed.weight": 0.2, "head.bias": 0.0}


def test_override_of_a_frozen_parameter() -> None:
    """An override may match a parameter that is frozen now."""
    model = Outer()
    model.pos.requires_grad_(False)
    assert "pos" not in decays(model, overrides={"pos": 0.2})


def test_override_without_a_match() -> None:
    """An override that matches nothing is an error that names what comes near; case counts."""
    with pytest.raises(ValueError, match=r"`overrides` must match .* 'blocks\.0\.prj\.bias' .*'blocks\.0\.proj\.bias'"):
        decay_groups(Outer(), 0.1, overrides={"blocks.0.prj.bias": 0.0})
    with pytest.raises(ValueError, match=r"'POS' matches none\. Near misses"):
        decay_groups(Outer(), 0.1, overrides={"POS": 0.0})


def test_conflicting_overrides() -> None:
    """Two globs that give one parameter different decays are an error that names both and what they give."""
    conflict = r"'\*\.bias' and 'blocks\.\*' give 'blocks\.0\.proj\.bias' 0\.3 and 0\.2\. Make one glob narrower"
    with pytest.raises(ValueError, match=conflict):
        decay_groups(Outer(), 0.1, overrides={"*.bias": 0.3, "blocks.*": 0.2})
    with pytest.raises(ValueError, match=r"give 'pos' 0\.1 and 0\.2"):
        decay_groups(Outer(), 0.1, overrides={"*": None, "pos": 0.2})


@pytest.mark.parametrize("decay", [0.1, None])
def test_globs_that_agree(decay: float | None) -> None:
    """Two globs may give one parameter the same decay, as a number or as None."""
    assert set(decays(Outer(), overrides={"*": 0.1, "*.bias": decay}).values()) == {0.1}


def test_names_of_near_decays() -> None:
    """Groups have different names as long as their decays differ by one bit, and short names for short numbers."""
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(6)))
    near = {"0.weight": 1 / 3, "1.weight": 1 / 3 + 2**-54, "2.weight": 0, "3.weight": 1, "4.weight": 1e-5}
    names = [group["name"] for group in decay_groups(model, 0.1, overrides=near)]
    assert len(set(names)) == 6
    assert names[2:] == ["weight_wd_0", "weight_wd_1", "weight_wd_1e-05", "weight"]


def test_override_with_the_usual_decay() -> None:
    """An override that changes nothing makes no group of its own."""
    assert [g["name"] for g in decay_groups(Outer(), 0.1, overrides={"*.weight": 0.1})] == [
        g["name"] for g in decay_groups(Outer(), 0.1)
    ]
