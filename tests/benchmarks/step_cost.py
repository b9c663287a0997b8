"""What share of a real training step the callbacks take: ``python -m tests.benchmarks.step_cost``.

ResNet-18 on batches of 128 images of 32 × 32, in a Trainer. What is timed is the time inside the callbacks' hooks and
inside the hooks of the optimizer, beside that of the whole step, in one run: the difference of two runs would drown in
what else the machine does. Medians over steps, after a warm-up in which scale invariance is found and buffers are made.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_normreg import EffectiveLRMonitor, NormProjection, WeightNormMonitor
from lightning_normreg.steps._step_hooks import StepDispatcher
from tests.benchmarks.probe_cost import loss_of, resnet18

BATCH, WARM_UP = 128, 2
NEVER = 10**6


class ResNet18(LightningModule):
    """With SGD and momentum."""

    def __init__(self) -> None:
        super().__init__()
        self.net = resnet18()[0]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross entropy."""
        return loss_of(self.net, (batch[0], batch[1]))

    def configure_optimizers(self) -> Any:
        """The usual recipe."""
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)


class Stopwatch(Callback):
    """Seconds of each batch, in all and inside what is timed."""

    def __init__(self) -> None:
        self.whole: list[float] = []
        self.inside: list[float] = []
        self._depth, self._spent, self._last = 0, 0.0, 0.0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, its time counted once where such functions call each other."""

        def timing(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:
                    self._spent += time.perf_counter() - start

        return timing

    def on_train_batch_end(self, *args: Any) -> None:
        """One more batch, from the end of the one before to here."""
        now = time.perf_counter()
        self.whole.append(now - self._last)
        self.inside.append(self._spent)
        self._last, self._spent = now, 0.0


HOOKS = ("on_train_batch_start", "on_before_zero_grad", "on_before_optimizer_step", "on_train_batch_end")


def measure(callbacks: list[Any], every: int, steps: int) -> tuple[list[float], list[float]]:
    """Seconds of each step, and inside the callbacks, after the warm-up."""
    torch.manual_seed(0)
    watch = Stopwatch()
    for callback in callbacks:
        for hook in HOOKS:
            setattr(callback, hook, watch.timed(getattr(callback, hook)))
    enter, leave = StepDispatcher.enter, StepDispatcher.leave
    StepDispatcher.enter, StepDispatcher.leave = watch.timed(enter), watch.timed(leave)  # type: ignore[method-assign]
    try:
        count = BATCH * (steps + WARM_UP)
        data = TensorDataset(torch.randn(count, 3, 32, 32), torch.randint(10, (count,)))
        trainer = Trainer(
            accelerator="cpu", max_epochs=1, logger=False, log_every_n_steps=every, callbacks=[*callbacks, watch],
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(ResNet18(), DataLoader(data, batch_size=BATCH))
    finally:
        StepDispatcher.enter, StepDispatcher.leave = enter, leave  # type: ignore[method-assign]
    return watch.whole[WARM_UP:], watch.inside[WARM_UP:]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    steps = parser.parse_args().steps
    warnings.simplefilter("ignore")
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    cases: dict[str, tuple[Callable[[], list[Any]], int]] = {
        "both monitors, step not logged": (lambda: [WeightNormMonitor(), EffectiveLRMonitor()], NEVER),
        "both monitors, step logged": (lambda: [WeightNormMonitor(), EffectiveLRMonitor()], 1),
        "NormProjection": (lambda: [NormProjection()], NEVER),
    }
    table = Table(
        title=f"ResNet-18, batch {BATCH}, 32 × 32, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    for column in ("case", "step, ms", "inside the callbacks, ms", "share, median", "share, max"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for name, (make, every) in cases.items():
        whole, inside = measure(make(), every, steps)
        shares = [part / all_ for part, all_ in zip(inside, whole, strict=True)]
        medians = (statistics.median(whole) * 1e3, statistics.median(inside) * 1e3)
        table.add_row(name, *(f"{m:.3g}" for m in medians), f"{statistics.median(shares):.3%}", f"{max(shares):.3%}")
    Console().print(table)


if __name__ == "__main__":
    main()
