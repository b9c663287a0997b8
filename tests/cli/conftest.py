"""A user's module and data module that have never heard of the package, in a folder of their own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import pytorch_lightning  # noqa: F401  # its log keeps to the stderr that is there at its import: not one of a test

USERS_MODULE = """
import torch
from torch import nn
import {namespace} as pl


class Net(pl.LightningModule):
    def __init__(self, width: int = 8):
        super().__init__()
        if width < 1:
            raise ValueError(f"width must be positive, got {{width}}")
        self.scale = nn.Parameter(torch.ones(4))
        self.hidden = nn.Linear(4, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 2)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self.head(self.norm(self.hidden(x * self.scale)).relu()), y)
        self.log("flat", 1.0)
        return loss


class OwnOptimizer(Net):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.125, weight_decay=0.5)


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        x, y = torch.randn(24, 4, generator=generator), torch.randint(2, (24,), generator=generator)
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)


def halved(epoch):
    return 0.5**epoch
"""
BATCHES = 6


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The present folder, with ``users_module`` and its twin ``users_other_module`` for ``lightning.pytorch``."""
    for name, namespace in (("users_module", "pytorch_lightning"), ("users_other_module", "lightning.pytorch")):
        (tmp_path / f"{name}.py").write_text(USERS_MODULE.format(namespace=namespace))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for name in ("users_module", "users_other_module"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path
