"""NormProjection in real runs: on the sphere after every step, and one hyperparameter less."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from lightning_normreg import EffectiveLRMonitor, NormProjection
from tests.callbacks.test_logged_values import OPTIMIZERS, WEIGHTS, units
from tests.harness import Net, loader, sgd, trainer

PROJECTED = ("conv1.weight", "up.weight")
INCLUDE = ["conv1.weight", "up.*"]


def norms(name: str, weight: torch.Tensor) -> np.ndarray:
    """Norms of the neurons in float64."""
    rows = weight.double().numpy() if name == "head.weight" else units(name, weight.double())
    return np.sqrt((rows**2).sum(1))


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_every_unit_is_at_the_radius_after_every_step(optimizer: str, tmp_path: Any) -> None:
    """Within 1e-6 of it in float32, before the first step as well, and in the checkpoint."""
    make, options, _ = OPTIMIZERS[optimizer]
    net = Net(lambda groups: make(groups, weight_decay=0.1, **options))
    saver = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
    run = trainer(NormProjection(3.0, include=INCLUDE), saver, enable_checkpointing=True, max_epochs=2)
    run.fit(net, loader())
    assert len(net.steps) == 12
    for step in net.steps:
        for name in PROJECTED:
            for weight in (step.before[name], step.after[name]):
                assert abs(norms(name, weight) / 3 - 1).max() < 1e-6
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    for name in PROJECTED:
        assert abs(norms(name, state[name]) / 3 - 1).max() < 1e-6


@pytest.mark.parametrize(
    "radius, unit, expected",
    [("auto", "neuron", (1.0, 1.0)), ("auto", "layer", (6**0.5, 4**0.5)), (2.5, "layer", (2.5, 2.5))],
)
def test_radius_and_unit(radius: Any, unit: Any, expected: tuple[float, float]) -> None:
    """The radius "auto" is 1 for a neuron and √k for a layer of k neurons, also transposed; a number is that number."""
    net = Net(sgd())
    trainer(NormProjection(radius, unit=unit, include=INCLUDE)).fit(net, loader())
    for name, target in zip(PROJECTED, expected, strict=True):
        weight = net.steps[-1].after[name]
        found = norms(name, weight) if unit == "neuron" else np.array([weight.norm().item()])
        assert abs(found / target - 1).max() < 1e-6


def test_initial_radius_is_the_norm_at_the_start(caplog: pytest.LogCaptureFixture) -> None:
    """Each unit keeps the norm it came with; one that was zero the norm of its first update, which is said."""
    net = Net(sgd(momentum=0.9))
    with torch.no_grad():
        net.head.weight[2] = 0.0
    start = {name: norms(name, p.detach()) for name, p in net.named_parameters() if name in WEIGHTS}
    with caplog.at_level("INFO"):
        trainer(
            NormProjection("initial", unit="neuron", include=list(WEIGHTS), on_not_invariant="allow"), max_epochs=3
        ).fit(net, loader())
    assert "Zero at the start, or in part: head.weight." in caplog.text
    for name, before in start.items():
        first, last = (norms(name, weights[name]) for weights in (net.steps[0].after, net.state_dict()))
        assert abs(last / np.where(before > 0, before, first) - 1).max() < 1e-6


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_a_projected_step_points_where_the_same_step_without_projection_does(optimizer: str) -> None:
    """From one point of training, with one state: the angle between the two results is below 1e-6.

    In float64, so that the angle is not the rounding of the weights.
    """
    make, options, _ = OPTIMIZERS[optimizer]
    results = []
    for callbacks in ([], [NormProjection(include=INCLUDE)]):
        torch.manual_seed(0)
        net = Net(lambda groups: make(groups, weight_decay=0.1, **options)).double()
        with torch.no_grad():
            for name in PROJECTED:  # both runs start on the sphere, so only the step can tell them apart
                weight = net.get_parameter(name)
                weight /= torch.as_tensor(norms(name, weight.detach())).max()
                if name == "conv1.weight":
                    weight /= torch.as_tensor(norms(name, weight.detach())).reshape(-1, 1, 1, 1)
        trainer(*callbacks, precision="64-true", limit_train_batches=1).fit(net, loader(dtype=torch.float64))
        results.append(units("conv1.weight", net.steps[0].after["conv1.weight"]))
    free, held = results
    cosine = (free * held).sum(1) / np.sqrt((free**2).sum(1) * (held**2).sum(1))
    chord = free / np.sqrt((free**2).sum(1))[:, None] - held / np.sqrt((held**2).sum(1))[:, None]
    assert (cosine > 0).all()
    assert np.sqrt((chord**2).sum(1)).max() < 1e-6
    assert abs(np.sqrt((free**2).sum(1)) - 1).max() > 1e-6  # without projection the step left the sphere


@pytest.mark.parametrize("lr", [0.5, 0.01])
def test_projection_removes_one_hyperparameter(lr: float) -> None:
    """SGD with decay at η equals SGD without at η/(1 − η·wd): 60 steps, 1e-10, in float64.

    Both steps give w·(1 − η·wd) − η·g up to a positive factor, which the projection takes out. At the small η the norm
    drifts by less than 1e-6 in a step without decay, so a dead band of that size would show.
    """
    decay = 0.4
    ends = []
    for rate, wd in ((lr, decay), (lr / (1 - lr * decay), 0.0)):
        torch.manual_seed(0)
        net = Net(torch.optim.SGD, schedule=False).double()

        def configure(net: Net = net, rate: float = rate, wd: float = wd) -> torch.optim.Optimizer:
            held = [net.conv1.weight, net.up.weight]
            rest = [p for p in net.parameters() if all(p is not h for h in held)]
            return torch.optim.SGD([{"params": held, "lr": rate, "weight_decay": wd}, {"params": rest, "lr": 0.1}])

        net.configure_optimizers = configure  # type: ignore[method-assign]
        run = trainer(NormProjection(include=INCLUDE), precision="64-true", max_epochs=10)
        run.fit(net, loader(dtype=torch.float64))
        assert len(net.steps) == 60
        ends.append({n: p.detach().clone() for n, p in net.named_parameters()})
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-10, atol=1e-10)


def test_the_monitor_sees_the_step_before_the_projection() -> None:
    """The relative update is the optimizer's, whichever callback comes first in the list."""
    values = []
    for order in (1, -1):
        torch.manual_seed(0)
        net = Net(sgd(weight_decay=10.0))
        run = trainer(*[NormProjection(include=INCLUDE), EffectiveLRMonitor()][::order])
        run.fit(net, loader())
        values.append(run.callback_metrics["weights/relative_update/conv1.weight"].item())
    # Almost the whole update is radial (lr·wd = 1e-3·0.9⁵·10), which a projected weight would not show.
    assert values[0] == values[1] > 0.9**5 * 1e-2 * 0.99


def test_units_that_cannot_be_projected_are_left_and_reported_once() -> None:
    """A zero unit stays zero where no gradient reaches it; training goes on."""
    net = Net(sgd())
    with torch.no_grad():
        net.head.weight[1] = 0.0
    net.head.weight.register_hook(lambda g: g * torch.tensor([[1.0], [0.0], [1.0]]))
    with pytest.warns(UserWarning, match=r"'head.weight' has 1 zero unit of 3") as caught:
        trainer(NormProjection(unit="neuron", include=["head.weight"], on_not_invariant="allow")).fit(net, loader())
    assert len([w for w in caught if "zero unit" in str(w.message)]) == 1
    assert norms("head.weight", net.head.weight.detach()) == pytest.approx([1.0, 0.0, 1.0], abs=1e-6)


def test_without_the_callback_nothing_is_at_the_radius() -> None:
    """The control of this module: the same network leaves every sphere by itself."""
    net = Net(sgd(weight_decay=0.1))
    trainer().fit(net, loader())
    assert not math.isclose(norms("conv1.weight", net.steps[-1].after["conv1.weight"]).max(), 1.0, rel_tol=1e-3)
