"""On a GPU: the same numbers, and hooks that never wait for it. Runs where there is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_normreg import EffectiveLRMonitor, NormProjection, RotationControl, WeightNormMonitor
from lightning_normreg.steps._step_hooks import StepDispatcher
from tests.callbacks.test_logged_values import expected
from tests.harness import Net, RecordingLogger, Step, loader, sgd, trainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def on_host(step: Step) -> Step:
    """The recorded weights, copied from the device."""
    before, after = ({name: w.cpu() for name, w in weights.items()} for weights in (step.before, step.after))
    return Step(step.batch, before, after, step.lr)


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error for every operation inside the hooks of the optimizer that waits for the GPU."""
    for name in ("enter", "leave"):
        hook = getattr(StepDispatcher, name)

        def guarded(self: StepDispatcher, index: int, optimizer: Any, hook: Any = hook) -> None:
            torch.cuda.set_sync_debug_mode("error")
            try:
                hook(self, index, optimizer)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        monkeypatch.setattr(StepDispatcher, name, guarded)


@pytest.mark.usefixtures("no_waiting")
def test_logged_values_equal_the_oracle() -> None:
    """At every step, within what float32 promises on any device."""
    torch.manual_seed(0)
    net = Net(sgd(momentum=0.9, weight_decay=0.1))
    run = trainer(WeightNormMonitor(), EffectiveLRMonitor(), accelerator="gpu", devices=1)
    run.fit(net, loader())
    logger = run.logger
    assert isinstance(logger, RecordingLogger)
    logged: dict[int, dict[str, float]] = {}
    for batch, row in logger.rows:
        logged.setdefault(batch, {}).update(row)
    assert len(net.steps) == 6
    for step in map(on_host, net.steps):
        for name in ("conv1.weight", "up.weight", "head.weight"):
            for key, value in expected(step, name, 2).items():
                assert logged[step.batch][f"weights/{key}/{name}"] == pytest.approx(value, rel=1e-5), (step.batch, key)


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("make", [NormProjection, RotationControl, lambda: RotationControl(per="unit", hold="mean")])
def test_held_and_turned_as_on_the_cpu(make: Any) -> None:
    """Weights after six steps; convolutions of the two devices round differently, by 1e-5 of a unit in all."""
    weights = []
    for accelerator in ("cpu", "gpu"):
        torch.manual_seed(0)
        net = Net(sgd(momentum=0.9))
        trainer(make(), EffectiveLRMonitor(), accelerator=accelerator, devices=1).fit(net, loader())
        weights.append({name: p.detach().double().cpu() for name, p in net.named_parameters()})
    for name, weight in weights[0].items():
        assert float((weights[1][name] - weight).norm()) <= 1e-4 * float(weight.norm()) + 1e-6, name
