"""Does holding the norms cost test error? ``python tests/benchmarks/label_noise.py``, 5 to 10 minutes on two cores.

Digits, of whose training labels 20 % are redrawn, on the demo network: batches of 50, 20 epochs, SGD with Nesterov
momentum and a cosine schedule. Learning rate and decay are those of the convolutions; all else has a fixed recipe.

Each recipe gets the cell of its grid with the least mean error over the seeds ``SELECTION``: unprojected over learning
rate and decay, projected over the learning rate alone. Both are then trained on the seeds ``FRESH``, that had no part
in it. A seed sets split, label noise, initial weights and batches alike for both, so they are compared seed by seed.

Exit status 1 if projected is worse by the ``RULE``, or if a chosen learning rate is the first or the last of its grid:
then it is not known to be the best. (A decay may be: along lr·decay = const the error hardly changes.)
"""

from __future__ import annotations

import logging
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from joblib import Parallel, delayed
from pytorch_lightning import Trainer
from rich.console import Console
from rich.table import Table

from lightning_normreg import NormProjection
from lightning_normreg.demos import DemoConvNet, DigitsDataModule

LABEL_NOISE, EPOCHS, LR_OF_THE_REST = 0.2, 20, 0.05
LRS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
DECAYS = (0.0, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
SELECTION, FRESH = (100, 101, 102), (0, 1, 2, 3, 4)
RULE = "Projected is worse beyond seed noise if the mean difference is above 2 standard errors of it."

Cell = tuple[float, float]
"""Learning rate and decay of the convolutions."""


class Recipe(DemoConvNet):
    """The demo network with a learning rate and a decay for its convolutions only, and a cosine schedule."""

    def configure_optimizers(self) -> Any:
        """Two groups: convolutions, and all else at a fixed learning rate without decay."""
        convolutions = [p for p in self.parameters() if p.ndim == 4]
        rest = [p for p in self.parameters() if p.ndim != 4]
        groups = [
            {"params": convolutions, "lr": self.lr, "weight_decay": self.weight_decay},
            {"params": rest, "lr": LR_OF_THE_REST},
        ]
        optimizer = torch.optim.SGD(groups, momentum=self.momentum, nesterov=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def error(cell: Cell, projected: bool, seed: int) -> float:
    """Share in % of the test images that a network gets wrong, trained without projection or with it."""
    return trained_error(lambda: Recipe(*cell), [NormProjection()] if projected else [], seed)


def trained_error(make: Callable[[], Recipe], callbacks: list[Any], seed: int) -> float:
    """Likewise with any callbacks."""
    torch.set_num_threads(1)
    quiet()
    torch.manual_seed(seed)
    net, data = make(), DigitsDataModule(label_noise=LABEL_NOISE, seed=seed)
    trainer = Trainer(
        accelerator="cpu", max_epochs=EPOCHS, callbacks=callbacks, logger=False,
        limit_val_batches=0, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(net, data)
    images, labels = data.val_set.tensors
    with torch.no_grad():
        wrong = net.eval()(images).argmax(dim=1) != labels
    return 100 * wrong.double().mean().item()


def quiet() -> None:
    """Lightning says nothing, but for warnings of something else than its workers and versions."""
    warnings.filterwarnings("ignore", ".*does not have many workers")
    warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated")
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)


def errors(cells: Sequence[Cell], projected: bool, seeds: Sequence[int]) -> dict[Cell, list[float]]:
    """Errors of each cell on each seed, on two cores."""
    jobs = [delayed(error)(cell, projected, seed) for cell in cells for seed in seeds]
    found = iter(Parallel(n_jobs=2)(jobs))
    return {cell: [next(found) for _ in seeds] for cell in cells}


def choose(name: str, decays: Sequence[float], projected: bool) -> Cell:
    """Print the grid of a recipe, less what halves the weights in a step by decay alone, and return its best cell."""
    cells = [(lr, decay) for decay in decays for lr in LRS if lr * decay < 0.5]
    means = {cell: statistics.mean(found) for cell, found in errors(cells, projected, SELECTION).items()}
    best = min(means, key=means.__getitem__)
    table = Table(title=f"{name}: mean test error in % on seeds {SELECTION}")
    for column in ("decay \\ lr", *(f"{lr:g}" for lr in LRS)):
        table.add_column(column, justify="right")
    for decay in decays:
        row = [f"{means[lr, decay]:.2f}" + "*" * ((lr, decay) == best) if (lr, decay) in means else "" for lr in LRS]
        table.add_row(f"{decay:g}", *row)
    print_(table, f"{name}: chosen lr {best[0]:g}, decay {best[1]:g}.\n")
    return best


def compare(unprojected: list[float], projected: list[float]) -> bool:
    """Print the errors on fresh seeds, and return whether projected is worse by the rule."""
    differences = [p - u for u, p in zip(unprojected, projected, strict=True)]
    table = Table("seed", "unprojected", "projected", "difference", title="test error in % on fresh seeds")
    for seed, *row in zip(FRESH, unprojected, projected, differences, strict=True):
        table.add_row(str(seed), *(f"{value:.2f}" for value in row))
    columns = (unprojected, projected, differences)
    table.add_row("mean", *(f"{statistics.mean(column):.2f}" for column in columns))
    mean, standard_error = statistics.mean(differences), statistics.stdev(differences) / len(differences) ** 0.5
    worse = mean > 2 * standard_error
    print_(
        table,
        f"Mean difference {mean:+.2f} ± {standard_error:.2f} (standard error, paired by seed): projected is "
        f"{'WORSE' if worse else 'not worse'} than unprojected beyond seed noise. These seeds could have shown a "
        f"difference above {2 * standard_error:.2f}.",
    )
    return worse


def print_(*what: Any) -> None:
    """Print tables and sentences."""
    Console(width=100, highlight=False).print(*what, sep="\n")


def main() -> int:
    """Choose, then compare; the exit status."""
    print_(f"{RULE}\n")
    unprojected = choose("unprojected", DECAYS, projected=False)
    projected = choose("projected", (0.0,), projected=True)
    worse = compare(errors([unprojected], False, FRESH)[unprojected], errors([projected], True, FRESH)[projected])
    at_an_end = {unprojected[0], projected[0]} & {LRS[0], LRS[-1]}
    if at_an_end:
        print_("A chosen learning rate is at an end of the grid, so it is not known to be the best: extend the grid.")
    return int(worse or bool(at_an_end))


if __name__ == "__main__":
    sys.exit(main())
