"""What rotation control costs beside projection and beside the optimizers' own steps; memory as well.

``python tests/benchmarks/rotation_cost.py [cuda]`` prints a table, in two or three minutes on one core. Times on a CPU
are those of the thread, so that what else the machine does counts little; ratios are medians of rounds, in which the
cases follow each other. Exit status 1 if control takes more than 6 times as long as projection.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_normreg.steps import Projector, Rotator, watch

ROUNDS, LIMIT = 7, 6.0


class Weights(nn.Module):
    """Parameters of some shapes."""

    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Conv2d(s[1], s[0], s[2], bias=False) if len(s) == 4 else nn.Linear(s[1], s[0], bias=False)
            for s in shapes
        )


def resnet18() -> list[tuple[int, ...]]:
    """Convolutions of ResNet-18, 11 million weights."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), *[(64, 64, 3, 3)] * 4]
    for a, b in ((64, 128), (128, 256), (256, 512)):
        shapes += [(b, a, 3, 3), *[(b, b, 3, 3)] * 3, (b, a, 1, 1)]
    return shapes


def gpt2() -> list[tuple[int, ...]]:
    """Matrices of GPT-2 with 124 million weights."""
    return [(50257, 768), (1024, 768), *[(2304, 768), (768, 768), (3072, 768), (768, 3072)] * 12]


def seconds(act: Callable[[], Any], device: str) -> float:
    """Time of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
        start = time.perf_counter()
        act()
        torch.cuda.synchronize()
        return time.perf_counter() - start
    start = time.thread_time()
    act()
    return time.thread_time() - start


def measure(shapes: list[tuple[int, ...]], device: str) -> tuple[dict[str, list[float]], float]:
    """Seconds of each case in each round, and the copy's size over that of the weights."""
    torch.manual_seed(0)
    net = Weights(shapes).to(device)
    parameters = list(net.parameters())
    for p in parameters:
        p.grad = torch.randn_like(p)
    sgd = torch.optim.SGD(parameters, lr=1e-4, momentum=0.9)
    adamw = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    watched = watch(net, unit="neuron")
    projector, rotator = Projector(watched, "auto"), Rotator(watched, "auto", 0.01)
    projector.project(watched)
    size = rotator.allocate([sgd]) / sum(p.numel() * p.element_size() for p in parameters)

    def control_before() -> None:
        rotator.record.begin()
        rotator.before_step(0, sgd)

    found: dict[str, list[float]] = {}
    for _ in range(ROUNDS + 1):
        times = {"copy": seconds(control_before, device), "SGD with momentum": seconds(sgd.step, device)}
        times["control"] = times["copy"] + seconds(lambda: rotator.after_step(0, sgd, None), device)
        times["fused AdamW"] = seconds(adamw.step, device)
        times["projection"] = seconds(lambda: projector.after_step(0, adamw, None), device)
        for name, value in times.items():
            found.setdefault(name, []).append(value)
    return {name: values[1:] for name, values in found.items()}, size


def main() -> int:
    """Print the table; the exit status."""
    torch.set_num_threads(1)
    device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    table = Table(title=f"one step on {device}, {ROUNDS} rounds: medians, and ratios to each")
    for column in ("weights", "what", "ms", "/ projection", "/ SGD", "/ fused AdamW"):
        table.add_column(column, justify="right")
    worst = 0.0
    for name, shapes in {"ResNet-18, 11M": resnet18(), "GPT-2, 124M": gpt2()}.items():
        times, size = measure(shapes, device)
        for what, values in times.items():
            ratios = [
                statistics.median(v / w for v, w in zip(values, times[other], strict=True))
                for other in ("projection", "SGD with momentum", "fused AdamW")
            ]
            table.add_row(name, what, f"{1e3 * statistics.median(values):.2f}", *(f"{r:.2f}" for r in ratios))
            worst = max(worst, ratios[0]) if what == "control" else worst
        table.add_row(name, f"copy: {size:.2f} times the weights' memory")
    Console(width=110).print(table)
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
