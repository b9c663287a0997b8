"""What holding and logging norms costs beside what one would write or install instead: one run, ratios, medians.

    python -m tests.benchmarks.alternatives [--device cuda] [--rounds 15] [--shapes resnet18] [--scaling] [--memory]

Every case of a table does the same work on the same weights, in turns, so that what else the machine does hits all
alike. The floor is one read and one write of every weight (``mul_``). On a GPU times are those of CUDA events.
geoopt is named as left out where it is not installed. Composer (``mosaicml`` 0.32.1) needs torchvision, beside which
Lightning may not import, so what its monitor does by default has been written down from its source.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lightning_normreg.functional import project_all_
from lightning_normreg.steps import NormTracker, Projector, RotationTracker, StepDispatcher, tags, watch
from tests.benchmarks.probe_cost import peak_memory, reset_peak_memory

Case = Callable[[], object]


def resnet18_shapes() -> list[tuple[int, ...]]:
    """The convolutions: 11 million weights."""
    shapes: list[tuple[int, ...]] = [(64, 3, 3, 3)]
    for inner, outer in ((64, 64), (64, 128), (128, 256), (256, 512)):
        shapes += [(outer, inner, 3, 3), *[(outer, outer, 3, 3)] * 3]
        shapes += [(outer, inner, 1, 1)] if inner != outer else []
    return shapes


def gpt2_shapes() -> list[tuple[int, ...]]:
    """Matrices and embeddings of GPT-2 with 124 million weights."""
    block: list[tuple[int, ...]] = [(2304, 768), (768, 768), (3072, 768), (768, 3072)]
    return [(50257, 768), (1024, 768), *block * 12]


SHAPES = {"resnet18": resnet18_shapes, "gpt2": gpt2_shapes}


class Weights(nn.Module):
    """Weights of given shapes, each the weight of a layer of its own, with gradients."""

    def __init__(self, shapes: list[tuple[int, ...]], device: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for shape in shapes:
            layer = nn.Linear(1, 1, bias=False)
            layer.weight = nn.Parameter(torch.randn(shape, device=device) * 0.05)
            layer.weight.grad = torch.randn_like(layer.weight) * 1e-3
            self.layers.append(layer)

    def weights(self) -> list[nn.Parameter]:
        """All of them."""
        return [layer.weight for layer in self.layers]  # type: ignore[misc]


def seconds(case: Case, device: str) -> float:
    """Of one call; on a GPU those of the GPU."""
    if device == "cpu":
        start = time.perf_counter()
        case()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    case()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


@torch.no_grad()
def in_turns(cases: dict[str, Case], rounds: int, device: str, prepare: Case = lambda: None) -> dict[str, list[float]]:
    """Seconds of each case in each round, after a warm-up of two; what is prepared before each does not count."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 2):
        for name, case in cases.items():
            prepare()
            took = seconds(case, device)
            if number >= 2:
                times[name].append(took)
    return times


def show(title: str, times: dict[str, list[float]]) -> None:
    """A table of ratios to the first case, round by round."""
    base = next(iter(times))
    table = Table(title=f"{title}; ratios to {base!r}")
    for column in ("case", "ms (median)", "min", "median", "max"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for name, values in times.items():
        ratios = [value / floor for value, floor in zip(values, times[base], strict=True)]
        spread = (min(ratios), statistics.median(ratios), max(ratios))
        table.add_row(name, f"{statistics.median(values) * 1e3:.3g}", *(f"{r:.3g}" for r in spread))
    Console().print(table)


def optional(name: str) -> Any:
    """A package, or None, said."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        print(f"left out: {name} is not installed")
        return None


def holding(module: Weights) -> dict[str, Case]:
    """Ways to put the norm of every row back to 1."""
    weights = module.weights()
    dispatcher, optimizer = StepDispatcher(), torch.optim.SGD(weights, lr=0.0)
    dispatcher.subscribe(Projector(watch(module), 1.0))

    def ours() -> None:
        dispatcher.enter(0, optimizer, (optimizer,), {})
        dispatcher.leave(0, optimizer, (optimizer,), {})

    def floor() -> None:
        for w in weights:
            w.mul_(1.001)

    def normalize() -> None:
        for w in weights:
            w.copy_(nn.functional.normalize(w.flatten(1)).view_as(w))

    return {
        "floor: one read and one write (mul_)": floor,
        "NormProjection": ours,
        "functional.project_all_": lambda: project_all_(weights, 1.0),
        "F.normalize and copy_": normalize,
        "foreach norm and div, whole tensors only": lambda: torch._foreach_div_(weights, torch._foreach_norm(weights)),
    }


def drift(module: Weights) -> Case:
    """What an update does to norms, so that there is something to put back."""
    return torch.no_grad()(lambda: torch._foreach_mul_(module.weights(), 1.001))


def with_update(shapes: list[tuple[int, ...]], device: str) -> dict[str, Case]:
    """A step of SGD with norms held, beside optimizers and parametrizations that hold them by construction."""
    cases: dict[str, Case] = {}

    cases["SGD"] = torch.optim.SGD(Weights(shapes, device).weights(), lr=1e-3).step
    held = Weights(shapes, device)
    optimizer = torch.optim.SGD(held.weights(), lr=1e-3)
    dispatcher = StepDispatcher()
    projector = Projector(watch(held), 1.0)
    projector.project(projector.targets)
    dispatcher.subscribe(projector)
    dispatcher.attach([optimizer])
    cases["SGD and NormProjection"] = optimizer.step
    cases |= _weight_norm(shapes, device)
    geoopt = optional("geoopt")
    if geoopt is not None:
        manifold = geoopt.Sphere()
        rows = [w.flatten(1) for w in Weights(shapes, device).weights()]
        points = [geoopt.ManifoldParameter(nn.functional.normalize(r.detach()), manifold=manifold) for r in rows]
        for point in points:
            point.grad = torch.randn_like(point) * 1e-3
        cases["geoopt RiemannianSGD on spheres"] = geoopt.optim.RiemannianSGD(points, lr=1e-3).step
    return cases


def _weight_norm(shapes: list[tuple[int, ...]], device: str) -> dict[str, Case]:
    """The weight made from direction and gain in each forward, its gradient taken back, and a step of both."""
    module = Weights(shapes, device)
    for layer in module.layers:
        parametrizations.weight_norm(layer)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    gradients = [torch.randn_like(w) * 1e-3 for w in module.weights()]

    @torch.enable_grad()
    def case() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(module.weights(), gradients)
        optimizer.step()

    return {"SGD and parametrizations.weight_norm": case}


def logging(module: Weights) -> dict[str, Case]:
    """A step of SGD and then ways to know something of every layer; the values end on the host."""
    weights = module.weights()
    buffers = [torch.empty_like(w) for w in weights]

    def tracked(tracker: NormTracker | RotationTracker, due: bool) -> Case:
        dispatcher, optimizer = StepDispatcher(), torch.optim.SGD(weights, lr=0.1)
        dispatcher.subscribe(tracker)
        dispatcher.attach([optimizer])

        def case() -> None:
            tracker.arm(due)
            optimizer.step()
            tags(tracker.collect())

        return case

    plain = torch.optim.SGD(weights, lr=0.1)

    def after_step(look: Callable[[nn.Parameter], object]) -> Case:
        def case() -> None:
            plain.step()
            for w in weights:
                look(w)

        return case

    def gradients() -> None:
        plain.step()
        found = [torch.linalg.vector_norm(w.grad) for w in weights]
        for norm in found:
            norm.item()

    def copies() -> None:
        plain.step()
        for buffer, w in zip(buffers, weights, strict=True):
            buffer.copy_(w)

    watched = watch(module)
    return {
        "SGD": plain.step,
        "and a copy of every weight (copy_)": copies,
        "and WeightNormMonitor, step logged": tracked(NormTracker(watched), True),
        "and EffectiveLRMonitor, step logged": tracked(RotationTracker(watched), True),
        "and EffectiveLRMonitor, step not logged": tracked(RotationTracker(watched), False),
        "and for w: w.norm().item()": after_step(lambda w: w.norm().item()),
        "and for w: w.norm(dim=1).tolist()": after_step(lambda w: w.flatten(1).norm(dim=1).tolist()),
        "and norms of gradients, .item() (Composer's OptimizerMonitor)": gradients,
        "and for w: histogram (what wandb.watch computes)": after_step(_histogram),
    }


def _histogram(weight: Tensor) -> list[float]:
    flat = weight.flatten()
    counts: list[float] = torch.histc(flat, 64, min=flat.min().item(), max=flat.max().item()).tolist()
    return counts


def scaling(device: str, rounds: int) -> Iterator[tuple[str, dict[str, list[float]]]]:
    """From one layer to a thousand, and from a million weights to 500 million."""
    for layers, size in ((1, 1000), (10, 316), (100, 100), (1000, 32)):
        yield f"{layers} layers of {size} × {size}", _scaled([(size, size)] * layers, device, rounds)
    for layers in (1, 10, 100, 500):
        yield f"{layers} M weights", _scaled([(1000, 1000)] * layers, device, rounds)


def _scaled(shapes: list[tuple[int, ...]], device: str, rounds: int) -> dict[str, list[float]]:
    held, logged = (Weights(shapes, device) for _ in range(2))
    cases = holding(held) | logging(logged)
    starts = ("floor", "NormProjection", "SGD", "and EffectiveLRMonitor, step logged")
    kept = {name: case for name, case in cases.items() if name.startswith(starts)}
    return in_turns(kept, rounds, device, drift(held))


def memory(names: list[str]) -> None:
    """Most memory that each case takes, in units of the weights; each in a process that gives memory back (Linux)."""
    os.environ.update(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    looking = [f"and {name}, step logged" for name in ("WeightNormMonitor", "EffectiveLRMonitor")]
    for shapes in names:
        for case in ("NormProjection", *looking):
            process = multiprocessing.get_context("spawn").Process(target=_print_peak, args=(shapes, case))
            process.start()
            process.join()


@torch.no_grad()
def _print_peak(shapes: str, case: str) -> None:
    module = Weights(SHAPES[shapes](), "cpu")
    run = (holding(module) | logging(module))[case]
    resident = reset_peak_memory()
    run()
    size = sum(w.numel() * w.element_size() for w in module.weights())
    print(f"memory, {shapes}: {case}: {(peak_memory() - resident) / size:.2f} times that of the weights", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shapes", choices=tuple(SHAPES), nargs="+", default=list(SHAPES))
    parser.add_argument("--scaling", action="store_true", help="also from 1 to 1000 layers and 1 M to 500 M weights")
    parser.add_argument("--memory", action="store_true", help="also the memory that it takes (CPU)")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {where}, {options.rounds} rounds")
    for name in options.shapes:
        shapes = SHAPES[name]()
        held, logged = (Weights(shapes, options.device) for _ in range(2))
        size = f"{name}, {sum(w.numel() for w in held.weights()) / 1e6:.0f} M weights"
        for title, cases, prepare in (
            (f"norms of rows put back, {size}", holding(held), drift(held)),
            (f"an update with norms held, {size}", with_update(shapes, options.device), lambda: None),
            (f"a step, and values of each layer on the host, {size}", logging(logged), lambda: None),
        ):
            show(title, in_turns(cases, options.rounds, options.device, prepare))
    if options.memory:
        memory(options.shapes)
    if options.scaling:
        for title, times in scaling(options.device, options.rounds):
            show(title, times)


if __name__ == "__main__":
    main()
