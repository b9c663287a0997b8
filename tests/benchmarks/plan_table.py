"""Plans against runs: ``python -m tests.benchmarks.plan_table [steps]``.

Six recipes on four small networks: medians over the run of |log(measured/planned)| of norm and of rotation, for all
that is planned, as long as it is; and for what is refused by how much the formulas would have been off.
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
from lightning_normreg.functional import predicted_norm, predicted_rotation
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
    """Residual, with BatchNorm."""

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
Off = dict[str, tuple[float, float]]
"""By name medians of |log(measured/predicted)|, of norm and rotation."""


def compared(architecture: str, recipe: str, steps: int, seed: int = 0) -> tuple[Plan, Off]:
    """The plan, and how far the run was from it; from the bare formulas in what is refused, where they have numbers."""
    settings, factor = RECIPES[recipe]
    net, of = model_of(architecture, seed)
    data = "vit" if architecture == "resnet" else architecture
    batch = next(batches(seed, BATCH, CONTEXT, 1, name=data))
    verdict = find_scale_invariance(net, batch, forward=of, progress=False)
    symmetries = find_symmetries(net, batch, forward=of, progress=False)
    own = {key: value for key, value in settings.items() if key != "optimizer"}
    optimizer = CLASSES[settings["optimizer"]](net.parameters(), **own)
    schedule = [factor(steps, step) for step in range(steps)]
    planned = plan(net, settings, schedule, invariance=verdict, symmetries=symmetries)
    watched = {one.name: one for one in watch(net, verdict, symmetries=symmetries)}
    tracker, dispatcher = RotationTracker([*watched.values()]), StepDispatcher()
    dispatcher.subscribe(tracker)
    dispatcher.attach([optimizer])
    found: Measured = {name: [] for name in watched if name in planned.units or name in planned.refused}
    units = {name: (watched[name].tensors(), math.sqrt(watched[name].units())) for name in found}
    for step, each in enumerate(batches(seed, BATCH, CONTEXT, steps, name=data)):
        for group in optimizer.param_groups:
            group["lr"] = settings["lr"] * schedule[step]
        tracker.arm(step % LOOKED == 0)
        optimizer.zero_grad()
        of(net, each).backward()
        norms = {
            name: math.sqrt(sum(float(p.detach().square().sum()) for p in tensors)) / root
            for name, (tensors, root) in (units.items() if step % LOOKED == 0 else ())
        }
        optimizer.step()
        for name, values in tracker.collect().items():
            by = {curve.key: value for curve, value in values.items()}
            if name in found and by.get("rotation", 0) > 0:
                found[name].append((step, norms[name], by["rotation"]))
    dispatcher.remove()
    entries = {name: watched[name].entries() / watched[name].units() for name in found}
    return planned, {name: _off(planned, name, rows, entries[name], recipe) for name, rows in found.items()}


def _off(
    planned: Plan, name: str, rows: Sequence[tuple[int, float, float]], entries: float, recipe: str
) -> tuple[float, float]:
    settings, factor = RECIPES[recipe]
    family = {"AdamW": "adam_decoupled", "lion_pytorch.Lion": "lion"}.get(settings["optimizer"])
    if name in planned.units:
        expected = [(planned.at_step(name, "norm", s), planned.at_step(name, "rotation", s)) for s, _, _ in rows]
    elif family is None or not rows:
        return math.nan, math.nan
    else:
        own: dict[str, Any] = {k: v for k, v in settings.items() if k not in ("optimizer", "lr")} | {"entries": entries}
        rates = [settings["lr"] * factor(planned.steps, step) for step in range(planned.steps)]
        path = [rows[0][1], *predicted_norm(family, rates, initial_norm=rows[0][1], **own)]  # type: ignore[arg-type]
        turn = [predicted_rotation(family, path[s], lr=rates[s], **own) for s, _, _ in rows]  # type: ignore[arg-type]
        expected = [(path[s], rotation) for (s, _, _), rotation in zip(rows, turn, strict=True)]
    kept = [place for place, (norm, _) in enumerate(expected) if math.isfinite(norm)]
    rows, expected = [rows[place] for place in kept], [expected[place] for place in kept]
    pairs = [
        [abs(math.log(m / p)) for m, p in zip(row[1:], e, strict=True)] for row, e in zip(rows, expected, strict=True)
    ]
    return median(norm for norm, _ in pairs), median(rotation for _, rotation in pairs)


def _range(found: Sequence[float]) -> str:
    known = [value for value in found if math.isfinite(value)]
    return f"{min(known):.2f} to {max(known):.2f}" if known else "–"


def main() -> None:
    """The table."""
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 3000
    names = sys.argv[2].split(",") if len(sys.argv) > 2 else ARCHITECTURES
    table = Table(
        "network", "recipe", "planned", "norms", "rotations", "refused", "would be off by: norms", "rotations"
    )
    for name in names:
        for recipe in RECIPES:
            planned, off = compared(name, recipe, steps)
            ours, rest = ([o for n, o in off.items() if (n in planned.units) is there] for there in (True, False))
            cells = [str(len(ours)), *(_range([o[i] for o in ours]) for i in (0, 1))]
            cells += [str(len(rest)), *(_range([o[i] for o in rest]) for i in (0, 1))]
            table.add_row(name, recipe, *cells)
            print(name, recipe, *cells, sep=" | ", flush=True)
            worst = max((max(o) for o in ours), default=0.0)
            print("   ", {n: o for n, o in off.items() if n in planned.units and max(o) == worst}, flush=True)
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
