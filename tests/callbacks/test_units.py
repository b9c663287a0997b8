"""Curves of units that are more than rows, with and without their biases, against loops in NumPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_normreg import EffectiveLRMonitor, WeightNormMonitor
from tests.callbacks.test_verdict import Any2d
from tests.harness import RecordingLogger, loader, trainer

Weights = dict[str, np.ndarray]


class Recorded(Any2d):
    """A convolution with a bias before GroupNorm (2 groups of 3 filters), a linear layer with one before LayerNorm."""

    def __init__(self) -> None:
        linear = [nn.Flatten(), nn.Linear(96, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3)]
        super().__init__(nn.Conv2d(2, 6, 3), nn.GroupNorm(2, 6), nn.ReLU(), *linear, lr=0.1)
        self.before: list[Weights] = []
        self.after: list[Weights] = []

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Record the weights around the step."""
        self.before.append({n: p.detach().double().numpy().copy() for n, p in self.named_parameters()})
        super().optimizer_step(*args, **kwargs)
        self.after.append({n: p.detach().double().numpy().copy() for n, p in self.named_parameters()})


def conv_units(w: Weights) -> list[np.ndarray]:
    """Three filters and their three biases each."""
    weight, bias = w["layers.0.weight"], w["layers.0.bias"]
    return [np.concatenate([weight[i : i + 3].ravel(), bias[i : i + 3]]) for i in (0, 3)]


def linear_units(w: Weights) -> list[np.ndarray]:
    """The whole layer."""
    return [np.concatenate([w["layers.4.weight"].ravel(), w["layers.4.bias"]])]


def test_blocks_and_joined_biases_equal_the_oracle() -> None:
    """Norms, effective rate, rotation and relative update of every step, to 1e-5 in float32; ‖w‖ is the tensor's."""
    torch.manual_seed(0)
    net = Recorded()
    run = trainer(WeightNormMonitor(), EffectiveLRMonitor())
    run.fit(net, loader())
    logger = run.logger
    assert isinstance(logger, RecordingLogger)
    assert len(net.before) == 6
    for name, units in (("layers.0.weight", conv_units), ("layers.4.weight", linear_units)):
        for step, (before, after) in enumerate(zip(net.before, net.after, strict=True)):
            pairs = list(zip(units(before), units(after), strict=True))
            norms = [math.sqrt((a**2).sum()) for a, _ in pairs]
            rms = math.sqrt(sum(n**2 for n in norms) / len(norms))
            chords = [
                np.sqrt(((a / n - b / np.sqrt((b**2).sum())) ** 2).sum())
                for (a, b), n in zip(pairs, norms, strict=True)
            ]
            moved = [np.sqrt(((b - a) ** 2).sum()) / n for (a, b), n in zip(pairs, norms, strict=True)]
            expected = {
                "weight_norm": np.sqrt((before[name] ** 2).sum()),
                "unit_norm_rms": rms,
                "unit_norm_min": min(norms),
                "unit_norm_max": max(norms),
                "effective_lr": 0.1 / rms**2,
                "rotation": np.sqrt(np.mean([(2 * np.arcsin(c / 2)) ** 2 for c in chords])),
                "relative_update": np.sqrt(np.mean(np.square(moved))),
            }
            for key, value in expected.items():
                assert dict(logger.curves(f"weights/{key}/{name}"))[step] == pytest.approx(value, rel=1e-5), (
                    name,
                    key,
                    step,
                )
