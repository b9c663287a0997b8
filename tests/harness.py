"""A small network, a logger that remembers, and an oracle's view of every optimizer step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers.logger import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


@dataclass
class Step:
    """Weights in float64 before and after one step of one optimizer, and the learning rate of each."""

    batch: int
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    lr: dict[str, float]


class Net(LightningModule):
    """Two convolutions with BatchNorm, a transposed one with groups, and a head; it records its own steps.

    The recording sits in ``optimizer_step``, which knows nothing of the hooks that the package uses.
    """

    def __init__(self, make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer], schedule: bool = True) -> None:
        super().__init__()
        self.make, self.schedule = make, schedule
        self.conv1 = nn.Conv2d(2, 6, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(6)
        self.up = nn.ConvTranspose2d(6, 4, 3, padding=1, groups=2, bias=False)
        self.norm2 = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)
        self.steps: list[Step] = []

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(self.norm2(self.up(x)))
        return self.head(x.mean(dim=(2, 3)))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Cross entropy."""
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def configure_optimizers(self) -> Any:
        """Two groups with different learning rates, and a scheduler that steps every batch."""
        slow = [self.conv1.weight, *self.norm1.parameters()]
        fast = [self.up.weight, *self.norm2.parameters(), *self.head.parameters()]
        optimizer = self.make([{"params": slow, "lr": 1e-3}, {"params": fast, "lr": 3e-3}])
        if not self.schedule:
            return optimizer
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Record what the step did."""
        names = {p: n for n, p in self.named_parameters()}
        before = {n: p.detach().double().clone() for n, p in self.named_parameters()}
        lr = {names[p]: float(g["lr"]) for g in optimizer.param_groups for p in g["params"]}
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        after = {n: p.detach().double().clone() for n, p in self.named_parameters()}
        self.steps.append(Step(self.trainer.fit_loop.epoch_loop._batches_that_stepped, before, after, lr))


class RecordingLogger(Logger):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    @property
    def name(self) -> str:
        """Name of the run."""
        return "recording"

    @property
    def version(self) -> str:
        """Version of the run."""
        return "0"

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Keep a row, less what Lightning adds of its own."""
        self.rows.append((int(step or 0), {k: v for k, v in metrics.items() if k != "epoch"}))

    def log_hyperparams(self, params: Any) -> None:
        """Nothing."""

    def curves(self, prefix: str) -> list[tuple[int, float]]:
        """Steps and values of one tag."""
        return [(step, row[prefix]) for step, row in self.rows if prefix in row]


def images(n: int = 24, dtype: torch.dtype = torch.float32, seed: int = 0) -> TensorDataset:
    """Random images with labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, 6, 6, generator=generator, dtype=torch.float64).to(dtype)
    return TensorDataset(x, torch.randint(3, (n,), generator=generator))


def loader(batch_size: int = 4, **options: Any) -> DataLoader[Any]:
    """Batches in order."""
    return DataLoader(images(**options), batch_size)


def trainer(*callbacks: Any, **options: Any) -> Trainer:
    """A quiet Trainer on the CPU that logs every step."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": RecordingLogger(),
        "log_every_n_steps": 1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": list(callbacks),
    }
    return Trainer(**(defaults | options))


def sgd(**options: Any) -> Callable[[list[dict[str, Any]]], torch.optim.Optimizer]:
    """Plain SGD with these options."""
    return lambda groups: torch.optim.SGD(groups, **options)


class Snapshot(Callback):
    """A copy of the module when the first batch starts, after the callbacks before this one."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Keep it."""
        if batch_idx == 0:
            self.module = copy.deepcopy(pl_module)


def around_the_first_projection(projection: Any, net: LightningModule, data: Any) -> tuple[nn.Module, nn.Module]:
    """Copies of a module just before and just after a projection has put it at its radius; one step is trained."""
    before, after = Snapshot(), Snapshot()
    trainer(before, projection, after, limit_train_batches=1, limit_val_batches=0).fit(net, data)
    return before.module, after.module


def moved(before: nn.Module, after: nn.Module, inputs: Tensor) -> tuple[float, float]:
    """Relative difference of the outputs of two modules, in training and in evaluation mode. They stay as they are."""
    found = []
    for mode in (True, False):
        old, new = (copy.deepcopy(module).train(mode)(inputs).detach().double() for module in (before, after))
        found.append(((new - old).norm() / old.norm()).item())
    return found[0], found[1]
