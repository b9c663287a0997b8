"""Weights that some steps leave out, as unused experts, under rotation control."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_normreg.functional import rotation
from lightning_normreg.steps import Rotator, StepDispatcher, watch


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
