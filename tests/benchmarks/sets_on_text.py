"""What holds of sets in real training: ``python -m tests.benchmarks.sets_on_text equilibrium|start|decay``.

``equilibrium``: norm and rotation of the residual stream's writers, measured and predicted from the initial norm alone,
over a warm-up and a cosine; "one size" is AdamW that divides all entries of the set by the same number. ``start``:
validation losses where the writers are multiplied by 8 at the start, plain and under control of the set. ``decay``: by
what the gradient of the set grows to the end of a cosine, plain and with the decay of the set corrected.
"""

from __future__ import annotations

import math
import sys
from functools import partial
from statistics import median
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_normreg import CorrectedDecay, RotationControl, Symmetries, find_symmetries
from lightning_normreg.functional import predicted_norm, predicted_rotation
from tests.benchmarks.text_models import batches, loss, make, validation
from tests.callbacks.sets import angle
from tests.twins import Lion, OneSize

CONTEXT, BATCH = 32, 16
SMALL = 4
"""Sequences in a batch of ``equilibrium``, whose formulas are of noise: in larger batches more of a gradient is signal.
With 16 of them norms are up to 8 % above the prediction."""
LOOKED = 10
_ADAMW = partial(torch.optim.AdamW, betas=(0.9, 0.95))
RECIPES: dict[str, tuple[Any, str, float, float]] = {
    **{f"AdamW {lr}, {d}": (_ADAMW, "adam_decoupled", lr, d) for lr in (1e-3, 2e-3, 3e-3) for d in (0.1, 0.3, 0.5, 1)},
    "AdamW 0.01, 0.1": (_ADAMW, "adam_decoupled", 1e-2, 0.1),
    "Lion 0.0005, 1": (Lion, "lion", 5e-4, 1.0),
    "one size 0.003, 0.1": (OneSize, "adam_decoupled", 3e-3, 0.1),
    "one size 0.003, 0.5": (OneSize, "adam_decoupled", 3e-3, 0.5),
}


def schedule(steps: int, step: int, warmup: int = 50) -> float:
    """Warm-up and cosine to a fiftieth, as a factor."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def stream_of(model: nn.Module, name: str) -> tuple[Symmetries, list[str]]:
    """All symmetries, and the names of the largest set."""
    found = find_symmetries(model, next(batches(0, 4, 8, 1, name=name)), forward=loss, progress=False)
    sets = [s for s in found.basis if s.kind == "set"]
    return found, [*max(sets, key=lambda s: len(s.exponents)).exponents]


def equilibrium(name: str, recipe: str, steps: int = 2000, seed: int = 0) -> tuple[dict[str, float], dict[str, float]]:
    """Medians over the run of |log(measured/predicted)|: of the set and of each member; of norms and of rotations."""
    make_optimizer, family, lr, decay = RECIPES[recipe]
    model = make(name, seed, context=CONTEXT)  # no row of GPT-2's positions is unused
    _, names = stream_of(model, name)
    members = {n: [model.get_parameter(n)] for n in names}
    units = {"set": [p for ps in members.values() for p in ps]}
    units |= {n: own for n, own in members.items() if bool(own[0].count_nonzero())}  # no direction, no prediction
    rest = [p for n, p in model.named_parameters() if n not in members]
    makers = [make_optimizer, _ADAMW if make_optimizer is OneSize else make_optimizer]
    optimizers = [m(ps, lr=lr, weight_decay=decay) for m, ps in zip(makers, (units["set"], rest), strict=True)]
    rates = [lr * schedule(steps, step) for step in range(steps)]

    def flat(unit: str) -> Tensor:
        return torch.cat([p.detach().double().flatten() for p in units[unit]])

    norms: dict[str, list[float]] = {unit: [] for unit in units}
    rotations: dict[str, list[float]] = {unit: [] for unit in units}
    for step, batch in enumerate(batches(seed, SMALL, CONTEXT, steps, name=name)):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rates[step]
            optimizer.zero_grad()
        loss(model, batch).backward()
        looked = step % LOOKED == 0
        before = {unit: flat(unit) for unit in units} if looked else {}
        for optimizer in optimizers:
            optimizer.step()
        for unit, start in before.items():
            norms[unit].append(float(start.norm()))
            rotations[unit].append(angle(start, flat(unit)))
    found: tuple[dict[str, float], dict[str, float]] = ({}, {})
    for unit in units:
        settings: dict[str, Any] = {"entries": float(len(flat(unit))), "weight_decay": decay}
        path = [norms[unit][0], *predicted_norm(family, rates, initial_norm=norms[unit][0], **settings)][:-1:LOOKED]
        turns = [predicted_rotation(family, n, lr=r, **settings) for n, r in zip(path, rates[::LOOKED], strict=True)]
        for kept, measured, predicted in zip(found, (norms, rotations), (path, turns), strict=True):
            pairs = zip(measured[unit], predicted, strict=True)
            kept[unit] = median(abs(math.log(m / p)) for m, p in pairs if m > 0)
    return found


class Model(LightningModule):
    """One of the small models, the writers in a group of their own, under warm-up and cosine."""

    def __init__(self, name: str, seed: int, steps: int, *, lr: float, decay: float, **options: float) -> None:
        super().__init__()
        self.net, self.steps, self.lr, self.decay = make(name, seed, context=CONTEXT), steps, lr, decay
        self.symmetries, names = stream_of(self.net, name)
        self.mine = [self.net.get_parameter(n) for n in names]
        self.their_lr, scale = options.get("their_lr", lr), options.get("scale", 1.0)
        self.gradients: list[float] = []
        with torch.no_grad():
            for p in self.mine:
                p.mul_(scale)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross entropy."""
        return loss(self.net, batch)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Note the norm of the set's gradient."""
        self.gradients.append(math.sqrt(sum(float(p.grad.square().sum()) for p in self.mine if p.grad is not None)))

    def configure_optimizers(self) -> Any:
        """AdamW, on all of it."""
        inside = {id(p) for p in self.mine}
        rest = [p for p in self.parameters() if id(p) not in inside]
        groups = [{"params": self.mine, "lr": self.their_lr}, {"params": rest}]
        optimizer = torch.optim.AdamW(groups, lr=self.lr, weight_decay=self.decay, betas=(0.9, 0.95))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(schedule, self.steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def trained(name: str, seed: int, steps: int, callbacks: Any, **options: float) -> tuple[float, Model]:
    """Validation loss at the end, and the model."""
    module = Model(name, seed, steps, **options)  # type: ignore[arg-type]
    found: Symmetries = module.symmetries
    named = Symmetries.load(_prefixed(found.to_dict()))
    made: list[Callback] = [make_callback(symmetries=named) for make_callback in callbacks]
    silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    loader: Any = DataLoader(list(batches(seed, BATCH, CONTEXT, steps, name=name)), batch_size=None)  # type: ignore[arg-type]
    Trainer(max_epochs=1, accelerator="cpu", callbacks=made, **silent).fit(module, loader)
    with torch.no_grad():
        return float(loss(module.net.eval(), validation(CONTEXT, name=name))), module


def _prefixed(content: dict[str, Any]) -> dict[str, Any]:
    """Symmetries of the net as those of the module around it."""

    def inside(name: str) -> str:
        return f"1 + net.{name[4:]}" if name.startswith("1 + ") else f"net.{name}"

    basis = [
        {**s, **{key: {inside(n): v for n, v in s[key].items()} for key in ("exponents", "dims")}}
        for s in content["basis"]
    ]
    names = {key: tuple(map(inside, content[key])) for key in ("tensors", "inert")}
    return {**content, **names, "basis": basis, "roles": {inside(n): v for n, v in content["roles"].items()}}


def _start(table: Table, name: str, steps: int) -> None:
    control = partial(RotationControl, unit="set")
    for title, callbacks, their_lr in (("plain", [], 3e-3), ("control", [control], 2e-2)):
        for scale in (1.0, 8.0):
            losses = [trained(name, seed, steps, callbacks, lr=3e-3, decay=0.1, their_lr=their_lr, scale=scale)[0]
                      for seed in range(3)]  # fmt: skip
            table.add_row(name, title, f"{scale:g}", *(f"{x:.3f}" for x in losses))


def _decay(table: Table, name: str, steps: int) -> None:
    corrected = partial(CorrectedDecay, unit="set")
    for decay in (0.1, 0.5, 1.0, 2.0):
        for title, callbacks in (("plain", []), ("corrected", [corrected])):
            runs = [trained(name, seed, steps, callbacks, lr=3e-3, decay=decay) for seed in range(3)]
            losses, growth = [], []
            for value, module in runs:
                tenth = steps // 10
                losses.append(f"{value:.3f}")
                growth.append(
                    f"{median(module.gradients[-tenth:]) / median(module.gradients[4 * tenth : 5 * tenth]):.2f}"
                )
            table.add_row(name, f"{decay:g}", title, *losses, *growth)


def main() -> None:
    """The table that is asked for."""
    what, *rest = sys.argv[1:]
    steps = int(rest[0]) if rest else 0
    names = rest[1:] or ["gpt2", "llama", "qwen3", "vit"]
    seeds = [f"seed {seed}" for seed in range(3)]
    if what == "equilibrium":
        table = Table(
            "model", "optimizer, lr, decay", "set: norm", "set: rotation", "members: norm", "members: rotation"
        )
        for name in names:
            for recipe in RECIPES:
                norms, rotations = equilibrium(name, recipe, steps or 2000)
                cells = [f"{found.pop('set'):.3f}" for found in (norms, rotations)]
                cells += [f"{min(f.values()):.2f} to {max(f.values()):.2f}" for f in (norms, rotations)]
                table.add_row(name, recipe, *cells)
                print(name, recipe, cells, flush=True)
    elif what == "start":
        table = Table("model", "run", "writers ×", *(f"loss, {s}" for s in seeds))
        for name in names:
            _start(table, name, steps or 600)
    else:
        table = Table("model", "decay", "run", *(f"loss, {s}" for s in seeds), *(f"‖g‖ end/middle, {s}" for s in seeds))
        for name in names:
            _decay(table, name, steps or 600)
    Console().print(table)


if __name__ == "__main__":
    main()
