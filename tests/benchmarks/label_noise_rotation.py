"""Rotation control on noisy labels: is the test error the same over initial scales and decays, and as good as others'?

``python -m tests.benchmarks.label_noise_rotation [RESULTS.json]``, 10 minutes on two cores; what is in RESULTS.json
(by default ``label_noise_rotation.json``) is not run again, so it can be interrupted.

The set-up is that of ``label_noise.py``, with BatchNorm's eps at 1e-12, so that small weights stay scale-invariant.
Each recipe gets the learning rate (and decay) with the least mean error over the seeds ``SELECTION``: plain SGD over
learning rates and decays, projection and control over learning rates alone; for control they are angles. With them the
initial weights of the convolutions are multiplied by ``SCALES``, and the decay set to ``DECAYS``, on the seeds
``FRESH``.

Exit status 1 if control's best mean is above that of the better baseline by more than 2 standard errors of the
difference, paired by seed, or if its means over scales, or over decays, differ by more than chance explains: a one-way
analysis of variance, in which each seed is a block, with F above its 99 % quantile.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from joblib import Parallel, delayed
from rich.table import Table
from scipy.stats import f as f_distribution
from torch import nn

from lightning_normreg import NormProjection, RotationControl
from tests.benchmarks.label_noise import FRESH, SELECTION, Recipe, print_, trained_error

CALLBACKS = {"plain": lambda: [], "projection": lambda: [NormProjection()], "control": lambda: [RotationControl()]}
GRIDS = {
    "plain": list(product((0.1, 0.3, 1.0, 3.0), (1e-3, 1e-2, 1e-1))),
    "projection": [(lr, 0.0) for lr in (1.0, 3.0, 10.0, 30.0)],
    "control": [(angle, 0.0) for angle in (0.1, 0.2, 0.4, 0.8, 1.2)],
}
SCALES = (0.01, 0.1, 1.0, 10.0, 100.0)
DECAYS = (0.0, 1e-3, 1e-2, 1e-1)


class Run(NamedTuple):
    """One training."""

    how: str
    lr: float
    decay: float
    scale: float
    seed: int


def make(run: Run) -> Recipe:
    """The network, its convolutions multiplied."""
    net = Recipe(run.lr, run.decay)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps = 1e-12
        if isinstance(layer, nn.Conv2d):
            layer.weight.data.mul_(run.scale)
    return net


def one(run: Run) -> float:
    """Test error in %."""
    import warnings

    warnings.filterwarnings("ignore", "Weight decay of .* still turns|.*was to turn by more than")
    return trained_error(partial(make, run), CALLBACKS[run.how](), run.seed)


class Results:
    """Errors by run, in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

    def get(self, runs: Sequence[Run]) -> list[float]:
        """Errors of these runs; those that are missing are made, a few at a time."""
        missing = [run for run in dict.fromkeys(runs) if str(tuple(run)) not in self._known]
        for start in range(0, len(missing), 8):
            some = missing[start : start + 8]
            found = Parallel(n_jobs=2)(delayed(one)(run) for run in some)
            self._known |= {str(tuple(run)): value for run, value in zip(some, found, strict=True)}
            self._path.write_text(json.dumps(self._known, indent=0))
        return [self._known[str(tuple(run))] for run in runs]


def choose(results: Results, how: str) -> tuple[float, float]:
    """Learning rate and decay with the least mean error."""
    runs = [Run(how, *cell, 1.0, seed) for cell in GRIDS[how] for seed in SELECTION]
    errors = np.array(results.get(runs)).reshape(len(GRIDS[how]), -1).mean(axis=1)
    print_(f"{how}: " + ", ".join(f"{lr:g}/{wd:g}: {e:.2f}" for (lr, wd), e in zip(GRIDS[how], errors, strict=True)))
    return GRIDS[how][int(errors.argmin())]


def spread(errors: np.ndarray) -> tuple[float, float]:
    """F of the columns with rows as blocks, over its 99 % quantile, and largest less smallest mean of a column."""
    seeds, cells = errors.shape
    rest = errors - errors.mean(axis=0) - errors.mean(axis=1, keepdims=True) + errors.mean()
    between = seeds * ((errors.mean(axis=0) - errors.mean()) ** 2).sum() / (cells - 1)
    freedom = (cells - 1) * (seeds - 1)
    quantile = f_distribution.ppf(0.99, cells - 1, freedom)
    return float(between / ((rest**2).sum() / freedom) / quantile), float(np.ptp(errors.mean(axis=0)))


def main() -> int:
    """Print the tables; the exit status."""
    torch.set_num_threads(1)
    results = Results(Path(sys.argv[1] if len(sys.argv) > 1 else "label_noise_rotation.json"))
    chosen = {how: choose(results, how) for how in CALLBACKS}
    bad = False
    for title, settings in (
        ("initial scale", [("scale", s) for s in SCALES]),
        ("decay", [("decay", d) for d in DECAYS]),
    ):
        table = Table(title=f"test error in %, mean of {len(FRESH)} seeds, by {title}")
        for column in ("recipe", *(f"{value:g}" for _, value in settings), "largest − smallest", "F / F₉₉"):
            table.add_column(column, justify="right")
        for how, (lr, decay) in chosen.items():
            base = Run(how, lr, decay, 1.0, 0)
            runs = [base._replace(seed=seed, **{key: value}) for seed in FRESH for key, value in settings]
            errors = np.array(results.get(runs)).reshape(len(FRESH), -1)
            ratio, difference = spread(errors)
            bad |= how == "control" and ratio > 1
            means = [f"{mean:.2f}" for mean in errors.mean(axis=0)]
            table.add_row(f"{how}, lr {lr:g}, decay {decay:g}", *means, f"{difference:.2f}", f"{ratio:.2f}")
        print_(table)
    fresh = {how: results.get([Run(how, *cell, 1.0, seed) for seed in FRESH]) for how, cell in chosen.items()}
    best = min(("plain", "projection"), key=lambda how: statistics.mean(fresh[how]))
    differences = [c - b for c, b in zip(fresh["control"], fresh[best], strict=True)]
    mean, error = statistics.mean(differences), statistics.stdev(differences) / len(differences) ** 0.5
    bad |= mean > 2 * error
    listed = ", ".join(f"{how} {statistics.mean(errors):.2f}" for how, errors in fresh.items())
    print_(f"{listed}. Control less {best}: {mean:+.2f} ± {error:.2f}, so {'' if mean > 2 * error else 'not '}worse.")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
