"""Plans beside runs: what is logged, where a run parts from its plan, and plans that are of something else."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_normreg import EffectiveLRMonitor, NormSummary, Plan, find_scale_invariance, plan, plot_curves
from lightning_normreg._symmetries import verdict_to_dict
from tests.callbacks.test_equilibrium import ENTRIES, Noise, noise
from tests.harness import trainer

STEPS = 400
RECIPE: dict[str, Any] = {"lr": 4e-3, "weight_decay": 0.5, "betas": (0.9, 0.95), "eps": 1e-30}


def halves(step: int) -> float:
    """Of a cosine."""
    return (1 + math.cos(math.pi * step / STEPS)) / 2


def net_of(lr: float = 1.0) -> Noise:
    """With a learning rate so many times the planned one."""
    torch.manual_seed(0)
    own = RECIPE | {"lr": RECIPE["lr"] * lr}
    return Noise(
        lambda p: torch.optim.AdamW(p, **own),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, halves),
    )


@pytest.fixture(scope="module")
def planned() -> Plan:
    """Of the run with the planned rate."""
    net = net_of()
    batch = next(iter(noise(1)))
    verdict = find_scale_invariance(net, batch, progress=False)
    return plan(net, net.make(net.parameters()), [halves(step) for step in range(STEPS)], invariance=verdict)


def test_planned_curves_are_logged_and_the_run_does_as_planned(planned: Plan, tmp_path: Path) -> None:
    """Numbers of the plan at each logged step, from a file; measured rotations scatter around them, and so it says."""
    planned.save(tmp_path / "plan.json")
    monitor = EffectiveLRMonitor(10, plan=str(tmp_path / "plan.json"))
    trainer(monitor).fit(net_of(), noise(STEPS))
    history = monitor.history()
    unit = planned.units["layer.weight"]
    for curve, values in (("planned_rotation", unit.rotation), ("planned_norm", unit.norm)):
        expected = np.interp(history["step"], planned.at, values)
        assert history[f"weights/{curve}/layer.weight"].to_numpy() == pytest.approx(expected, rel=1e-6)
    ratio = history["weights/rotation/layer.weight"] / history["weights/planned_rotation/layer.weight"]
    # A step's angle scatters by sqrt(2/C)/2/sqrt(16 units) = 1.8 %, a median over 40 by less; v̂ with β₂ = 0.95 adds
    # 2.6 %.
    assert ratio.median() == pytest.approx(1.0, abs=0.018 + 0.026)
    assert ENTRIES == 100
    assert monitor.plan_status() == ["layer.weight did as planned."]
    labels = [line.get_label() for axes in plot_curves(history).axes for line in axes.lines]
    assert labels.count("planned") == 1  # this monitor logs no norms


def test_where_it_parts(planned: Plan, caplog: pytest.LogCaptureFixture) -> None:
    """A learning rate of twice the planned one is seen from the start, and said at the end."""
    monitor = EffectiveLRMonitor(10, plan=planned, equilibrium=False)
    with caplog.at_level(logging.INFO):
        trainer(monitor).fit(net_of(2.0), noise(STEPS))
    (said,) = monitor.plan_status()
    assert said.startswith("layer.weight parts from the plan at about step 0: its rotation is ")
    assert said.endswith("at a learning rate 2 times the planned one.")
    assert said in caplog.text


def test_plans_of_something_else(planned: Plan) -> None:
    """Of another model: an error before the first step; of another length, or with more weights: a warning."""
    other = Plan(STEPS, planned.at, planned.covered, {"other.weight": planned.units["layer.weight"]})
    with pytest.raises(ValueError, match=r"`plan` must be one of this model, but is of other\.weight"):
        trainer(EffectiveLRMonitor(10, plan=other)).fit(net_of(), noise(STEPS))
    both = Plan(STEPS, planned.at, planned.covered, other.units | planned.units)
    with pytest.warns(UserWarning, match=r"The plan has other\.weight, which are not watched here"):
        trainer(EffectiveLRMonitor(10, plan=both.to_dict())).fit(net_of(), noise(STEPS))
    with pytest.warns(UserWarning, match="The plan is of 400 steps, and this run has 50"):
        trainer(EffectiveLRMonitor(10, plan=planned)).fit(net_of(), noise(50))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        EffectiveLRMonitor(plan="nowhere.json")


def test_the_summary_says_over_how_much_of_the_run_decay_acts() -> None:
    """1/(lr·decay) = 500 steps of 400."""
    summary = NormSummary()
    trainer(summary).fit(net_of(), noise(STEPS))
    assert "it acts over 1/(lr·decay) = 500 steps, 1.25 epochs, 1.25 of the run at this learning rate." in " ".join(
        summary.sentences()
    )


def test_a_plan_where_it_is_unknown_what_is_scale_invariant(planned: Plan) -> None:
    """What is not measured then is not compared, and the run goes on."""
    monitor = EffectiveLRMonitor(10, plan=planned, invariance=verdict_to_dict({}))
    trainer(monitor).fit(net_of(), noise(STEPS))
    assert "weights/rotation/layer.weight" in monitor.history()
