"""A transformer trained under some strategy, whose steps are recorded; run by :mod:`tests.callbacks.test_sets`.

``python -m tests.callbacks.sets STRATEGY CONTROL BITS FOLDER`` writes what each rank ends with as JSON.
"""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW
from torch.utils.data import DataLoader

from lightning_normreg import EffectiveLRMonitor, NormProjection, RotationControl, WeightNormMonitor
from tests.symmetries._small_models import LENGTH, LLAMA, WORDS, Kind, Transformer

LR, DECAY, ANGLE = 0.01, 0.1, 0.03
STREAM = "residual_stream"
CONTROLS: dict[str, Any] = {
    "free": lambda: [],
    "project": lambda: [NormProjection(unit="set")],
    "rotate": lambda: [RotationControl(ANGLE, unit="set")],
}


def writers(kind: Kind = LLAMA, depth: int = 2) -> list[str]:
    """What writes into the stream of a transformer in front of whose branches and head a normalization stands.

    Reasoned by hand: all that is added to the stream, in the order in which it is.
    """
    first = ["patch.weight", "patch.bias", "token"] if kind.image else ["embed.weight"]
    first += ["position.weight"] if kind.layer_norm else []
    sides = ("weight", "bias") if kind.bias else ("weight",)
    return [
        *(f"net.{name}" for name in first),
        *(f"net.blocks.{i}.{name}.{side}" for i in range(depth) for name in ("o", "down") for side in sides),
    ]


class Stream(LightningModule):
    """A transformer that records all of its weights around each step, in float64."""

    def __init__(
        self,
        kind: Kind = LLAMA,
        depth: int = 2,
        strategy: str = "single",
        make: Callable[..., Any] = AdamW,
        **sizes: int,
    ) -> None:
        super().__init__()
        self.net = Transformer(kind, depth=depth, **sizes)
        self.kind, self.strategy, self.make = kind, strategy, make
        self.steps: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []

    def configure_model(self) -> None:
        """Spread it, once."""
        if self.strategy == "single" or isinstance(self.net.blocks[0].o.weight, DTensor):
            return
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import Replicate
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        mesh = self.device_mesh
        if "tp" in self.strategy:
            plan: dict[str, Any] = {}
            for i in range(len(self.net.blocks)):
                plan |= {f"net.blocks.{i}.o": RowwiseParallel(input_layouts=Replicate())}
                plan |= {f"net.blocks.{i}.{name}": ColwiseParallel() for name in ("gate", "up")}
                plan |= {f"net.blocks.{i}.down": RowwiseParallel()}
            parallelize_module(self, mesh["tensor_parallel"], plan)
        if self.strategy != "tp":
            spread = mesh if self.strategy == "hsdp" else mesh["data_parallel"]
            for part in (*self.net.blocks, self):
                fully_shard(part, mesh=spread)

    def forward(self, batch: Tensor) -> Tensor:
        """Logits; called as a whole, so that FSDP's root gathers its own."""
        return self.net(batch)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Cross entropy of the next word, or of what an image begins with."""
        if self.kind.image:
            return nn.functional.cross_entropy(self(batch), (batch[:, 0, 0, 0] > 0).long())
        return nn.functional.cross_entropy(self(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Recorded here, which knows nothing of the hooks that the package uses."""
        before = self.whole()
        super().optimizer_step(*args, **kwargs)
        self.steps.append((before, self.whole()))

    def whole(self) -> dict[str, Tensor]:
        """Every parameter, put together from all processes."""
        found = {name: p.detach() for name, p in self.named_parameters()}
        return {n: (p.full_tensor() if isinstance(p, DTensor) else p).double().clone() for n, p in found.items()}

    def configure_optimizers(self) -> Any:
        """One group, one learning rate."""
        return self.make(self.parameters(), lr=LR, weight_decay=DECAY)


def flat(weights: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """The concatenation."""
    return torch.cat([weights[name].flatten() for name in names])


def angle(a: Tensor, b: Tensor) -> float:
    """Between two vectors, by Kahan's formula, which is exact for small ones."""
    a, b = a / a.norm(), b / b.norm()
    return 2 * math.atan2(float((a - b).norm()), float((a + b).norm()))


def expected(step: tuple[dict[str, Tensor], dict[str, Tensor]], names: Sequence[str]) -> dict[str, float]:
    """Curves of the set, from concatenated weights."""
    before, after = step
    a, b = flat(before, names), flat(after, names)
    curves = {
        f"weights/weight_norm/{STREAM}": float(a.norm()),
        f"weights/effective_lr/{STREAM}": LR / float(a.norm()),
        f"weights/rotation/{STREAM}": angle(a, b),
        f"weights/relative_update/{STREAM}": float((b - a).norm() / a.norm()),
    }
    for name in names:
        curves[f"weights/set_share/{name}"] = float((before[name].norm() / a.norm()) ** 2)
        curves[f"weights/rotation/{name}"] = angle(before[name].flatten(), after[name].flatten())
    return curves


def samples(kind: Kind = LLAMA, rank: int = 0, world: int = 1, count: int = 32) -> DataLoader[Any]:
    """The same global batches for any number of processes: each takes its part of every batch."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(WORDS, (count, LENGTH), generator=generator)
    data = torch.randn(count, 1, 4, 4, generator=generator, dtype=torch.float64) if kind.image else words
    order = torch.arange(count).view(-1, world, 8 // world)[:, rank].flatten()
    return DataLoader(data[order], batch_size=8 // world)  # type: ignore[arg-type]


def fitted(model: Stream, *callbacks: Callback, loader: Any = None, **options: Any) -> Trainer:
    """A quiet fit that logs each step, for one epoch."""
    ckpt_path = options.pop("ckpt_path", None)
    chosen: dict[str, Any] = {"max_epochs": 1, "accelerator": "cpu", "devices": 1, "log_every_n_steps": 1, **options}
    silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(callbacks=[*callbacks], use_distributed_sampler=False, **silent, **chosen)
    trainer.fit(model, loader or samples(model.kind), ckpt_path=ckpt_path)
    return trainer


def main() -> None:
    """Fit and write."""
    warnings.simplefilter("ignore")
    strategy, control, bits, folder = sys.argv[1:]
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    parts = {"single": (1, 1), "tp": (1, 2), "fsdp+tp": (2, 2), "hsdp": (2, 2)}.get(strategy, (2, 1))
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = Stream(strategy=strategy).to(torch.float64 if bits == "64" else torch.float32)
    shared = parts[1] if "tp" in strategy else 1  # processes that see the same batches
    monitors = [EffectiveLRMonitor(), WeightNormMonitor()]
    used: Any = "auto" if strategy == "single" else ModelParallelStrategy(*parts)
    loader = samples(LLAMA, rank // shared, math.prod(parts) // shared)
    fitted(model, *monitors, *CONTROLS[control](), loader=loader, devices=math.prod(parts), strategy=used)
    rows = [monitor.history().to_dict("records") for monitor in monitors]
    found = {"history": [a | b for a, b in zip(*rows, strict=True)]}
    found["expected"] = [expected(step, writers()) for step in model.steps]
    norms = [float(flat(after, writers()).norm()) for _, after in model.steps]
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(found | {"norms": norms}, file)


if __name__ == "__main__":
    main()
