"""Curves of units that are more than rows, with and without their biases, against loops in NumPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning.callbacks import LearningRateMonitor
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


@pytest.mark.parametrize("optimizer, exponent", [(torch.optim.SGD, 2), (torch.optim.AdamW, 1)])
def test_effective_lr_can_be_checked_by_the_logged_norm(optimizer: Any, exponent: int) -> None:
    """Linear, ReLU, BatchNorm: each row and its bias are a unit, in the logged norm as in the effective rate."""

    class Biased(Recorded):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Flatten(), nn.Linear(72, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 3))
            nn.init.uniform_(self.layers[1].bias, 0.5, 1.0)

        def configure_optimizers(self) -> Any:
            """The one that is tested, under a schedule."""
            made = optimizer(self.parameters(), lr=0.01)
            scheduler = torch.optim.lr_scheduler.ExponentialLR(made, 0.9)
            return {"optimizer": made, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    torch.manual_seed(0)
    net = Biased()
    run = trainer(WeightNormMonitor(), EffectiveLRMonitor(), LearningRateMonitor("step"))
    run.fit(net, loader())
    logger = run.logger
    assert isinstance(logger, RecordingLogger)
    name, lr = "layers.1.weight", dict(logger.curves(f"lr-{optimizer.__name__}"))
    rates = dict(logger.curves(f"weights/effective_lr/{name}"))
    norms = dict(logger.curves(f"weights/unit_norm_rms/{name}"))
    assert len(rates) == len(net.before) == 6
    for step, before in enumerate(net.before):
        weight, bias = before[name], before["layers.1.bias"]
        norm = math.sqrt(((weight**2).sum(axis=1) + bias**2).mean())
        assert rates[step] == pytest.approx(lr[step] / norms[step] ** exponent, rel=1e-6)
        assert rates[step] == pytest.approx(lr[step] / norm**exponent, rel=1e-5)
        alone = math.sqrt((weight**2).sum())
        assert dict(logger.curves(f"weights/weight_norm/{name}"))[step] == pytest.approx(alone, rel=1e-5)
        assert alone / math.sqrt(8) < 0.8 * norm  # the bias shows
