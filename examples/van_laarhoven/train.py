"""One cell: a small run in a plain loop, measured and projected by ``lightning_normreg.steps``.

A Trainer with the callbacks does the same in about twice the time, as the steps are so small.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import nn

from examples.van_laarhoven.data import Images, load
from examples.van_laarhoven.grid import Cell, Settings
from examples.van_laarhoven.model import ConvNet, make_optimizer, make_schedule
from examples.van_laarhoven.store import Result, Store
from lightning_normreg import find_scale_invariance
from lightning_normreg.steps import NormTracker, Projector, RotationTracker, StepDispatcher, tags, watch

CURVES = ("unit_norm_rms", "weight_norm", "effective_lr", "rotation", "gradient_norm")
POINTS = 40
"""Logged updates of a run."""


def run_cell(cell: Cell, settings: Settings, archive: Path | None = None, device: str = "cpu") -> Result:
    """Train and test one cell.

    Returns:
        Test error in %, CPU seconds, steps of the run, the logged steps, and for each curve one list per convolution;
        ``entries`` is the number of weights in each.
    """
    started = time.process_time()
    torch.set_num_threads(1)  # the grid is what runs in parallel
    torch.manual_seed(cell.seed)
    images = load(settings, cell.seed, archive).to(device)
    net = ConvNet(images.shape, settings.widths).to(device)
    rows, steps = train(net, cell, settings, images)
    names = [name for name, p in net.named_parameters() if p.ndim == 4]
    return {
        "error": error_of(net, images),
        "seconds": time.process_time() - started,
        "steps": steps,
        "logged": list(rows),
        "entries": [net.get_parameter(name).numel() for name in names],
        "curves": {
            key: [[float(f"{row[f'weights/{key}/{name}']:.6g}") for row in rows.values()] for name in names]
            for key in CURVES
        },
    }


def train(net: ConvNet, cell: Cell, settings: Settings, images: Images) -> tuple[dict[int, dict[str, float]], int]:
    """Train a network.

    Returns:
        For each logged step what was measured, by tag, and the number of steps.
    """
    optimizer = make_optimizer(net, cell)
    batches = len(images.train_labels) // settings.batch_size
    steps = settings.epochs * batches
    schedule = make_schedule(optimizer, steps)
    first = images.batch(torch.arange(settings.batch_size))
    watched = watch(net, find_scale_invariance(net, first, forward=loss_of), include=["blocks.*.weight"])
    rotation, norms = RotationTracker(watched, gradient=True), NormTracker(watched)
    dispatcher = StepDispatcher()
    for tracker in (rotation, norms):
        dispatcher.subscribe(tracker)
    if cell.projected:
        projector = Projector([w for w in watched if w.invariant], "auto")  # norm 1 of every filter
        projector.project(projector.targets)
        dispatcher.subscribe(projector)
    dispatcher.attach([optimizer])
    rows = {}
    for step in range(steps):
        if step % batches == 0:
            order = torch.randperm(len(images.train_labels)).split(settings.batch_size)
        due = step % max(1, steps // POINTS) == 0
        for tracker in (rotation, norms):
            tracker.arm(due)
        optimizer.zero_grad()
        loss_of(net, images.batch(order[step % batches])).backward()
        dispatcher.gradients_ready(0, optimizer)
        optimizer.step()
        schedule.step()
        if due:
            rows[step] = tags(rotation.collect()) | tags(norms.collect())
    dispatcher.remove()
    return rows, steps


def loss_of(net: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Cross entropy."""
    return nn.functional.cross_entropy(net(batch[0]), batch[1])


@torch.no_grad()
def error_of(net: nn.Module, images: Images) -> float:
    """Share of the test images that are classified wrongly, in %."""
    net.eval()
    parts = zip(images.test_images.split(1000), images.test_labels.split(1000), strict=True)
    wrong = sum(int((net(images.scaled(x)).argmax(dim=1) != y).sum()) for x, y in parts)
    return 100 * wrong / len(images.test_labels)


def run_and_keep(cell: Cell, settings: Settings, store: Store, archive: Path | None, device: str) -> None:
    """Run a cell and write its file, from the process that ran it: whatever is finished is kept."""
    store.add(cell, run_cell(cell, settings, archive, device))
