"""Norm, rotation and half-life at equilibrium, measured on random walks over what `functional` predicts.

Every optimizer moves weights whose gradients are white noise across them. Takes about ten minutes on one core.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[2]))

from lightning_normreg import functional as F
from tests.random_walk import ADAFACTOR, CASES, Walk, at_equilibrium, half_life

HALF_LIVES = 48
ADAFACTOR_STEPS = 1_000  # later its second moment lags behind gradients that shrink as the norm grows


def main() -> None:
    """Print the table; exit with 1 if a number is further off than chance allows."""
    torch.set_num_threads(1)
    names = [name for name in CASES if len(sys.argv) < 2 or sys.argv[1] in name]
    table = Table(title=f"measured over predicted, {HALF_LIVES} half-lives")
    for column in ("optimizer", "ηλ", "norm", "±", "rotation", "±", "half-life, steps", "from 3×"):
        table.add_column(column)
    right = True
    for name in names:
        case = CASES[name]
        result = at_equilibrium(case, HALF_LIVES)
        # Slow against the memory of the momentum and of the second moment, which a changing norm shows.
        slower = replace(case, weight_decay=case.weight_decay / 4)
        measured, predicted = half_life(slower)
        table.add_row(
            name, f"{case.lr * case.weight_decay:.0e}", f"{result.norm:.4f}", f"{result.norm_tolerance:.4f}",
            f"{result.rotation:.4f}", f"{result.rotation_tolerance:.4f}", f"{predicted:.0f}",
            f"{measured / predicted:.3f}",
        )  # fmt: skip
        right &= abs(result.norm - 1) < result.norm_tolerance
        right &= abs(result.rotation - 1) < result.rotation_tolerance
        right &= abs(measured / predicted - 1) < 0.1
    Console(width=120).print(table)
    print_adafactor()
    if not right:
        raise SystemExit("A number is further off than chance allows.")


def print_adafactor() -> None:
    """Drift of the log-norm, and rotation, of torch's Adafactor, with decay and without."""
    for decay in (ADAFACTOR.weight_decay, 0.0):
        case = replace(ADAFACTOR, weight_decay=decay)
        walk = Walk(case, 20.0, seed=0)
        cosines = [float(cosine) for _, cosine in walk.run(ADAFACTOR_STEPS)]
        end = F.predicted_norm("adafactor", [case.lr] * ADAFACTOR_STEPS, initial_norm=20.0, weight_decay=decay)[-1]
        measured, predicted = (math.log(norm / 20) / ADAFACTOR_STEPS for norm in (float(walk.norms()), end))
        turned = math.acos(sum(cosines) / len(cosines))
        ratio = turned / F.predicted_rotation("adafactor", 20.0, lr=case.lr, weight_decay=decay)
        print(
            f"Adafactor, λ = {decay}: log-norm per step {measured:.4e}, predicted {predicted:.4e}; "
            f"rotation over predicted {ratio:.4f}"
        )


if __name__ == "__main__":
    main()
