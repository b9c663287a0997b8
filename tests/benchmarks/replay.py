"""Does a run go as the one whose rotations it replays? ``python -m tests.benchmarks.replay [seeds [steps]]``.

Two networks: the demo's convolutions on digits of whose training labels 20 % are redrawn, and its transformer on text,
where all that writes to the residual stream is turned as one set. The references have an optimizer's own recipe, with
decay, after a warm-up at a constant learning rate. Then another optimizer gets the logged rotations, with a learning
rate 500 times larger or smaller than that of its own recipe, initial weights times 10 and no decay. What is not turned
has the same AdamW in all runs. For each seed, run and replay have the same initial directions and batches.

Printed are means over seeds of the final training loss, that of the last tenth of the steps. A cell agrees if its mean
is off the reference's by at most two standard deviations of the reference over seeds: what another seed does to one
run. ``no replay`` is the same run without (of the first seed). ``off by`` is the largest difference in radians from
the log at any step and layer. The last row of each network replays every second layer, or two tensors of the set, and
leaves the rest to the optimizer's own recipe. Exit status 1 if a cell in which the optimizer stays the same does not
agree, or if a rotation is off by more than 1e-5 of it and the 2e-7 rad that stored float32 weights round an angle by:
what the direction of another optimizer does is reported, not judged. 20 minutes on two cores.
"""

from __future__ import annotations

import statistics
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from joblib import Parallel, delayed
from pytorch_lightning import LightningModule, Trainer, seed_everything
from rich.table import Table
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR

from lightning_normreg import EffectiveLRMonitor, RotationControl
from lightning_normreg.demos import DemoConvNet, DemoTransformer, DigitsDataModule, TextDataModule
from tests.benchmarks.label_noise import print_, quiet
from tests.twins import Lion, Muon

SCALE, FAR = 10.0, 500.0
RELATIVE, ROUNDING = 1e-5, 2e-7
MAKERS: dict[str, Any] = {"AdamW": AdamW, "SGD": partial(SGD, momentum=0.9), "Lion": Lion, "Muon": Muon}
RECIPES = {
    "demo": {"AdamW": (5e-3, 1.0), "SGD": (0.1, 0.01), "Lion": (1e-3, 2.0), "Muon": (0.02, 0.5)},
    "transformer": {"AdamW": (4e-3, 0.5), "SGD": (0.1, 0.01), "Lion": (4e-4, 5.0), "Muon": (0.01, 0.5)},
}
"""Learning rate and decay of the weights that are turned."""
CELLS = [("AdamW", "AdamW", 1 / FAR), ("AdamW", "SGD", FAR), ("AdamW", "Lion", FAR), ("AdamW", "Muon", 1 / FAR),
         ("SGD", "AdamW", FAR), ("Muon", "AdamW", 1 / FAR)]  # fmt: skip
"""Reference, optimizer of the replay, and what its learning rate is multiplied by."""
HALF = ("AdamW", "SGD", 1.0)
HEADERS = ("rotations of → by, 10 × the weights", "reference", "replay", "no replay", "off by", "agrees")


class Two(LightningModule):
    """Two optimizers: one for what may be turned, and AdamW for all else."""

    turned: tuple[str, ...]
    recipe: tuple[str, float, float, int]

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        """Step both."""
        loss = super().training_step(batch, batch_idx)
        optimizers: Any = self.optimizers()
        schedulers: Any = self.lr_schedulers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for each in (*optimizers, *schedulers):
            each.step()
        self.losses.append(float(loss))

    def configure_optimizers(self) -> Any:
        """A warm-up over a tenth of the run, for both."""
        name, lr, decay, steps = self.recipe
        mine = [p for n, p in self.named_parameters() if n in self.turned]
        rest = [p for n, p in self.named_parameters() if n not in self.turned]
        optimizers = [MAKERS[name](mine, lr=lr, weight_decay=decay), AdamW(rest, lr=4e-3, weight_decay=0.0)]

        return optimizers, [
            LambdaLR(optimizer, lambda step: min(1.0, 10 * (step + 1) / steps)) for optimizer in optimizers
        ]


class Demo(Two, DemoConvNet):
    """The convolutional network."""

    turned = tuple(f"block{i}.conv.weight" for i in range(1, 5))


class Text(Two, DemoTransformer):
    """The transformer; its set are these."""

    turned = ("embedding.weight", *(f"blocks.{i}.{name}.weight" for i in range(2) for name in ("o", "down")))


def train(network: str, name: str, far: float, seed: int, steps: int, **control: Any) -> Any:
    """Final training loss, and the curves; where something is replayed, of ten times the weights without decay."""
    quiet()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    seed_everything(seed, verbose=False)
    lr, decay = RECIPES[network][name]
    module: Any = Demo() if network == "demo" else Text(width=32)
    data = DigitsDataModule(label_noise=0.2, seed=seed) if network == "demo" else TextDataModule(16, 32, seed=seed)
    module.automatic_optimization, module.losses = False, []
    module.recipe = (name, lr * far, decay if far == 1 else 0.0, steps)
    with torch.no_grad():
        for weight in (module.get_parameter(n) for n in module.turned):
            weight.mul_(1.0 if far == 1 else SCALE)
    monitor = EffectiveLRMonitor(every_n_steps=1)
    callbacks: list[Any] = [monitor]
    if control:
        unit: Any = {"unit": "set" if network == "transformer" else "auto"}
        callbacks.append(RotationControl(**unit | control))
    silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    epochs = {"max_epochs": -1, "max_steps": 2 * steps, "limit_val_batches": 0}
    Trainer(accelerator="cpu", callbacks=callbacks, **epochs, **silent).fit(module, data)  # type: ignore[arg-type]
    return statistics.mean(module.losses[-(steps // 10) :]), monitor.history()


def half(network: str) -> dict[str, Any]:
    """Arguments by which every second layer is replayed, or of a set two tensors."""
    if network == "demo":
        return {"include": [*Demo.turned[::2]]}
    return {"unit": "layer", "include": [*Text.turned[1:3]], "on_not_invariant": "allow", "radius": "initial"}


def worst(log: Any, curves: Any, names: Sequence[str]) -> tuple[float, bool]:
    """Largest difference between rotations that were replayed and those of the log, and whether all are rounding."""
    tags = [f"weights/rotation/{name}" for name in names]
    a, b = (table.set_index("step")[tags].to_numpy() for table in (log, curves))
    return float(abs(b - a).max()), bool((abs(b - a) <= RELATIVE * a + ROUNDING).all())


def main() -> int:
    """Print the table; the exit status."""
    seeds, steps = ([int(word) for word in sys.argv[1:]] + [4, 400][len(sys.argv) - 1 :])[:2]
    do, one = Parallel(n_jobs=2, return_as="list"), delayed(train)
    agreeing, good = 0, True
    for network in RECIPES:
        table = Table(*HEADERS, title=f"{network}: final training loss, {seeds} seeds, {steps} steps")
        names = sorted({reference for reference, _, _ in CELLS})
        found = do(one(network, name, 1.0, seed, steps) for name in names for seed in range(seeds))
        runs = {name: found[i * seeds : (i + 1) * seeds] for i, name in enumerate(names)}
        for reference, other, far in (*CELLS, HALF):
            control: dict[str, Any] = half(network) if far == 1 else {}
            replays = do(
                one(network, other, far, s, steps, replay=runs[reference][s][1], **control) for s in range(seeds)
            )
            bare = train(network, other, far, 0, steps)[0]
            layers = control.get("include", Demo.turned if network == "demo" else ["residual_stream"])
            compared = [worst(run[1], again[1], layers) for run, again in zip(runs[reference], replays, strict=True)]
            off = max(radians for radians, _ in compared)
            theirs, ours = ([loss for loss, _ in some] for some in (runs[reference], replays))
            noise, difference = statistics.stdev(theirs), statistics.mean(ours) - statistics.mean(theirs)
            agrees = abs(difference) <= 2 * noise
            agreeing += agrees and far != 1
            good &= all(exact for _, exact in compared) and (agrees or reference != other)
            title = f"{reference} → {other}, " + ("half of the layers" if far == 1 else f"lr × {far:g}")
            cells = [f"{statistics.mean(theirs):.3f} ± {noise:.3f}", f"{statistics.mean(ours):.3f}", f"{bare:.3f}"]
            table.add_row(title, *cells, f"{off:.0e}", ("yes" if agrees else "no") if far != 1 else "")
            print_(title, cells, off)
        print_(table)
    print_(f"{agreeing} of {2 * len(CELLS)} cells agree.")
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
