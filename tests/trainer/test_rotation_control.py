"""RotationControl in real runs: every layer turns by the angle that the schedule says."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from lion_pytorch import Lion
from pytorch_lightning import LightningModule
from torch import Tensor, nn

from lightning_normreg import RotationControl
from tests.harness import Net, loader, trainer

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "adamw": (torch.optim.AdamW, {}),
    "rmsprop": (torch.optim.RMSprop, {}),
    "lion": (Lion, {}),
    "muon": (torch.optim.Muon, {}),
}
pytestmark = pytest.mark.filterwarnings("ignore:Weight decay of .* still turns")
DECAY = 0.1
CONTROLLED = ("first.weight", "second.weight")
# Relative and absolute, for the rotation of a layer: roundings of the sums, and those of the stored weights, some
# 0.2 ε for each entry, of which a unit of m entries has 1/√m along the way that it turns.
TOLERANCE = {torch.float64: (1e-10, 1e-15), torch.float32: (1e-5, 2e-7)}


class Mlp(Net):
    """Two matrices with BatchNorm, which Muon takes as well, and a head that nothing normalizes."""

    def __init__(self, name: str = "sgd", peak: float = 0.05, decay: float = DECAY, **options: Any) -> None:
        LightningModule.__init__(self)
        self.kind, self.options, self.peak, self.decay = OPTIMIZERS[name][0], OPTIMIZERS[name][1] | options, peak, decay
        self.first, self.norm1 = nn.Linear(72, 10, bias=False), nn.BatchNorm1d(10)
        self.second, self.norm2 = nn.Linear(10, 6, bias=False), nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 3, bias=False)
        if name == "muon":
            self.norm1.requires_grad_(False)
            self.norm2.requires_grad_(False)
        self.steps = []

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = torch.relu(self.norm1(self.first(x.flatten(1))))
        return self.head(torch.relu(self.norm2(self.second(x))))

    def configure_optimizers(self) -> Any:
        """A short warm-up from a tenth, then a cosine to zero, step by step."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer = self.kind(parameters, lr=self.peak, weight_decay=self.decay, **self.options)
        warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
        scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], [4])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def unit_rotations(before: Tensor, after: Tensor) -> np.ndarray:
    """Angles of rows by the half-angle formula, in the longest floats of the machine."""
    a, b = (t.numpy().astype(np.longdouble) for t in (before, after))
    a, b = (x / np.sqrt((x**2).sum(1, keepdims=True)) for x in (a, b))
    return 2 * np.arctan2(np.sqrt(((a - b) ** 2).sum(1)), np.sqrt(((a + b) ** 2).sum(1)))


def rotation(before: Tensor, after: Tensor) -> float:
    """Root mean square over rows."""
    return float(np.sqrt((unit_rotations(before, after) ** 2).mean()))


def fit(net: Net, *callbacks: Any, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """Train on the same batches each time."""
    net.to(dtype)
    run = trainer(*callbacks, precision="64-true" if dtype == torch.float64 else "32-true", **options)
    run.fit(net, loader(dtype=dtype))
    return run


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["64", "32"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_layer_turns_by_the_learning_rate_at_every_step(name: str, dtype: torch.dtype) -> None:
    """Through warm-up, cosine and accumulation, with decay; and the norm is the radius after it."""
    torch.manual_seed(0)
    net = Mlp(name)
    fit(net, RotationControl(), dtype=dtype, max_epochs=6, accumulate_grad_batches=2)
    relative, absolute = TOLERANCE[dtype]
    assert len({step.lr["first.weight"] for step in net.steps}) > 10  # the schedule moves
    turned = 0
    for step in net.steps:
        for weight in CONTROLLED:
            angle = step.lr[weight]
            found = rotation(step.before[weight], step.after[weight])
            if step.before[weight].equal(step.after[weight]) and angle > 0:
                continue  # a batch that accumulates
            turned += 1
            assert abs(found - angle) <= relative * angle + absolute
            norms = step.after[weight].double().norm(dim=1)
            assert (norms - 1).abs().max() < 20 * torch.finfo(dtype).eps
    assert turned == 36
