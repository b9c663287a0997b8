"""Does a network that learns settle where predicted? ``python tests/benchmarks/demo_equilibrium.py``, some 5 minutes.

The demo network on digits, at a constant learning rate, until every layer has gone through several relaxation times.
A share of the labels is redrawn in every batch, so that gradients stay mostly noise. Printed are rotation and norm of
each convolution over what is predicted at equilibrium, means over the last third of the run. Exit status 1 if a
rotation is off by more than ``TOLERANCE``. Muon, which takes matrices only, turns the layers of a perceptron; what it
makes of a gradient with a signal in it is not what it makes of noise, so its figures are reported and not judged.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from lion_pytorch import Lion
from pytorch_lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Muon, Optimizer

from lightning_normreg import EffectiveLRMonitor, WeightNormMonitor
from lightning_normreg.demos import DemoConvNet, DigitsDataModule

LABEL_NOISE, STEPS, TOLERANCE = 0.5, 3000, 0.15
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda p: SGD(p, lr=0.1, weight_decay=0.01),
    "SGD, momentum": lambda p: SGD(p, lr=0.01, weight_decay=0.01, momentum=0.9),
    "SGD, Nesterov": lambda p: SGD(p, lr=0.01, weight_decay=0.01, momentum=0.9, nesterov=True),
    "AdamW": lambda p: AdamW(p, lr=5e-3, weight_decay=0.2),
    "Adam + L2": lambda p: Adam(p, lr=2e-3, weight_decay=0.01),
    "Lion": lambda p: Lion(p, lr=5e-4, weight_decay=2.0),
    "Muon": lambda p: Muon(p, lr=5e-3, weight_decay=0.2),
}


class Noisy(DemoConvNet):
    """The demo network with redrawn labels and any optimizer, which decays its convolutions only."""

    def __init__(self, make: Callable[[Any], Optimizer]) -> None:
        super().__init__()
        self.make = make

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy."""
        images, labels = batch
        noisy = torch.rand(len(labels)) < LABEL_NOISE
        return nn.functional.cross_entropy(self(images), torch.where(noisy, torch.randint_like(labels, 10), labels))

    def configure_optimizers(self) -> Optimizer:
        """Two groups."""
        filters = [p for p in self.parameters() if p.ndim == 4]
        return self.make(
            [{"params": filters}, {"params": [p for p in self.parameters() if p.ndim != 4], "weight_decay": 0}]
        )


class Perceptron(Noisy):
    """Layers that are matrices, each in front of a BatchNorm without parameters."""

    def __init__(self, make: Callable[[Any], Optimizer]) -> None:
        super().__init__(make)
        for name in ("block1", "block2", "block3", "block4", "head"):
            delattr(self, name)
        sizes = (64, 64, 64, 64)
        hidden = [
            nn.Sequential(nn.Linear(a, b, bias=False), nn.BatchNorm1d(b, affine=False), nn.ReLU())
            for a, b in pairwise(sizes)
        ]
        self.layers = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(64, 10, bias=False))

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.layers(images)
        return logits

    def configure_optimizers(self) -> Optimizer:
        """One group."""
        return self.make(self.parameters())


def fit(net: LightningModule, steps: int, *callbacks: Callback) -> None:
    """Train on the digits, and nothing else."""
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(max_steps=steps, accelerator="cpu", limit_val_batches=0, callbacks=[*callbacks], **off)  # type: ignore[arg-type]
    trainer.fit(net, DigitsDataModule())


def measure(name: str) -> dict[str, tuple[float, float]]:
    """For each layer that is scale-invariant, rotation and norm over what is predicted at equilibrium."""
    torch.manual_seed(0)
    net = (Perceptron if name == "Muon" else Noisy)(OPTIMIZERS[name])
    rotation, norm = EffectiveLRMonitor(10), WeightNormMonitor(10)
    fit(net, STEPS, rotation, norm)
    turned, norms = (m.history().set_index("step").loc[STEPS * 2 // 3 :] for m in (rotation, norm))
    layers = [tag.split("/")[2] for tag in turned if tag.startswith("weights/equilibrium_norm/")]
    for said in rotation.equilibrium_status():
        print(f"{name}: {said}")
    return {
        layer: (
            float((turned[f"weights/rotation/{layer}"] / turned[f"weights/equilibrium_rotation/{layer}"]).mean()),
            float((norms[f"weights/unit_norm_rms/{layer}"] / turned[f"weights/equilibrium_norm/{layer}"]).mean()),
        )
        for layer in layers
    }


def main() -> int:
    """Print the table; 1 if a rotation is off."""
    warnings.simplefilter("ignore")
    for logger in ("pytorch_lightning", "lightning.pytorch", "lightning_utilities"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    table = Table("optimizer", "rotation / predicted", "norm / predicted", title=f"last third of {STEPS} steps")
    off = []
    for name in OPTIMIZERS:
        found = measure(name)
        rotations, norms = ([pair[k] for pair in found.values()] for k in (0, 1))
        table.add_row(name, " ".join(f"{r:.3f}" for r in rotations), " ".join(f"{n:.3f}" for n in norms))
        if name != "Muon" and any(abs(r - 1) > TOLERANCE for r in rotations):
            off.append(name)
    Console().print(table)
    print(f"Off by more than {TOLERANCE:.0%}: {', '.join(off) or 'none'}.")
    return int(bool(off))


if __name__ == "__main__":
    sys.exit(main())
