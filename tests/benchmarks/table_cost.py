"""What projecting, looking at a step and controlling its angle cost, as ratios within one run.

``python -m tests.benchmarks.table_cost`` prints medians of five rounds in which the cases follow each other, on one
thread. The floor is one read and one write of every weight; looking is by both monitors, gradients left out, over a
copy of the weights. Exit status 1 where a bound is missed; meant for a machine that does nothing else.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table as Page
from torch import nn

from lightning_normreg.steps import Projector, Rotator, watch
from lightning_normreg.steps._step_hooks import StepDispatcher

RESNET18 = [(64, 3, 7, 7), *[(64, 64, 3, 3)] * 4]
for _a, _b in ((64, 128), (128, 256), (256, 512)):
    RESNET18 += [(_b, _a, 3, 3), *[(_b, _b, 3, 3)] * 3, (_b, _a, 1, 1)]
SHAPES = {
    "ResNet-18": RESNET18,
    "GPT-2": [(50257, 768), (1024, 768), *[(2304, 768), (768, 768), (3072, 768), (768, 3072)] * 12],
    "50257 × 768": [(50257, 768)],
    "1000 × 64²": [(64, 64)] * 1000,
}
COLUMNS = ("projection / floor", "look / copy", "radial look / floor", "control / projection")
BOUNDS = dict.fromkeys(SHAPES, (2.2, 6.0, 20.0, 4.0)) | {"1000 × 64²": (2.5, 15.0, 20.0, 4.0)}


class Weights(nn.Module):
    """Layers without bias whose weights have some shapes."""

    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        super().__init__()
        for number, shape in enumerate(shapes):
            layer = nn.Module()
            layer.weight = nn.Parameter(torch.randn(shape) * 0.05)
            self.add_module(str(number), layer)


def seconds(act: Callable[[], object]) -> float:
    """The shortest of three, in time of this thread: others that run do not count."""
    found = []
    for _ in range(3):
        start = time.thread_time()
        act()
        found.append(time.thread_time() - start)
    return min(found)


def ratios(shapes: list[tuple[int, ...]], rounds: int = 5) -> list[float]:
    """One round for each of the columns, and the median of all."""
    net = Weights(shapes)
    weights = list(net.parameters())
    watched = watch(net)
    projector, rotator = Projector(watched, 1.0), Rotator(watched, 1.0, 0.01)
    optimizer = torch.optim.SGD(weights, lr=0.1)
    for p in weights:
        p.grad = torch.randn_like(p)
    dispatcher = StepDispatcher()
    dispatcher.subscribe(rotator)
    record = rotator.record
    table = record.table(watched)

    def look() -> object:
        record.copy(weights)
        lengths = table.lengths(record.copies.__getitem__)
        columns = (lengths.rotation(), lengths.relative(), lengths.norm)
        return torch.stack([*(table.root_mean_squares(c) for c in columns), *table.extremes(lengths.norm)]).tolist()

    def fresh(act: Callable[[], object]) -> Callable[[], object]:
        def again() -> object:
            record.begin()
            return act()

        return again

    def moved(by: Callable[[nn.Parameter], object], act: Callable[[], object]) -> float:
        record.begin()
        record.copy(weights)
        for p in weights:
            by(p)
        return seconds(act)

    def control() -> None:
        rotator.before_step(0, optimizer)
        rotator.after_step(0, optimizer, None)

    found = []
    for _ in range(rounds + 1):
        floor = seconds(lambda: [p.mul_(1.0000001) for p in weights])
        projection = seconds(lambda: projector.project(watched))
        copy = seconds(fresh(lambda: record.copy(weights)))
        seen = moved(lambda p: p.add_(p.grad, alpha=1e-5), look) + copy
        radial = moved(lambda p: p.mul_(0.999), look)
        controlled = seconds(fresh(control))
        found.append((projection / floor, seen / copy, radial / floor, controlled / projection))
    return [statistics.median(values) for values in zip(*found[1:], strict=True)]


@torch.no_grad()
def main() -> int:
    """Print the table; 1 if a bound is missed."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    page, missed = Page("weights", *COLUMNS), False
    for name in sys.argv[1:] or SHAPES:
        found = ratios(SHAPES[name])
        missed |= any(value > bound for value, bound in zip(found, BOUNDS[name], strict=True))
        page.add_row(name, *(f"{v:.2f} (≤ {b:g})" for v, b in zip(found, BOUNDS[name], strict=True)))
    Console(width=120).print(page)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
