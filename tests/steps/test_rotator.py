"""Weights that some steps leave out, as unused experts, under rotation control."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_normreg.functional import project_, rotate_, rotation
from lightning_normreg.functional._device import Way, as_on
from lightning_normreg.steps import Projector, Rotator, StepDispatcher, watch


@pytest.mark.parametrize("hold", ["step", "mean"])
def test_a_step_without_a_gradient_leaves_no_trace(hold: Any) -> None:
    """Its bits stay, and it goes on as one that has only seen the other steps; the other weight turns in all."""
    ends = []
    for left_out in (True, False):
        torch.manual_seed(0)
        net = nn.ModuleList([nn.Linear(6, 4, bias=False), nn.Linear(6, 4, bias=False)])
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        rotator = Rotator(watch(net), 1.0, 0.05, hold=hold)
        rotator.project(rotator.targets)
        dispatcher = StepDispatcher()
        dispatcher.subscribe(rotator)
        dispatcher.attach([optimizer])
        generator = torch.Generator().manual_seed(1)
        first, expert = (layer.weight for layer in net)
        for step in range(12):
            gradients = [torch.randn(4, 6, generator=generator) for _ in range(2)]
            before = [w.detach().clone() for w in (first, expert)]
            first.grad, expert.grad = gradients[0], gradients[1] if step % 3 == 0 else None
            if not left_out and expert.grad is None:
                continue
            optimizer.step()
            assert (rotation(before[0], first.detach()) > 0).all()
            assert (rotation(before[1], expert.detach()) > 0).all() == (expert.grad is not None)
            if expert.grad is None:
                assert torch.equal(before[1], expert.detach())
        assert rotator.counts()["1.weight"]["updates"] == 4 * 4
        assert rotator.counts()["1.weight"]["still"] == 0
        ends.append(expert.detach().clone())
    assert torch.equal(*ends)


RATIOS = [10.0**power for power in range(-10, 11, 2)]
THETA = 0.1


def turned(before: torch.Tensor, after: torch.Tensor, per: str, radius: float) -> np.ndarray:
    """Rows on the great circle from one to the other, at the radius, in the longest floats of the machine."""
    a, b = (x.numpy().astype(np.longdouble) for x in (before, after))
    norm = np.sqrt((a**2).sum(1, keepdims=True))
    direction = a / norm
    across = b - a - ((b - a) * direction).sum(1, keepdims=True) * direction
    length = np.sqrt((across**2).sum(1, keepdims=True))
    speed = length / norm
    theta = THETA * (speed / np.sqrt((speed**2).mean()) if per == "layer" else 1)
    return radius * (direction * np.cos(theta) + across / length * np.sin(theta))


@pytest.mark.parametrize("way", ["host", "wide", "narrow"])
@pytest.mark.parametrize("per", ["layer", "unit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_any_ratio_of_norm_to_radius(dtype: torch.dtype, per: Any, way: Way) -> None:
    """The function, a rotator's step and a projector put units of any norm at any radius, all digits kept.

    Entries of the result have at most eight roundings of half an ε behind them: scale and update are quotients of two
    numbers each and are rounded to the type, and the mixture takes three operations. What the update has along the unit
    is no longer than what it has across, and doubles that: 8 ε of a norm, or of a right angle.
    """
    for ratio in RATIOS:
        for radius in (1.0, 1e-3 / ratio):
            generator = torch.Generator().manual_seed(0)
            start, gradient = (torch.randn(5, 40, generator=generator, dtype=torch.float64) for _ in range(2))
            start *= ratio * radius / start.norm(dim=1, keepdim=True)
            net = nn.Linear(40, 5, bias=False, dtype=dtype)
            net.weight.data.copy_(start)
            before = net.weight.detach().clone()
            net.weight.grad = (ratio * radius * gradient).to(dtype)
            optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
            after = before - 1e-3 * net.weight.grad
            held = after.clone()
            with as_on(way):
                project_(held, radius)
                by_function = after.clone()
                rotate_(by_function, before, THETA, per=per, radius=radius)
                dispatcher = StepDispatcher()
                dispatcher.subscribe(Rotator(watch(net), radius, THETA, per=per))
                dispatcher.attach([optimizer])
                optimizer.step()
                by_rotator = net.weight.detach().clone()
                net.weight.data.copy_(after)
                projector = Projector(watch(net), radius)
                projector.project(projector.targets)
            expected = turned(before.double(), after.double(), per, radius)
            # Columns without float64 have the digits of float32.
            eps = torch.finfo(torch.float32 if way == "narrow" else dtype).eps
            for found in (by_function, by_rotator):
                wrong = found.double().numpy().astype(np.longdouble) - expected
                assert np.sqrt((wrong**2).sum(1)).max() < 8 * eps * radius, (ratio, radius)
            exact = after.double() * (radius / after.double().norm(dim=1, keepdim=True))
            for found in (held, net.weight.detach()):
                assert (found.double() - exact).norm(dim=1).max() < 8 * eps * radius, (ratio, radius)
