"""What a training step costs with the callbacks, as ratios to the same step without them, in one run."""

from __future__ import annotations

import logging
import statistics
import time
import warnings
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_normreg import EffectiveLRMonitor, NormProjection, WeightNormMonitor

STEPS, ROUNDS, WARM_UP = 40, 7, 10


class ConvNet(LightningModule):
    """Six convolutions of 64 filters with BatchNorm, 186 000 weights."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(6):
            layers += [nn.Conv2d(3 if i == 0 else 64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(64, 10)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross entropy."""
        return nn.functional.cross_entropy(self.head(self.features(batch[0]).mean(dim=(2, 3))), batch[1])

    def configure_optimizers(self) -> Any:
        """SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Clock(Callback):
    """Median time of a batch after the warm-up."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        """Start."""
        self.start = time.perf_counter()

    def on_train_batch_end(self, *args: Any) -> None:
        """Stop."""
        self.times.append(time.perf_counter() - self.start)

    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.times[WARM_UP:])


def step_time(callbacks: list[Any], every: int) -> float:
    """Median seconds of a step under these callbacks."""
    torch.manual_seed(0)
    clock = Clock()
    data = TensorDataset(torch.randn(16 * STEPS, 3, 16, 16), torch.randint(10, (16 * STEPS,)))
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, logger=False, log_every_n_steps=every, callbacks=[*callbacks, clock],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(ConvNet(), DataLoader(data, batch_size=16))
    return clock.median()


def main() -> None:
    """Print the table."""
    warnings.simplefilter("ignore")
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    convolutions = [f"features.{3 * i}.weight" for i in range(6)]
    cases: dict[str, Any] = {
        "no callback": (lambda: [], 10**6),
        "both monitors, step not logged": (lambda: [WeightNormMonitor(), EffectiveLRMonitor()], 10**6),
        "both monitors, every step logged": (lambda: [WeightNormMonitor(), EffectiveLRMonitor()], 1),
        "projection": (lambda: [NormProjection(include=convolutions)], 10**6),
    }
    ratios: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(ROUNDS):
        times = {name: step_time(make(), every) for name, (make, every) in cases.items()}
        for name, seconds in times.items():
            ratios[name].append(seconds / times["no callback"])
    table = Table(title=f"time of a training step over that without callbacks, {ROUNDS} rounds")
    for column in ("case", "min", "median", "max"):
        table.add_column(column)
    for name, values in ratios.items():
        table.add_row(name, *(f"{v:.3f}" for v in (min(values), statistics.median(values), max(values))))
    Console().print(table)


if __name__ == "__main__":
    main()
