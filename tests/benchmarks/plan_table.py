"""Plans against runs: ``python -m tests.benchmarks.plan_table [steps]``.

Six recipes on four small networks: medians over the run of |log(measured/planned)| of norm and of rotation, for all
that is planned; and for what is refused by how much the formulas would have been off.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_normreg import Plan, find_scale_invariance, find_symmetries, plan
from lightning_normreg.steps import RotationTracker, StepDispatcher, watch
from tests.benchmarks.text_models import batches, loss, make
from tests.twins import Lion

BATCH, CONTEXT, LOOKED = 8, 32, 10
ARCHITECTURES = ("resnet", "vit", "gpt2", "qwen3")


def cosine(steps: int, step: int, warmup: float = 0.03) -> float:
    """Warm-up and cosine to a fiftieth."""
    done = (step + 1) / steps
    return done / warmup if done < warmup else 0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2


def trapezoid(steps: int, step: int) -> float:
    """Warm-up, constant, and linear to 0 in the last fifth."""
    done = (step + 1) / steps
    return min(1.0, done / 0.03, (1.02 - done) / 0.2)


ADAM: dict[str, Any] = {"optimizer": "AdamW", "betas": (0.9, 0.95)}
RECIPES: dict[str, tuple[dict[str, Any], Callable[[int, int], float]]] = {
    "AdamW 0.003, 0.1, cosine": (ADAM | {"lr": 3e-3, "weight_decay": 0.1}, cosine),
    "AdamW 0.001, 1, trapezoid": (ADAM | {"lr": 1e-3, "weight_decay": 1.0}, trapezoid),
    "AdamW 0.002, 0.3, β₂ 0.999, constant": (
        ADAM | {"lr": 2e-3, "weight_decay": 0.3, "betas": (0.9, 0.999)}, lambda n, s: 1.0),
    "AdamW 0.002, no decay, cosine": (ADAM | {"lr": 2e-3, "weight_decay": 0.0}, cosine),
    "Lion 0.0003, 1, cosine": ({"optimizer": "lion_pytorch.Lion", "lr": 3e-4, "weight_decay": 1.0}, cosine),
    "SGD 0.1, 0.005, cosine": ({"optimizer": "SGD", "lr": 0.1, "weight_decay": 5e-3, "momentum": 0.9}, cosine),
}  # fmt: skip
CLASSES: dict[str, Any] = {"AdamW": torch.optim.AdamW, "SGD": torch.optim.SGD, "lion_pytorch.Lion": Lion}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Two convolutions beside the skip connection."""
        inside = self.norms[0](self.first(x)).relu()
        return (x + self.norms[1](self.second(inside))).relu()


def model_of(name: str, seed: int) -> tuple[nn.Module, Callable[..., Tensor]]:
    """A network, and its loss."""
    if name != "resnet":
        return make(name, seed, context=CONTEXT), loss
    torch.manual_seed(seed)
    stem = [nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    ends = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10)]
    net = nn.Sequential(*stem, *(Block(16) for _ in range(3)), *ends)
    return net, lambda m, batch: nn.functional.cross_entropy(m(batch[0]), batch[1])


Measured = dict[str, list[tuple[int, float, float]]]
"""By name step, norm and rotation."""


def compared(architecture: str, recipe: str, steps: int, seed: int = 0) -> tuple[Plan, Measured, Measured]:
    """The plan, and the run."""
    settings, factor = RECIPES[recipe]
    net, of = model_of(architecture, seed)
    data = "vit" if architecture == "resnet" else architecture
    batch = next(batches(seed, BATCH, CONTEXT, 1, name=data))
    verdict = find_scale_invariance(net, batch, forward=of, progress=False)
    symmetries = find_symmetries(net, batch, forward=of, progress=False)
    optimizer = CLASSES[settings["optimizer"]](
        net.parameters(), **{k: v for k, v in settings.items() if k != "optimizer"}
    )
    schedule = [factor(steps, step) for step in range(steps)]
    planned = plan(net, settings, schedule, invariance=verdict, symmetries=symmetries)
    watched = watch(net, verdict, symmetries=symmetries)
    tracker, dispatcher = RotationTracker(watched, equilibrium=True), StepDispatcher()
    dispatcher.subscribe(tracker)
    dispatcher.attach([optimizer])
    found: Measured = {one.name: [] for one in watched}
    lr = settings["lr"]
    for step, each in enumerate(batches(seed, BATCH, CONTEXT, steps, name=data)):
        for group in optimizer.param_groups:
            group["lr"] = lr * schedule[step]
        tracker.arm(step % LOOKED == 0)
        optimizer.zero_grad()
        of(net, each).backward()
        optimizer.step()
        for name, values in tracker.collect().items():
            by = {curve.key: value for curve, value in values.items()}
            if by.get("rotation") and by.get("unit_norm_rms"):
                found[name].append((step, by["unit_norm_rms"], by["rotation"]))
    dispatcher.remove()
    return planned, found, found


def off(planned: Plan, measured: Sequence[tuple[int, float, float]], name: str) -> tuple[float, float]:
    """Medians of |log(measured/planned)|, of norm and rotation."""
    apart: tuple[list[float], list[float]] = ([], [])
    for step, norm, rotation in measured:
        for kept, value, key in zip(apart, (norm, rotation), ("norm", "rotation"), strict=True):
            kept.append(abs(math.log(value / planned.at_step(name, key, step))))
    return median(apart[0]), median(apart[1])


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 1500
    names = sys.argv[2].split(",") if len(sys.argv) > 2 else ARCHITECTURES
    for name in names:
        for recipe in RECIPES:
            planned, found, _ = compared(name, recipe, steps)
            print(name, recipe)
            for unit in found:
                if unit in planned.units:
                    a, b = off(planned, found[unit], unit)
                    print(f"   {unit:60s} {a:.3f} {b:.3f}", flush=True)
                else:
                    print(f"   {unit:60s} refused: {planned.refused.get(unit)}", flush=True)


if __name__ == "__main__":
    main()
