"""The first projection in the middle of training: optimizer state follows the weight."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_normreg._weights._roles import named_roles
from lightning_normreg._weights._selection import watch
from lightning_normreg._weights._table import norms_of
from lightning_normreg.steps._projector import Projector

CASES: dict[str, tuple[Any, dict[str, Any], int]] = {
    "momentum": (torch.optim.SGD, {"momentum": 0.9}, 2),
    "nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}, 2),
    "adam": (torch.optim.Adam, {"eps": 1e-30, "amsgrad": True}, 1),
    "adamw": (torch.optim.AdamW, {"eps": 1e-30, "weight_decay": 0.0}, 1),
    "rmsprop": (torch.optim.RMSprop, {"eps": 1e-30, "centered": True}, 1),
    "adagrad": (torch.optim.Adagrad, {"eps": 1e-30}, 1),
    "adamax": (torch.optim.Adamax, {"eps": 1e-30}, 1),
    "nadam": (torch.optim.NAdam, {"eps": 1e-30}, 1),
}


def step(net: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    """One step on a loss of the normalized layer's output."""
    optimizer.zero_grad()
    net(x).pow(3).mean().backward()
    optimizer.step()


@pytest.mark.parametrize("joined", [False, True], ids=["neurons", "layer-with-bias"])
@pytest.mark.parametrize("case", CASES)
def test_state_follows_the_first_projection(case: str, joined: bool) -> None:
    """The next step turns the weight as it would have without projection, at the learning rate times c^p.

    All units get one factor c, because a learning rate cannot differ between them. In float64, to 1e-12; without the
    state's part the angle is above 1e-3.
    """
    make, options, exponent = CASES[case]
    torch.manual_seed(0)
    norm: nn.Module = nn.LayerNorm(5, eps=0.0) if joined else nn.BatchNorm1d(5, eps=1e-30)
    free = nn.Sequential(nn.Linear(4, 5, bias=joined), norm).double()
    norm.requires_grad_(False)
    with torch.no_grad():
        free[0].weight.div_(free[0].weight.norm(dim=1, keepdim=True))
    optimizer = make(free[0].parameters(), lr=1e-3, **options)
    x = torch.randn(6, 16, 4, dtype=torch.float64)
    for batch in x[:5]:
        step(free, optimizer, batch)

    ends = {}
    for name in ("free", "held", "stateless"):
        net, twin = copy.deepcopy((free, optimizer))
        if name != "free":
            (target,) = watch(named_roles(net), ["0.weight"], (), "layer" if joined else "neuron")
            if joined:
                target = copy.copy(target)
                object.__setattr__(target, "joined", (net[0].bias,))
            c = 3.0
            radius = c * norms_of([target])[0]
            projector = Projector([target], "initial")
            projector.load_state_dict({"initial": {"0.weight": radius}})
            projector.start([target], [twin] if name == "held" else [])
            for group in twin.param_groups:
                group["lr"] *= c**exponent
        step(net, twin, x[5])
        ends[name] = torch.cat([p.detach().flatten() for p in net[0].parameters()])
    directions = {name: end / end.norm() for name, end in ends.items()}
    assert (directions["held"] - directions["free"]).norm() < 1e-12
    assert (directions["stateless"] - directions["free"]).norm() > 1e-4


def test_an_unknown_optimizer_is_named() -> None:
    """Its state cannot follow, which is said."""

    class Other(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    net = nn.Linear(3, 2)
    optimizer = Other(net.parameters(), lr=0.1, momentum=0.9)
    step(net, optimizer, torch.randn(4, 3))
    (target,) = watch(named_roles(net), ["weight"], (), "neuron")
    with pytest.warns(UserWarning, match="The state of Other could not follow the first projection of 'weight'"):
        Projector([target], "auto").start([target], [optimizer])


def test_a_state_that_is_not_shaped_like_the_weight_is_named() -> None:
    """It mixes units, which may be multiplied by different factors."""
    net = nn.Linear(3, 2)
    optimizer = torch.optim.Adafactor(net.parameters())
    step(net, optimizer, torch.randn(4, 3))
    (target,) = watch(named_roles(net), ["weight"], (), "neuron")
    with pytest.warns(UserWarning, match="The row_var of Adafactor could not follow the first projection of 'weight'"):
        Projector([target], "auto").start([target], [optimizer])
