"""A fit under one strategy, run by :mod:`tests.callbacks.test_strategies` in processes of its own.

``python strategies.py STRATEGY OPTIMIZER UNIT PROJECT FOLDER`` writes what each rank ends with as JSON.
"""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_normreg import (
    CorrectedDecay,
    EffectiveLRMonitor,
    NormProjection,
    NormSummary,
    RotationControl,
    WeightNormMonitor,
    decay_groups,
    find_scale_invariance,
)
from lightning_normreg._symmetries import ProbeError
from lightning_normreg.callbacks import _probing

STEPS_PER_EPOCH, BATCH = 6, 8


class FSDP1(FSDPStrategy):
    """Lightning wants a GPU for this strategy, by its very type; torch does not."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **self.kwargs)


class Model(LightningModule):
    """Rows that are odd in number, a whole layer with its bias, blocks of rows, and a head of a single row.

    Over two processes the five rows of the first layer are split 3 : 2, and the row of the head 1 : 0, in each of the
    copies under "hsdp".
    """

    def __init__(self, strategy: str, optimizer: str) -> None:
        super().__init__()
        self.strategy, self.kind = strategy, optimizer
        self.first = nn.utils.parametrizations.weight_norm(nn.Linear(8, 5))
        self.second = nn.Linear(5, 12)
        self.norm = nn.LayerNorm(12)
        self.third = nn.Linear(12, 12, bias=False)
        self.groups = nn.GroupNorm(3, 12)
        self.head = nn.Linear(12, 1)

    def configure_model(self) -> None:
        """Spread it, once."""
        if self.strategy in ("single", "ddp", "fsdp1") or isinstance(self.head.weight, DTensor):
            return
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        mesh = self.device_mesh
        if "tp" in self.strategy:
            plan = {
                "second": ColwiseParallel(output_layouts=torch.distributed.tensor.Replicate()),
                "third": RowwiseParallel(input_layouts=torch.distributed.tensor.Replicate()),
            }
            parallelize_module(self, mesh["tensor_parallel"], plan)
        if self.strategy in ("fsdp", "fsdp+tp", "hsdp"):
            # With two dimensions, weights are copied along the first and spread along the second.
            spread = mesh if self.strategy == "hsdp" else mesh["data_parallel"]
            for part in (self.second, self.third, self):
                fully_shard(part, mesh=spread)

    def forward(self, x: Tensor) -> Tensor:
        """One number for each sample."""
        x = torch.tanh(self.first(x))
        x = torch.relu(self.norm(self.second(x)))
        x = torch.relu(self.groups(self.third(x)))
        return self.head(x).squeeze(1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Squared error."""
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Makes the root of FSDP keep its weights unsharded."""
        self(batch[0])

    def configure_optimizers(self) -> Any:
        """Plain, or with decay groups and a schedule."""
        if self.kind == "sgd":
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
        optimizer = torch.optim.AdamW(decay_groups(self, 0.1, bias=0.02), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def data(rank: int, world: int, dtype: torch.dtype) -> DataLoader[Any]:
    """The same global batches for any number of processes: each takes its part of every batch."""
    generator = torch.Generator().manual_seed(1)
    n = STEPS_PER_EPOCH * BATCH
    x = torch.randn(n, 8, generator=generator, dtype=dtype)
    y = torch.randn(n, generator=generator, dtype=dtype)
    order = torch.arange(n).view(STEPS_PER_EPOCH, world, BATCH // world)[:, rank].flatten()
    return DataLoader(TensorDataset(x[order], y[order]), batch_size=BATCH // world)


def count_collectives() -> Counter[str]:
    """Counts the all-reduces that go through ``torch.distributed``, of the package and not of DDP or FSDP."""
    counts: Counter[str] = Counter()
    real = dist.all_reduce

    def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if "lightning_normreg" in sys._getframe(1).f_globals.get("__name__", ""):
            counts["all_reduce"] += 1
        return real(tensor, *args, **kwargs)

    dist.all_reduce = counting
    return counts


def _callbacks(verdict: Any, optimizer: str, unit: Any, project: str) -> list[Any]:
    # What is asked has reductions of its own, which are not to be counted.
    symmetries: Any = "auto" if project == "asked" else None
    callbacks: list[Any] = [
        WeightNormMonitor(invariance=verdict, symmetries=symmetries, unit=unit),
        EffectiveLRMonitor(
            invariance=verdict,
            symmetries=symmetries,
            unit=unit,
            gradient=True,
            equilibrium=unit == "auto",
            scale_exponent=optimizer == "sgd",  # others have it in a state that is spread as well
        ),
    ]
    if optimizer == "adamw" and project in ("project", "asked", "free"):
        callbacks.append(CorrectedDecay(invariance=verdict))
    named = None if unit == "auto" else ["second.weight", "third.weight", "head.weight"]
    chosen: Any = {"invariance": verdict, "unit": unit, "include": named, "on_not_invariant": "allow"}
    if project in ("project", "asked"):
        callbacks.append(NormProjection(**chosen))
    if project == "asked":
        callbacks.append(NormSummary())
    if project.startswith("rotate"):
        callbacks.append(
            RotationControl(0.03, **chosen, **({"per": "unit", "hold": "mean"} if "mean" in project else {}))
        )
    return callbacks


def _refuse(*args: Any) -> Any:
    raise ProbeError("Nobody can be probed.")


def main() -> None:
    """Fit and write."""
    warnings.simplefilter("ignore")
    strategy, optimizer, unit, project, folder, *rest = sys.argv[1:]
    dtype = torch.float64 if "64" in rest else torch.float32
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    parts = {"single": (1, 1), "tp": (1, 2), "fsdp+tp": (2, 2), "hsdp": (2, 2)}.get(strategy, (2, 1))
    torch.manual_seed(0)
    torch.set_num_threads(1)
    counts = count_collectives()
    model = Model(strategy, optimizer).to(dtype)
    copy = Model("single", optimizer).to(dtype)
    copy.load_state_dict(model.state_dict())
    shared = parts[1] if "tp" in strategy else 1  # processes that see the same batches
    loader = data(rank // shared, math.prod(parts) // shared, dtype)
    verdict: Any = find_scale_invariance(copy, next(iter(loader)))
    if rank > 0:  # what the first process was given counts
        verdict = dict.fromkeys(verdict, verdict["head.weight"])
    if project in ("observe", "asked"):
        verdict = None
    if project == "observe":  # nobody can be probed: the gradients of the first steps have to do
        _probing._on_few_samples = _refuse
    used: Any = {"single": "auto", "ddp": "ddp"}.get(strategy)
    used = used or (FSDP1() if strategy == "fsdp1" else ModelParallelStrategy(*parts))
    callbacks = _callbacks(verdict, optimizer, unit, project)
    trainer = Trainer(
        accelerator="cpu",
        devices=parts[0] * parts[1],
        strategy=used,
        precision="32-true",  # which converts nothing; ModelParallelStrategy does not know "64-true"
        max_epochs=6 if project == "observe" else 2,
        log_every_n_steps=3,
        num_sanity_val_steps=0 if optimizer == "sgd" else 1,  # nothing has been unsharded before the first step
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=callbacks,
    )
    trainer.fit(model, loader, loader)
    collectives = counts["all_reduce"]
    held = {name: norms for c in callbacks if hasattr(c, "held") for name, norms in c.held().items()}
    weights = whole_weights(trainer, model)
    history = callbacks[1].history().to_dict("records") + callbacks[0].history().to_dict("records")
    with open(f"{folder}/{rank}.json", "w") as file:
        found = {"history": history, "weights": weights, "held": held, "collectives": collectives}
        json.dump(found | {"acts": _acts(callbacks)}, file)


def _acts(callbacks: list[Any]) -> list[dict[str, str]]:
    """What decay does to each parameter, by each NormSummary."""
    summaries = [c for c in callbacks if isinstance(c, NormSummary)]
    return [{row["parameter"]: row["acts"] for row in summary.rows()} for summary in summaries]


def whole_weights(trainer: Trainer, model: LightningModule) -> dict[str, Any]:
    """Every parameter, put together from all processes."""
    if not isinstance(trainer.strategy, FSDP1):
        return {name: _whole(p) for name, p in model.named_parameters()}
    with FullyShardedDataParallel.summon_full_params(trainer.model):
        return {name: p.detach().tolist() for name, p in model.named_parameters()}


def _whole(parameter: Any) -> Any:
    parameter = parameter.detach()
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).tolist()


if __name__ == "__main__":
    main()
