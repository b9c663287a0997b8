"""Special cases, labelled by hand as `_case` says."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.symmetries._case import Case, case, cross_entropy, vectors


@case
def mlp_without_norm() -> Case:
    """ReLU layers only rescale against each other."""
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    return Case(net, vectors(), cross_entropy, {})


@case
def unused_and_frozen() -> Case:
    """What these samples never reach, or what is not trained, is unknown."""

    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.norm = nn.Linear(6, 3, bias=False), nn.BatchNorm1d(3)
            self.unused, self.frozen = nn.Linear(6, 3), nn.Linear(6, 6, bias=False).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.used(self.frozen(x)))

    labels = {"used.weight": "neuron", "unused.weight": "unknown", "unused.bias": "unknown", "frozen.weight": "unknown"}
    return Case(Partly(), vectors(), cross_entropy, labels)


@case
def straight_through() -> Case:
    """The forward pass rounds, the backward pass does not: the gradient is not the loss's, nor at a right angle."""

    class Rounded(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            scale = self.weight.abs().amax().detach() / 3
            rounded = (self.weight / scale).round() * scale
            return F.linear(x, self.weight + (rounded - self.weight).detach())

    net = nn.Sequential(Rounded(6, 5, bias=False), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    return Case(net, vectors(), cross_entropy, {})


@case
def l2_inside_the_loss() -> Case:
    """A penalty on the norm is part of this loss, which therefore changes with the norm."""

    def loss(module: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(module, batch) + 1e-2 * sum(p.square().sum() for p in module.parameters())

    net = nn.Sequential(nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    return Case(net, vectors(), loss, {})


@case
def casts_inside() -> Case:
    """A norm that computes in float32, and an inner autocast to bfloat16, are the same maths."""

    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.gain, self.last = nn.Linear(6, 5, bias=False), nn.Parameter(torch.ones(5)), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                x = self.first(x).float()
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
            return self.last(self.gain * x)

    return Case(Narrow(), vectors(), cross_entropy, {"first.weight": "layer"})
