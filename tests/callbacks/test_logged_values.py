"""What is logged in a real run equals a float64 recomputation from the weights before and after each step."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning.callbacks import LearningRateMonitor

from lightning_normreg import EffectiveLRMonitor, WeightNormMonitor
from tests.harness import Net, RecordingLogger, Step, loader, trainer

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any], int]] = {
    "sgd": (torch.optim.SGD, {}, 2),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}, 2),
    "nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}, 2),
    "dampening": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5}, 2),
    "adam": (torch.optim.Adam, {}, 1),
    "adamw": (torch.optim.AdamW, {}, 1),
    "rmsprop": (torch.optim.RMSprop, {}, 1),
}
WEIGHTS = ("conv1.weight", "up.weight", "head.weight")


def units(name: str, weight: torch.Tensor) -> np.ndarray:
    """Rows that produce one output channel each; the transposed convolution has shape (6, 2, 3, 3) in two groups."""
    w = weight.numpy().astype(np.float64)
    if name == "head.weight":  # no normalization follows it, so it is one unit
        return w.reshape(1, -1)
    if name == "up.weight":
        return np.stack([w[3 * g : 3 * g + 3, j].ravel() for g in range(2) for j in range(2)])
    return w.reshape(w.shape[0], -1)


def expected(step: Step, name: str, exponent: int) -> dict[str, float]:
    """Every curve of one weight in one step, from the formulas of the table of curves."""
    a, b = units(name, step.before[name]), units(name, step.after[name])
    norms = np.sqrt((a**2).sum(1))
    whole = math.sqrt((a**2).sum())
    rms = whole / math.sqrt(len(a))
    # The chord between the directions, 2·asin(|â − b̂|/2): another formula than the one under test.
    chord = a / norms[:, None] - b / np.sqrt((b**2).sum(1))[:, None]
    angles = 2 * np.arcsin(np.sqrt((chord**2).sum(1)) / 2)
    relative = np.sqrt(((b - a) ** 2).sum(1)) / norms
    return {
        "weight_norm": whole,
        "unit_norm_rms": rms,
        "unit_norm_min": norms.min(),
        "unit_norm_max": norms.max(),
        f"effective_lr{'_not_invariant' * (name == 'head.weight')}": step.lr[name] / rms**exponent,
        "rotation": math.sqrt((angles**2).mean()),
        "relative_update": math.sqrt((relative**2).mean()),
    }


@pytest.mark.parametrize("decay", [0.1, 5.0], ids=["decay", "decay-dominates"])
@pytest.mark.parametrize("precision", ["32-true", "64-true"])
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_logged_values_equal_the_oracle(optimizer: str, precision: Any, decay: float) -> None:
    """At every step, in both groups, under a scheduler that steps every batch.

    Tolerance 1e-5 in float32 and 1e-10 in float64, as promised; the sums keep 2e-6 (performance table of the rotation)
    and 1e-14 of it.
    """
    make, options, exponent = OPTIMIZERS[optimizer]
    dtype = torch.float32 if precision == "32-true" else torch.float64
    torch.manual_seed(0)
    net = Net(lambda groups: make(groups, weight_decay=decay, **options))
    monitors = WeightNormMonitor(), EffectiveLRMonitor(equilibrium=decay < 1)  # at 5 no slow balance is left to predict
    run = trainer(*monitors, precision=precision, max_epochs=2)
    run.fit(net, loader(dtype=dtype))

    logger = run.logger
    assert isinstance(logger, RecordingLogger)
    logged: dict[int, dict[str, float]] = {}
    for step, row in logger.rows:
        logged.setdefault(step, {}).update(row)
    assert [s.batch for s in net.steps] == list(range(12)) == sorted(logged)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    for step in net.steps:
        for name in WEIGHTS:
            for key, value in expected(step, name, exponent).items():
                assert logged[step.batch][f"weights/{key}/{name}"] == pytest.approx(value, rel=tolerance), (
                    step.batch,
                    key,
                )
    tensor = run.callback_metrics["weights/rotation/up.weight"]
    assert tensor.dtype == dtype
    assert tensor.item() == pytest.approx(expected(net.steps[-1], "up.weight", exponent)["rotation"], rel=tolerance)


def test_effective_lr_follows_from_two_other_curves() -> None:
    """effective_lr = lr / unit_norm_rms^p, with the lr of LearningRateMonitor at the same x."""
    torch.manual_seed(0)
    net = Net(torch.optim.SGD)
    run = trainer(WeightNormMonitor(), EffectiveLRMonitor(), LearningRateMonitor("step"))
    run.fit(net, loader())
    logger = run.logger
    assert isinstance(logger, RecordingLogger)
    for name, group in (("conv1.weight", "pg1"), ("up.weight", "pg2")):
        lr = dict(logger.curves(f"lr-SGD/{group}"))
        rms = dict(logger.curves(f"weights/unit_norm_rms/{name}"))
        rate = logger.curves(f"weights/effective_lr/{name}")
        assert len(rate) == 6
        for step, value in rate:
            assert value == pytest.approx(lr[step] / rms[step] ** 2, rel=1e-6)


def test_layer_units_see_the_whole_tensor() -> None:
    """With unit="layer" the rms over the single unit is the norm of the tensor."""
    net = Net(torch.optim.SGD)
    run = trainer(WeightNormMonitor(unit="layer"))
    run.fit(net, loader())
    for name in WEIGHTS:
        whole = run.callback_metrics[f"weights/weight_norm/{name}"]
        assert torch.equal(run.callback_metrics[f"weights/unit_norm_rms/{name}"], whole)


@pytest.mark.pitfall(1)
def test_gradient_curves_are_taken_before_clipping() -> None:
    """Norm and alignment of the gradients as backward left them, though the optimizer sees clipped ones."""
    seen: list[dict[str, torch.Tensor]] = []

    class Peek(Net):
        def on_after_backward(self) -> None:
            seen.append({n: p.grad.double().clone() for n, p in self.named_parameters()})

    torch.manual_seed(0)
    net = Peek(lambda groups: torch.optim.SGD(groups, momentum=0.9))
    run = trainer(EffectiveLRMonitor(gradient=True), gradient_clip_val=1e-3)
    run.fit(net, loader())
    logger = run.logger
    assert isinstance(logger, RecordingLogger)
    for name in WEIGHTS:
        norms, aligned = (
            logger.curves(f"weights/gradient_norm/{name}"),
            logger.curves(f"weights/gradient_alignment/{name}"),
        )
        assert len(norms) == len(aligned) == 6
        for (step, norm), (_, alignment) in zip(norms, aligned, strict=True):
            gradient, weight = seen[step][name], net.steps[step].before[name]
            g, w = units(name, gradient), units(name, weight)
            cosines = (g * w).sum(1) / np.sqrt((g**2).sum(1) * (w**2).sum(1))
            assert norm == pytest.approx(gradient.norm().item(), rel=1e-6)
            # A cosine near 0 is a cancelled sum of up to 54 products: absolute error 54 · 6e-8.
            assert alignment == pytest.approx(math.sqrt((cosines**2).mean()), rel=1e-5, abs=4e-6)


def test_summaries_over_layers() -> None:
    """Minimum, median and maximum of rotation and norm; of the effective rate its ratio to the first value."""
    net = Net(lambda groups: torch.optim.SGD(groups, weight_decay=0.5))
    run = trainer(WeightNormMonitor(), EffectiveLRMonitor())
    run.fit(net, loader())
    metrics = run.callback_metrics
    logger = run.logger
    assert isinstance(logger, RecordingLogger)
    for key in ("rotation", "unit_norm_rms"):
        layers = sorted(metrics[f"weights/{key}/{name}"].item() for name in WEIGHTS)
        assert [metrics[f"weights/layers/{key}_{s}"].item() for s in ("min", "median", "max")] == layers
    assert not logger.curves("weights/effective_lr/head.weight")
    curves = [[value for _, value in logger.curves(f"weights/effective_lr/{name}")] for name in WEIGHTS[:2]]
    low, high = sorted(curve[-1] / curve[0] for curve in curves)
    logged = [metrics[f"weights/layers/effective_lr_ratio_{s}"].item() for s in ("min", "median", "max")]
    assert logged == pytest.approx([low, (low + high) / 2, high], rel=1e-6)
