"""How far a run's directions change when only a scale, a decay or the size of the loss does.

A network whose normalized matrices alone are trained, in float64, on the same batches, with a negligible eps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from lion_pytorch import Lion
from torch import Tensor, nn

from lightning_normreg.steps import Projector, Rotator, StepDispatcher, watch

STEPS, ANGLE, DECAY = 50, 0.03, 0.1
FACTORS = (1e-3, 0.03, 7.0, 1e3)

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": torch.optim.SGD,
    "SGD, momentum": lambda p, **k: torch.optim.SGD(p, momentum=0.9, **k),
    "SGD, Nesterov": lambda p, **k: torch.optim.SGD(p, momentum=0.9, nesterov=True, **k),
    "AdamW": torch.optim.AdamW,
    "Adam": torch.optim.Adam,
    "RMSprop": torch.optim.RMSprop,
    "Lion": Lion,
    "Muon": torch.optim.Muon,
}
# With which a bare or projected run turns by about ANGLE per step, at first.
LRS = {"SGD": 0.3, "SGD, momentum": 0.05, "SGD, Nesterov": 0.05, "Adam": 5e-3, "AdamW": 5e-3, "RMSprop": 5e-3,
       "Lion": 5e-3, "Muon": 0.02}  # fmt: skip


class Setting(NamedTuple):
    """What a run is made with; the defaults are those of the run that others are compared with."""

    scale: float = 1.0
    decay: float = 0.0
    loss: float = 1.0


def make(scale: float) -> nn.Sequential:
    """Two normalized matrices with weights of a scale, and a frozen head."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(12, 10, bias=False), nn.BatchNorm1d(10, eps=1e-30), nn.Tanh(),
        nn.Linear(10, 8, bias=False), nn.BatchNorm1d(8, eps=1e-30), nn.Tanh(),
        nn.Linear(8, 3),
    ).double()  # fmt: skip
    for i, layer in enumerate(net):
        layer.requires_grad_(i in (0, 3))
    with torch.no_grad():
        for i in (0, 3):
            net[i].weight.mul_(scale)
    return net


def directions(optimizer: str, hold: Callable[[list[Any]], Any] | None, setting: Setting) -> Tensor:
    """Units of norm 1 after each step, shape ``(steps, units, entries)`` with zeros behind the shorter ones."""
    net = make(setting.scale)
    weights = [net[0].weight, net[3].weight]
    lr = ANGLE if hold is control or hold is control_at_initial else LRS[optimizer]
    opt = OPTIMIZERS[optimizer](weights, lr=lr, weight_decay=setting.decay)
    if hold is not None:
        held = hold(watch(net, include=["0.weight", "3.weight"], unit="neuron"))
        held.project(held.targets)
        dispatcher = StepDispatcher()
        dispatcher.subscribe(held)
        dispatcher.attach([opt])
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(STEPS):
        x = torch.randn(32, 12, generator=generator, dtype=torch.float64)
        y = torch.randint(3, (32,), generator=generator)
        opt.zero_grad()
        (setting.loss * nn.functional.cross_entropy(net(x), y)).backward()
        opt.step()
        rows = [nn.functional.pad(w.detach(), (0, 12 - w.shape[1])) for w in weights]
        found.append(nn.functional.normalize(torch.cat(rows), dim=1))
    return torch.stack(found)


def control(targets: list[Any]) -> Rotator:
    """Rotation control at radius 1."""
    return Rotator(targets, "auto")


def control_at_initial(targets: list[Any]) -> Rotator:
    """Rotation control at the norms that the weights come with."""
    return Rotator(targets, "initial")


def projection(targets: list[Any]) -> Projector:
    """Projection to radius 1."""
    return Projector(targets, "auto")


def difference(
    optimizer: str, hold: Callable[[list[Any]], Any] | None, settings: list[Setting], base: Setting | None = None
) -> float:
    """Largest angle in radians, over steps, units and settings, to the run with the base setting."""
    base_run = directions(optimizer, hold, base or Setting())
    runs = [directions(optimizer, hold, setting) for setting in settings]
    return max(2 * torch.asin((run - base_run).norm(dim=2) / 2).max().item() for run in runs)


SCALES = [Setting(scale=c) for c in FACTORS]
DECAYS = [Setting(decay=DECAY / 100), Setting(decay=DECAY)]
LOSSES = [Setting(loss=c) for c in FACTORS]
