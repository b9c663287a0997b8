"""What is predicted of decay, beside what real runs do."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_normreg import EffectiveLRMonitor, NormProjection
from lightning_normreg.functional import equilibrium_half_life
from lightning_normreg.steps._equilibria import Course
from tests.harness import Net, loader, sgd, trainer

ROWS, ENTRIES = 16, 100


class Noise(LightningModule):
    """Rows whose gradients are pure noise at a right angle to them: the loss is ``Σ <noise, w/‖w‖>`` over rows."""

    def __init__(self, make: Callable[[Any], Any], schedule: Callable[[Any], Any] | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(ENTRIES, ROWS, bias=False)
        self.make, self.schedule = make, schedule

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The batch is the noise."""
        return (batch[0] * nn.functional.normalize(self.layer.weight, dim=1)).sum(dim=(1, 2)).mean()

    def configure_optimizers(self) -> Any:
        """With a schedule by steps, if there is one."""
        optimizer = self.make(self.parameters())
        if self.schedule is None:
            return optimizer
        return [optimizer], [{"scheduler": self.schedule(optimizer), "interval": "step"}]


def noise(steps: int) -> DataLoader[Any]:
    """White noise of unit variance."""
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(steps, ROWS, ENTRIES, generator=generator)), batch_size=1)


def fit(net: Noise, steps: int, every: int = 20) -> tuple[EffectiveLRMonitor, Any]:
    """The monitor and its history."""
    monitor = EffectiveLRMonitor(every)
    trainer(monitor).fit(net, noise(steps))
    return monitor, monitor.history()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.2, betas=(0.9, 0.99)),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.3, betas=(0.9, 0.99)),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=3e-3, weight_decay=0.3),
}

# Means over half a run: 16 rows × 800 steps with a relaxation time of some 250 are 50 independent norms, whose squares
# scatter by some 10 % (momentum: √(κS), and the angle by half of that). So 5 % are about four standard errors, and
# leave 2 % for what Adam's second moment lags behind.
CLOSE = 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pure_noise_settles_where_predicted(name: str) -> None:
    """Rotation is predicted on the way and at the end, the norm ends at its equilibrium, the words say since when."""
    torch.manual_seed(0)
    net = Noise(OPTIMIZERS[name])
    monitor, history = fit(net, 1600)
    late = history[history["step"] >= 800]
    assert late["weights/equilibrium_ratio/layer.weight"].mean() == pytest.approx(1.0, abs=CLOSE)
    turned = late["weights/rotation/layer.weight"] / late["weights/equilibrium_rotation/layer.weight"]
    assert turned.mean() == pytest.approx(1.0, abs=CLOSE)
    norm = net.layer.weight.detach().norm(dim=1).square().mean().sqrt().item()
    assert norm == pytest.approx(late["weights/equilibrium_norm/layer.weight"].iloc[-1], rel=2 * CLOSE)
    (said,) = monitor.equilibrium_status()
    since = int(said.removeprefix("layer.weight: consistent with equilibrium since step ").rstrip(".").replace(" ", ""))
    assert since >= 3 * late["weights/equilibrium_half_life/layer.weight"].iloc[-1] / np.log(2) * 0.9


@pytest.mark.slow
def test_under_a_schedule_the_norm_equation_is_followed() -> None:
    """At the end of a cosine the equilibrium of the present learning rate is far off, the integrated one is not."""
    torch.manual_seed(0)
    cosine = lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1600, eta_min=1e-4)  # noqa: E731
    _, history = fit(Noise(OPTIMIZERS["adamw"], cosine), 1600)
    last = history[history["step"] >= 1500]
    at_equilibrium = last["weights/rotation/layer.weight"] / last["weights/equilibrium_rotation/layer.weight"]
    assert at_equilibrium.mean() < 0.5
    assert last["weights/equilibrium_ratio/layer.weight"].mean() == pytest.approx(1.0, abs=CLOSE)


def test_too_short_a_run_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """With the relaxation times that it has gone through, along the schedule and not at the last learning rate."""
    cosine = lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 61)  # noqa: E731
    net = Noise(OPTIMIZERS["adamw"], cosine)
    with caplog.at_level("INFO"):
        fit(net, 61)
    # Of a constant rate e-folding takes half-life/ln 2 steps; the cosine is integrated step by step.
    rates = [1e-2 * (1 + math.cos(math.pi * step / 61)) / 2 for step in range(60)]
    gone = sum(math.log(2) / equilibrium_half_life("adam_decoupled", lr=lr, weight_decay=0.2) for lr in rates)
    assert (
        f"layer.weight: too short to settle: {gone:.1f} of the 3 relaxation times that it takes, in 60 st"
        in caplog.text
    )


def test_a_scheduled_momentum_is_told_of() -> None:
    """The formulas take it to be constant."""
    one_cycle = lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=100)  # noqa: E731
    monitor, history = fit(Noise(OPTIMIZERS["momentum"], one_cycle), 41)
    (said,) = monitor.equilibrium_status()
    assert said.startswith("layer.weight: no equilibrium is predicted, which is 1 of 1 layers. Its momentum is sched")
    assert (
        history["weights/equilibrium_ratio/layer.weight"].notna().sum() == 1
    )  # the first step, before anything has changed
    assert history["weights/rotation/layer.weight"].notna().all()


def test_where_nothing_is_predicted() -> None:
    """Without decay, for weights that a projection holds, and for those that are not scale-invariant."""
    for callbacks, decay in (([], 0.0), ([NormProjection()], 0.1)):
        run = trainer(EffectiveLRMonitor(), *callbacks)
        run.fit(Net(sgd(weight_decay=decay)), loader())
        assert not [tag for tag in run.callback_metrics if "equilibrium" in tag]
    run = trainer(EffectiveLRMonitor())
    run.fit(Net(sgd(weight_decay=0.1)), loader())
    layers = {tag.split("/")[2] for tag in run.callback_metrics if tag.startswith("weights/equilibrium")}
    assert layers == {"conv1.weight", "up.weight"}


def test_the_size_of_the_gradient_is_that_which_the_optimizer_used() -> None:
    """At the first step N* follows from the clipped gradients' G = mean ‖g_u‖‖w_u‖: N⁴ = ηG²/(λ(2 − ηλ))."""
    seen: dict[str, np.ndarray] = {}

    class Peek(Net):
        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            super().optimizer_step(*args, **kwargs)
            if not seen:
                seen.update({n: p.grad.double().numpy() for n, p in self.named_parameters()})

    torch.manual_seed(0)
    net = Peek(sgd(weight_decay=0.1))
    monitor = EffectiveLRMonitor()
    trainer(monitor, gradient_clip_val=1e-2, limit_train_batches=1).fit(net, loader())
    step = net.steps[0]
    weight = step.before["conv1.weight"].numpy().reshape(6, -1)
    gradient = np.linalg.norm(seen["conv1.weight"].reshape(6, -1), axis=1)
    product = (gradient * np.linalg.norm(weight, axis=1)).mean()
    lr = step.lr["conv1.weight"]
    expected = (lr * product**2 / (0.1 * (2 - lr * 0.1))) ** 0.25
    # float32 sums of 18 squares, and a fourth root.
    assert monitor.history()["weights/equilibrium_norm/conv1.weight"][0] == pytest.approx(expected, rel=1e-5)


def test_momentum_gain_and_exponent_on_request() -> None:
    """Heavy-ball momentum gains 1/(1 − β); SGD's steps have exponent 2, Adam's a little more than 1 from eps."""
    rates = {}
    for gain in (False, True):
        torch.manual_seed(0)
        run = trainer(EffectiveLRMonitor(momentum_gain=gain, scale_exponent=True))
        run.fit(Net(sgd(momentum=0.75)), loader())
        rates[gain] = run.callback_metrics["weights/effective_lr/conv1.weight"].item()
        assert run.callback_metrics["weights/scale_exponent/conv1.weight"].item() == 2.0
    assert rates[True] == pytest.approx(4 * rates[False], rel=1e-6)
    run = trainer(EffectiveLRMonitor(scale_exponent=True))
    run.fit(Net(lambda groups: torch.optim.Adam(groups, eps=1e-3)), loader())
    assert 1.001 < run.callback_metrics["weights/scale_exponent/conv1.weight"].item() < 1.999


@pytest.mark.parametrize(
    "ratios, settled",
    [
        ([1.0] * 10, True),
        ([0.4] * 10 + [1.0] * 8, False),  # two of the last ten are far off
        ([1.6] + [1.0] * 10, True),  # what is long ago does not count
        ([1.0] * 8 + [1.2, 1.2], True),  # eight inside of 15 %, two within twice that
        ([1.0] * 8 + [1.2, 1.5], False),
        ([1.0] * 7 + [1.2] * 3, False),
        ([4.56, 0.87, 1.19, 1.0, 0.95, 1.05, 1.1, 0.9, 1.0, 1.0, 1.0], True),  # one transient at the start
        ([1.0] * 7, False),
    ],
)
def test_words_are_about_the_last_logged_ratios(ratios: list[float], settled: bool) -> None:
    """At least eight of the last ten inside the tolerance, none outside of twice the tolerance."""
    course = Course(1.0, relaxed=3.5)
    for step, ratio in enumerate(ratios):
        course.compare(ratio, 0.15, step)
    assert course.words().startswith("consistent with equilibrium since step") is settled
    last = ratios[-10:]
    if not settled and len(ratios) >= 8:
        assert f"rotation {min(last):.2f} to {max(last):.2f} times what is predicted" in course.words()
    early = Course(1.0, relaxed=2.4, steps=700)
    for step, ratio in enumerate(ratios):
        early.compare(ratio, 0.15, step)
    assert early.words().startswith("too short to settle: 2.4 of the 3 relaxation times")


def test_nadam_while_its_momentum_warms_up() -> None:
    """Its first 14 000 steps turn weights up to twice as far as the formulas say: nothing is predicted, in words."""
    net = Noise(lambda p: torch.optim.NAdam(p, lr=1e-3, weight_decay=0.1, decoupled_weight_decay=True))
    monitor, history = fit(net, 100)
    assert "weights/rotation/layer.weight" in history
    assert not [tag for tag in history if "equilibrium" in tag]
    assert "NAdam's own warm-up" in " ".join(monitor.equilibrium_status())
