"""Runs over two processes that Lightning forks or spawns, for :mod:`tests.callbacks.test_processes`.

``python processes.py FOLDER`` writes what each rank saw of each run.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
from torch.utils.data import DataLoader, TensorDataset

from lightning_normreg import EffectiveLRMonitor, NormProjection, WeightNormMonitor

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.harness import RecordingLogger

PERIOD, START, STEPS = 3, 2, 8


class Model(LightningModule):
    """One scale-invariant layer and a head."""

    def __init__(self, optimizer: str) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.layer, self.norm, self.head = nn.Linear(6, 8, bias=False), nn.LayerNorm(8), nn.Linear(8, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross entropy."""
        return nn.functional.cross_entropy(self.head(torch.tanh(self.norm(self.layer(batch[0])))), batch[1])

    def train_dataloader(self) -> DataLoader[Any]:
        """Other batches for each rank."""
        generator = torch.Generator().manual_seed(self.global_rank)
        x = torch.randn(4 * STEPS, 6, generator=generator)
        return DataLoader(TensorDataset(x, torch.randint(3, (4 * STEPS,), generator=generator)), 4)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW, whose state is spread over the processes or not."""
        options = {"lr": 0.05, "weight_decay": 0.1}
        if self.optimizer == "zero":
            # Not above: torch compiles something by a deprecated function in this import, which is an error in tests.
            from torch.distributed.optim import ZeroRedundancyOptimizer

            return ZeroRedundancyOptimizer(self.parameters(), optimizer_class=torch.optim.AdamW, **options)
        return torch.optim.AdamW(self.parameters(), **options)


class Look(Callback):
    """The weight at the end of each batch, where it stands among the callbacks."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Keep it."""
        self.seen.append(pl_module.layer.weight.detach().clone())


class LocalGradients(Callback):
    """Registers the hook that keeps gradients to themselves, which Lightning does on GPUs only."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """On the DDP wrapper."""
        strategy = trainer.strategy
        if strategy._ddp_comm_hook is not None:
            strategy.model.register_comm_hook(strategy._ddp_comm_state, strategy._ddp_comm_hook)


class Write(Callback):
    """Keeps what a rank has seen in a file."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """At the end, where callbacks are those of this process."""
        (recording,) = [logger for logger in trainer.loggers if isinstance(logger, RecordingLogger)]
        found = {
            "rows": recording.rows,
            "metrics": sorted(trainer.callback_metrics),
            "seen": [c.seen for c in trainer.callbacks if isinstance(c, Look)],
            "weights": {name: p.detach().clone() for name, p in pl_module.named_parameters()},
        }
        torch.save(found, f"{self.out}-{trainer.global_rank}.pt")


def fit(folder: Path, name: str, strategy: Any, optimizer: str = "adamw") -> list[Any]:
    """One run."""
    torch.manual_seed(0)
    monitors = [WeightNormMonitor(logging_interval="epoch"), EffectiveLRMonitor(scale_exponent=optimizer == "zero")]
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        max_epochs=1,
        log_every_n_steps=1,
        logger=[RecordingLogger(), CSVLogger(folder / name), TensorBoardLogger(folder / name)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[LocalGradients(), Look(), NormProjection(), *monitors, Look(), Write(folder / name)],
    )
    trainer.fit(Model(optimizer))
    return monitors


def main() -> None:
    """All runs."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    monitors = fit(folder, "fork", "ddp_fork")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert monitors[1].history().empty
    (folder / "said.txt").write_text("\n".join(str(w.message) for w in caught))
    fit(folder, "spawn", "ddp_spawn")
    fit(folder, "zero", "ddp_fork", "zero")
    state = PostLocalSGDState(None, None, start_localSGD_iter=START, post_local_gradient_allreduce=False)
    local = DDPStrategy(
        ddp_comm_state=state, ddp_comm_hook=post_localSGD_hook, model_averaging_period=PERIOD, start_method="fork"
    )
    fit(folder, "local", local)


if __name__ == "__main__":
    main()
