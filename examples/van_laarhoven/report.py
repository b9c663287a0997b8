"""The report: every sentence comes from a computed number."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from examples.van_laarhoven import figures
from examples.van_laarhoven.estimates import CONFIDENCE
from examples.van_laarhoven.grid import OPTIMIZERS, Optimizer, Settings
from examples.van_laarhoven.measured import Measured
from examples.van_laarhoven.model import CONSTANT_PART, LR_OF_THE_REST
from examples.van_laarhoven.store import Store, write
from examples.van_laarhoven.trends import (
    Trend,
    expected_words,
    flat_along_diagonals,
    levelling,
    no_effect_under_projection,
    norm_growth,
)

NAMES = {"sgd": "SGD with Nesterov momentum", "adam": "Adam"}
VERDICTS = {True: "appeared", False: "did not appear", None: "cannot be told from these runs"}
CAPTIONS = {
    "error.png": "Mean test error in %. Dashed: constant effective rate in equilibrium. Dot: norms had time to settle.",
    "decay.png": "Test error over decay at fixed learning rate, mean and standard error over seeds.",
    "time.png": "Norm and effective rate at one learning rate, over layers and seeds; dotted: the rate falls to 0.",
}


def write_report(settings: Settings, store: Store) -> Path:
    """Write figures and report into the store's folder; the report's path."""
    results = store.load(settings.cells())
    recipes = {(o, p): Measured(settings, results, o, p) for o in OPTIMIZERS for p in (False, True)}
    figures.draw(recipes, store.folder)
    seconds = sum(result["seconds"] for result in results.values())
    text = "\n".join([_setup(settings, len(results), seconds, recipes["sgd", False].steps), *_trends(recipes), ""])
    path = store.folder / "report.md"
    write(path, text)
    return path


def _setup(settings: Settings, cells: int, seconds: float, steps: int) -> str:
    sentences = [
        f"{cells} runs on {settings.data} ({settings.label_noise:.0%} of the training labels redrawn at random): four "
        f"convolutions of {', '.join(map(str, settings.widths))} filters with BatchNorm, batches of "
        f"{settings.batch_size}, {settings.epochs} epochs ({steps} steps), of which {CONSTANT_PART:.0%} at the "
        "constant learning rate, then linearly to 0.",
        "Learning rate and decay are those of the convolutions; BatchNorm's γ and β and the head have a learning rate "
        f"of {LR_OF_THE_REST['sgd']:g} (SGD) or {LR_OF_THE_REST['adam']:g} (Adam) and no decay.",
        '"Projected" is: every filter has norm 1 after each step.',
        f"{len(settings.seeds)} seeds; intervals are of level {CONFIDENCE:.0%} over them.",
        f"{seconds / 60:.1f} minutes of CPU time, PyTorch {torch.__version__}, Python {platform.python_version()}.",
    ]
    return f"# The experiment of van Laarhoven 2017, on a grid of ours\n\n{' '.join(sentences)}"


def _trends(recipes: dict[tuple[Optimizer, bool], Measured]) -> list[str]:
    found: dict[Optimizer, list[Trend]] = {}
    for optimizer in OPTIMIZERS:
        plain, projected = recipes[optimizer, False], recipes[optimizer, True]
        found[optimizer] = [
            flat_along_diagonals(plain),
            no_effect_under_projection(plain, projected),
            norm_growth(plain),
            levelling(plain),
        ]
    lines = ["", "| trend | " + " | ".join(NAMES[o] for o in OPTIMIZERS) + " |", "| --- " * (1 + len(OPTIMIZERS)) + "|"]
    for trends in zip(*found.values(), strict=True):
        lines.append(f"| {trends[0].name} | " + " | ".join(VERDICTS[t.appeared] for t in trends) + " |")
    for name, caption in CAPTIONS.items():
        lines += ["", f"![{caption}]({name})", "", f"*{caption}*"]
    for optimizer in OPTIMIZERS:
        lines += ["", f"## {NAMES[optimizer]}", "", f"*{expected_words(recipes[optimizer, True])}*"]
        for trend in found[optimizer]:
            lines += ["", f"**{trend.name.capitalize()}: {VERDICTS[trend.appeared]}.** {' '.join(trend.sentences)}"]
    return lines
