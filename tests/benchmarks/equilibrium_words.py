"""Are the words about equilibrium right? ``python -m tests.benchmarks.equilibrium_words [threads …]``, some 10 minutes.

Ten recipes with three seeds, each on one thread and on two. A layer is in the band when at least eight of its last ten
logged ``equilibrium_ratio`` are, as read from the history and not from the words: from 1/(1 + t) to 1 + t, with the
tolerance t of the optimizer's family. "Right": it is called consistent with equilibrium and is in the band, or neither;
"early": called, and not in the band; "missed": in the band, and not called. The band is around the predicted course, on
which a layer may still be far from equilibrium, so that one is rightly missed in a run of less than three relaxation
times; and one of whose ratios one is an outlier, beyond twice the tolerance. Exit status 1 for any other, and if one is
early.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_normreg import EffectiveLRMonitor
from tests.benchmarks.demo_equilibrium import OPTIMIZERS, Noisy, Perceptron, fit

STEPS, SEEDS, LAST, INSIDE = 800, (0, 1, 2), 10, 8


class Learning(Noisy):
    """With the labels as they are, so that gradients are more signal than noise."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


class Falling(Noisy):
    """Under a cosine to 0."""

    def configure_optimizers(self) -> Any:
        """One schedule, step by step."""
        optimizer = super().configure_optimizers()
        return [optimizer], [{"scheduler": CosineAnnealingLR(optimizer, STEPS), "interval": "step"}]


def faster(make: Callable[[Any], Optimizer]) -> Callable[[Any], Optimizer]:
    """With three times the decay, so that 800 steps are enough to settle."""

    def made(parameters: Any) -> Optimizer:
        optimizer = make(parameters)
        for group in optimizer.param_groups:
            group["weight_decay"] *= 3
        return optimizer

    return made


def slow(parameters: Any) -> Optimizer:
    """So little decay that the run is too short."""
    return AdamW(parameters, lr=1e-3, weight_decay=0.05)


RECIPES: dict[str, tuple[type[Noisy], Callable[[Any], Optimizer], float]] = {
    **{name: (Perceptron if name == "Muon" else Noisy, faster(make), 0.15) for name, make in OPTIMIZERS.items()},
    "SGD, labels as they are": (Learning, lambda p: SGD(p, lr=0.1, weight_decay=0.01), 0.15),
    "AdamW, cosine": (Falling, lambda p: AdamW(p, lr=1e-2, weight_decay=0.6), 0.15),
    "AdamW, little decay": (Noisy, slow, 0.15),
}
RECIPES["Muon"] = (*RECIPES["Muon"][:2], 0.35)


def judged(name: str, seed: int, threads: int) -> Counter[str]:
    """How many layers are right, early and missed in one run."""
    kind, make, tolerance = RECIPES[name]
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    monitor = EffectiveLRMonitor(10)
    fit(kind(make), STEPS, monitor)
    history, said = monitor.history(), monitor.equilibrium_status()
    found: Counter[str] = Counter()
    for tag in (tag for tag in history if tag.startswith("weights/equilibrium_ratio/")):
        layer = tag.split("/")[2]
        ratios = history[tag].dropna().tolist()[-LAST:]
        inside = sum(1 / (1 + tolerance) <= ratio <= 1 + tolerance for ratio in ratios) >= INSIDE
        words = next(line.partition(": ")[2] for line in said if layer in line.partition(": ")[0].split(", "))
        called = words.startswith("consistent with equilibrium")
        stray = any(not 1 / (1 + tolerance) ** 2 <= ratio <= (1 + tolerance) ** 2 for ratio in ratios)
        why = "outlier" if stray else "too short" if words.startswith("too short") else "missed"
        found["early" if called > inside else "right" if called == inside else why] += 1
    return found


def main() -> int:
    """Print the table; 1 if words were wrong."""
    warnings.simplefilter("ignore")
    for logger in ("pytorch_lightning", "lightning.pytorch", "lightning_utilities"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    kinds = ("right", "early", "too short", "outlier", "missed")
    table = Table("recipe", "threads", *kinds, title=f"layers of {len(SEEDS)} seeds, {STEPS} steps")
    total: Counter[str] = Counter()
    for name in RECIPES:
        for threads in map(int, sys.argv[1:] or ("1", "2")):
            found: Counter[str] = sum((judged(name, seed, threads) for seed in SEEDS), Counter())
            total += found
            table.add_row(name, str(threads), *(str(found[kind]) for kind in kinds))
    Console(width=120).print(table)
    return int(bool(total["early"] or total["missed"]))


if __name__ == "__main__":
    sys.exit(main())
