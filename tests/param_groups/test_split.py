"""What rescaling does to parameter groups, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

from lightning_normreg import accept_rescaled, decay_groups, register_update_rule, rescale_
from lightning_normreg._optimizers import _lookup
from tests.optimizers._cases import PACKAGES


def weights(number: int = 3) -> list[nn.Parameter]:
    """Parameters of twos."""
    return [nn.Parameter(torch.full((2, 2), 2.0)) for _ in range(number)]


def test_group_of_its_own() -> None:
    """The weight's group differs from its old one by what follows; the old one is as it was."""
    ws = weights()
    optimizer = Adam([{"params": ws[:2], "lr": 0.1, "weight_decay": 0.8}, {"params": ws[2:]}], eps=1e-3)
    group = rescale_(optimizer, ws[0], 2.0)
    assert [[any(p is w for p in g["params"]) for w in ws] for g in optimizer.param_groups] == [
        [False, True, False],
        [False, False, True],
        [True, False, False],
    ]
    old = optimizer.param_groups[0]
    assert (old["lr"], old["weight_decay"], old["eps"]) == (0.1, 0.8, 1e-3)
    assert (group["lr"], group["weight_decay"], group["eps"]) == (0.2, 0.2, 5e-4)
    assert group is optimizer.param_groups[2]
    assert torch.equal(ws[0], torch.full((2, 2), 4.0))
    assert torch.equal(ws[1], torch.full((2, 2), 2.0))
    assert rescale_(optimizer, ws[0], 0.5) is group
    assert (group["lr"], group["weight_decay"], group["eps"]) == (0.1, 0.8, 1e-3)
    assert len(optimizer.param_groups) == 3


def test_gradient_that_is_already_there() -> None:
    """It was taken at the old weight."""
    (w,) = weights(1)
    w.grad = torch.ones_like(w)
    rescale_(SGD([w], lr=0.1), w, 4.0)
    assert torch.equal(w.grad, torch.full((2, 2), 0.25))


@pytest.mark.parametrize("options", [{"capturable": True}, {"fused": True}, {"foreach": True}, {}])
def test_tensor_learning_rate(options: dict[str, Any]) -> None:
    """It stays a tensor, and the groups that share it keep theirs."""
    ws, lr = weights(), torch.tensor(0.1)
    optimizer = Adam([{"params": ws[:2]}, {"params": ws[2:]}], lr=lr, **({} if "foreach" in options else options))
    group = rescale_(optimizer, ws[2], 2.0)
    assert torch.equal(group["lr"], torch.tensor(0.2))
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr == torch.tensor(0.1)


def test_names_of_parameters() -> None:
    """They go with the parameters, also when the state is loaded."""
    optimizers = []
    for _ in range(2):
        named = list(zip("abc", weights(), strict=True))
        optimizers.append((SGD(named, lr=0.1), named))
    (optimizer, named), (fresh, _) = optimizers
    rescale_(optimizer, named[1][1], 2.0)
    assert [g["param_names"] for g in optimizer.param_groups] == [["a", "c"], ["b"]]
    accept_rescaled(fresh)
    fresh.load_state_dict(optimizer.state_dict())
    assert [g["param_names"] for g in fresh.param_groups] == [["a", "c"], ["b"]]


def test_names_of_groups_stay_unique() -> None:
    """Lightning's LearningRateMonitor refuses groups of one name."""
    net = nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))
    optimizer = SGD(decay_groups(net, weight_decay=0.1), lr=0.1)
    for layer in net[:2]:
        rescale_(optimizer, layer.weight, 2.0)
    names = [group["name"] for group in optimizer.param_groups]
    assert len(set(names)) == len(names)
    assert [name for name in names if name.startswith("weight")] == ["weight", "weight-0", "weight-1"]


def test_state_of_a_longer_run_without_rescaling() -> None:
    """A state with groups that were added by somebody else is refused by torch, as ever."""
    ws = weights()
    optimizer, fresh = SGD(ws[:2], lr=0.1), SGD(weights(2), lr=0.1)
    optimizer.add_param_group({"params": ws[2:]})
    accept_rescaled(fresh)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        fresh.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf"), "2", torch.tensor(2.0), None])
def test_factors_that_are_none(factor: Any) -> None:
    """A factor is a positive number."""
    (w,) = weights(1)
    with pytest.raises(ValueError, match="`factor` must be a positive number, got "):
        rescale_(SGD([w], lr=0.1), w, factor)


def test_somebody_elses_parameter() -> None:
    """The parameter must be the optimizer's."""
    with pytest.raises(ValueError, match=r"`parameter` must be one of the optimizer's, got one of shape \(2, 2\)"):
        rescale_(SGD(weights(), lr=0.1), weights()[0], 2.0)


def test_something_that_is_no_optimizer() -> None:
    """Nor a wrapper around one."""
    with pytest.raises(TypeError, match=r"`optimizer` must be a torch\.optim\.Optimizer, got Linear\. Of a wrapper"):
        rescale_(nn.Linear(2, 2), weights()[0], 2.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "make, message",
    [
        (torch.optim.SparseAdam, "got SparseAdam: it moves only the entries that have a gradient"),
        (torch.optim.LBFGS, "`parameter` must be all weights of LBFGS, which has one state for all of them"),
        (torch.optim.RAdam, "must be past its first steps, got a RAdam before step 1, which"),
        (lambda ws: PACKAGES["prodigyopt"](ws, 1.0), "must be one whose state is known, got Prodigy"),
    ],
)
def test_optimizers_that_cannot_follow(make: Any, message: str) -> None:
    """They are refused, and nothing has changed."""
    ws = weights()
    optimizer = make(ws)
    with pytest.raises(ValueError, match=message):
        rescale_(optimizer, ws[0], 2.0)
    assert len(optimizer.param_groups) == 1
    assert torch.equal(ws[0], torch.full((2, 2), 2.0))


def test_unknown_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused until it is described, with its state."""

    class Own(SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    monkeypatch.setattr(_lookup, "_REGISTERED", {})
    (w,) = weights(1)
    optimizer = Own([w], lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match=r"whose steps are known, got Own\. .* register_update_rule\(Own, exponent=…"):
        rescale_(optimizer, w, 2.0)
    register_update_rule(Own, exponent=2, decay="coupled")
    with pytest.raises(ValueError, match="whose state is known, got Own"):
        rescale_(optimizer, w, 2.0)
    register_update_rule(Own, exponent=2, decay="coupled", state_degrees={"momentum_buffer": -1})
    w.grad = torch.ones_like(w)
    optimizer.step()
    assert rescale_(optimizer, w, 2.0)["lr"] == 0.4
    assert torch.equal(optimizer.state[w]["momentum_buffer"], torch.full((2, 2), 0.5))
