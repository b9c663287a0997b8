"""Runs that are killed in the middle of an epoch and resumed, for :mod:`tests.callbacks.test_killed`.

``python killed.py DEVICES FOLDER`` forks a process for each run, and writes what each rank ends with.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_normreg import CorrectedDecay, EffectiveLRMonitor, NormProjection, WeightNormMonitor

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.harness import RecordingLogger

EPOCHS, BATCHES, SAVE_EVERY, KILLED_AFTER = 3, 6, 4, 9
"""Steps 0 to 17; killed after 9 of them, in the second epoch, when the last checkpoint is that of step 8."""


class Order:
    """Batch numbers of an epoch, shuffled by seed and epoch, as Lightning tells it."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this at the start of each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """Another order in each epoch."""
        generator = torch.Generator().manual_seed(1000 + self.epoch)
        return iter(torch.randperm(BATCHES, generator=generator).tolist())


class Loader:
    """A loader with a state: after a resume it goes on with the batch after the last one, in that epoch's order."""

    def __init__(self, rank: int, world: int, *, stateful: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(BATCHES, 8, 6, generator=generator)
        y = torch.randint(3, (BATCHES, 8), generator=generator)
        part = slice(rank * 8 // world, (rank + 1) * 8 // world)
        self.batches = list(zip(x[:, part], y[:, part], strict=True))
        self.sampler = Order()
        self.done = self.skip = 0
        if stateful:
            self.state_dict = lambda: {"done": self.done % BATCHES}
            self.load_state_dict = lambda state: setattr(self, "skip", state["done"])

    def __len__(self) -> int:
        """Batches in an epoch."""
        return BATCHES

    def __iter__(self) -> Iterator[Any]:
        """The batches of an epoch, or what is left of it."""
        skip, self.skip = self.skip, 0
        for place, number in enumerate(self.sampler):
            if place >= skip:
                self.done = place + 1
                yield self.batches[number]


class Model(LightningModule):
    """LayerNorm and BatchNorm, with a scheduler that steps every batch."""

    def __init__(self, cycle_momentum: bool) -> None:
        super().__init__()
        self.cycle_momentum = cycle_momentum
        self.net = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 8, bias=False))
        self.norm, self.head = nn.BatchNorm1d(8), nn.Linear(8, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross entropy."""
        return nn.functional.cross_entropy(self.head(self.norm(self.net(batch[0]))), batch[1])

    def configure_optimizers(self) -> Any:
        """AdamW under a one-cycle schedule."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)
        schedule = {"total_steps": EPOCHS * BATCHES, "cycle_momentum": self.cycle_momentum}
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, **schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Kill(Callback):
    """Ends this process the way the machine does when it is out of memory."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """After a step, before anything is saved."""
        if trainer.global_step == KILLED_AFTER:
            os.kill(os.getpid(), signal.SIGKILL)


def callbacks(which: str) -> list[Any]:
    """Monitors, with means over epochs and over steps, and on request what changes the weights."""
    monitors = [
        WeightNormMonitor(logging_interval="epoch"),
        EffectiveLRMonitor(gradient=True),
        EffectiveLRMonitor(2, include=["net.*"], logging_interval="epoch"),
    ]
    changing = [NormProjection("initial", include=["net.3.weight"]), CorrectedDecay(include=["net.0.weight"])]
    return {"none": [], "monitors": monitors, "all": monitors + changing}[which]


def fit(
    devices: int, out: Path, checkpoints: Path, *, resume: str | None, kill: bool, stateful: bool, which: str
) -> None:
    """One run; every rank writes what it ends with."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    extra = callbacks(which)
    saver = ModelCheckpoint(checkpoints, "{step}", every_n_train_steps=SAVE_EVERY, save_top_k=-1)
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="auto" if devices == 1 else "ddp_fork",
        max_epochs=EPOCHS,
        logger=RecordingLogger(),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[*extra, *([Kill()] if kill else []), saver, Write(out)],
    )
    model = Model(cycle_momentum=devices > 1)
    model.train_dataloader = lambda: Loader(trainer.global_rank, trainer.world_size, stateful=stateful)  # type: ignore[method-assign]
    trainer.fit(model, ckpt_path=resume)


class Write(Callback):
    """Keeps rows and weights of a rank in a file."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """At the end, where the logger is still that of this process."""
        frames = [c._history.to_frame() for c in trainer.callbacks if hasattr(c, "_history")]
        # What a step has not logged is not a number in its row.
        histories = [[row.dropna().to_dict() for _, row in frame.iterrows()] for frame in frames]
        state = {name: value.clone() for name, value in pl_module.state_dict().items()}
        found = {"rows": trainer.logger.rows, "histories": histories, "state": state}
        torch.save(found, f"{self.out}-{trainer.global_rank}.pt")


def forked(**options: Any) -> int | None:
    """Exit code of a process that does this."""

    def target() -> None:
        try:
            fit(**options)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    process.join()
    return process.exitcode


def main() -> None:
    """A whole run, one that is killed, and the rest of it; with a plain loader the last two, monitored and not."""
    devices, folder = int(sys.argv[1]), Path(sys.argv[2])
    runs = [("stateful", "all"), *([("plain", "monitors"), ("plain", "none")] if devices == 1 else [])]
    for loader, which in runs:
        options: dict[str, Any] = {"devices": devices, "stateful": loader == "stateful", "which": which}
        if loader == "stateful":
            forked(out=folder / "whole", checkpoints=folder / "checkpoints-whole", resume=None, kill=False, **options)
        saved = folder / f"checkpoints-{which}"
        code = forked(out=folder / "killed", checkpoints=saved, resume=None, kill=True, **options)
        # Under DDP it is the parent of those who are killed, and says so by an error.
        assert code == (-signal.SIGKILL if devices == 1 else 1), code
        (path,) = [p for p in saved.iterdir() if "step=8" in p.name]
        code = forked(out=folder / which, checkpoints=saved, resume=str(path), kill=False, **options)
        assert code == 0, code


if __name__ == "__main__":
    main()
