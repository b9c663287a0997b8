"""The rotations of one run on another: with its own optimizer, learning rate, scale, batches and length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from lightning_normreg import EffectiveLRMonitor, RotationControl, find_scale_invariance
from tests.callbacks.sets import STREAM, Stream, angle, fitted, flat, writers
from tests.callbacks.test_rotation_control import CONTROLLED, TOLERANCE, Mlp, fit, rotation
from tests.harness import loader, trainer
from tests.symmetries._small_models import LLAMA

pytestmark = [
    pytest.mark.filterwarnings("ignore:Weight decay of .* still turns"),
    pytest.mark.filterwarnings("ignore:The Trainer has no logger"),
]
FAR, SCALE = 500.0, 10.0
FIRST, SECOND = CONTROLLED


class Constant(Mlp):
    """At a constant learning rate: the log has the schedule, and at 0 no optimizer would give a direction."""

    def configure_optimizers(self) -> Any:
        """No scheduler."""
        return super().configure_optimizers()["optimizer"]


@cache
def reference(dtype: torch.dtype = torch.float64, every: int = 1) -> pd.DataFrame:
    """What AdamW logs, with decay, warm-up and cosine, which ends at learning rate 0."""
    torch.manual_seed(0)
    monitor = EffectiveLRMonitor(every_n_steps=every, symmetries=None)
    fit(Mlp("adamw"), monitor, dtype=dtype, max_epochs=3)
    return monitor.history()


def table(points: Mapping[str, Mapping[int, float]]) -> pd.DataFrame:
    """A log by hand."""
    columns = {f"weights/rotation/{name}": pd.Series(curve) for name, curve in points.items()}
    return pd.DataFrame(columns).rename_axis("step").reset_index()


def turned(net: Mlp, name: str) -> list[float]:
    """Rotations of a weight in the steps of a run, by an oracle."""
    return [rotation(step.before[name], step.after[name]) for step in net.steps]


def replayed(replay: Any, name: str = "momentum", **options: Any) -> Mlp:
    """Another optimizer, a learning rate far from the first, ten times the weights, no decay."""
    control = {k: options.pop(k) for k in ("replay_over", "per", "include") if k in options}
    torch.manual_seed(1)
    net = Constant(name, peak=options.pop("peak", 0.05 / FAR), decay=0.0)
    with torch.no_grad():
        for weight in (net.first.weight, net.second.weight):
            weight.mul_(SCALE)
    fit(net, RotationControl(replay=replay, **control), **({"max_epochs": 3} | options))
    return net


def agree(found: Sequence[float], expected: Any, dtype: torch.dtype = torch.float64) -> None:
    """To what rounding leaves of an angle, here and in the log."""
    relative, absolute = TOLERANCE[dtype]
    np.testing.assert_allclose(found, expected, rtol=2 * relative, atol=2 * absolute)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["64", "32"])
@pytest.mark.parametrize("name, peak", [("momentum", 0.05 * FAR), ("lion", 0.05 / FAR), ("muon", 0.05 / FAR)])
def test_rotations_are_the_logged_ones(name: str, peak: float, dtype: torch.dtype) -> None:
    """At each step, also where a step takes two batches; and where the log has 0, nothing turns."""
    log = reference(dtype)
    assert log[f"weights/rotation/{FIRST}"].iloc[-2:].min() == 0  # the end of the cosine
    net = replayed(log, name, peak=peak, dtype=dtype, max_epochs=6, accumulate_grad_batches=2)
    for weight in CONTROLLED:
        agree(turned(net, weight), log[f"weights/rotation/{weight}"], dtype)


def test_a_wider_network_on_smaller_batches() -> None:
    """Names match, and a layer of more units turns by the same angle."""
    log, net = reference(), Constant("momentum")
    net.first, net.norm1 = nn.Linear(72, 14, bias=False), nn.BatchNorm1d(14)
    net.second = nn.Linear(14, 6, bias=False)
    run = trainer(RotationControl(replay=log), precision="64-true", max_epochs=3, limit_train_batches=6)
    run.fit(net.double(), loader(3, dtype=torch.float64))
    agree(turned(net, FIRST), log[f"weights/rotation/{FIRST}"])


def test_every_unit_turns_as_the_layer_did() -> None:
    """With per='unit' the root mean square over units is the same."""
    log = reference()
    agree(turned(replayed(log, per="unit"), FIRST), log[f"weights/rotation/{FIRST}"])


def test_between_logged_steps_the_angle_is_on_a_line() -> None:
    """What is not finite is left out; before and after the logged steps the angle is as there."""
    log = table({FIRST: {2: 0.01, 6: 0.09, 8: float("nan"), 9: float("inf"), 14: 0.05}, SECOND: {0: 0.0, 14: 0.14}})
    net = replayed(log)
    rising, falling = 0.01 + 0.02 * np.arange(5), 0.09 - 0.005 * np.arange(9)
    agree(turned(net, FIRST), [0.01, 0.01, *rising, *falling[1:], 0.05, 0.05, 0.05])
    agree(turned(net, SECOND), [*0.01 * np.arange(15), 0.14, 0.14, 0.14])


@pytest.mark.parametrize("epochs", [2, 7])
def test_over_the_share_of_a_run_of_another_length(epochs: int) -> None:
    """First and last step turn as the first and last logged one."""
    steps = 6 * epochs
    net = replayed(table({name: {0: 0.02, 17: 0.19} for name in CONTROLLED}), max_epochs=epochs, replay_over="share")
    agree(turned(net, SECOND), np.linspace(0.02, 0.19, steps))


def test_one_of_two_layers() -> None:
    """The other one goes its own way."""
    log = reference()
    net = replayed(log, include=[FIRST])
    agree(turned(net, FIRST), log[f"weights/rotation/{FIRST}"])
    assert (net.second.weight.detach().norm(dim=1) - 1).abs().max() > 0.1


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_batch_without_a_step_counts_as_in_the_log() -> None:
    """The x-axis of the log goes on there, so the next step turns as the step of that number."""

    class Skipping(Constant):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx in (1, 3) else super().training_step(batch, batch_idx)

    log = table({name: dict(enumerate(0.01 * np.arange(1, 7))) for name in CONTROLLED})
    net = Skipping("adamw")
    fit(net, RotationControl(replay=log))
    agree(turned(net, FIRST), [0.01, 0.0, 0.03, 0.0, 0.05, 0.06])


@pytest.mark.filterwarnings("ignore:Running statistics could not follow")  # it finds no nn.Parameter on a copy
def test_two_optimizers_in_a_batch_are_at_one_step() -> None:
    """Each turns its weight as that step of the log; max_steps, which counts the steps of both, is no longer run."""

    class Manual(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.seen: list[list[float]] = []

        def configure_optimizers(self) -> Any:
            rest = [*self.norm1.parameters(), *self.norm2.parameters(), *self.head.parameters()]
            return SGD([self.first.weight], lr=0.1), AdamW([self.second.weight, *rest], lr=0.1)

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
            before = [self.get_parameter(name).detach().clone() for name in CONTROLLED]
            for optimizer in self.optimizers():
                optimizer.step()
            after = [self.get_parameter(name).detach() for name in CONTROLLED]
            self.seen.append([rotation(*pair) for pair in zip(before, after, strict=True)])

    verdict = find_scale_invariance(Mlp().double(), next(iter(loader(dtype=torch.float64))))
    log = table({FIRST: {0: 0.01, 5: 0.06}, SECOND: {0: 0.06, 5: 0.01}})
    net = Manual()
    fit(net, RotationControl(replay=log, invariance=verdict), max_epochs=-1, max_steps=12)
    agree([first for first, _ in net.seen], 0.01 * np.arange(1, 7))
    agree([second for _, second in net.seen], 0.01 * np.arange(6, 0, -1))


def test_resume_bit_for_bit(tmp_path: Any) -> None:
    """A run that is saved, loaded and continued goes on in the log where it was."""
    log = reference(torch.float32, every=5)

    def run(epochs: int, resume: Any = None) -> dict[str, Tensor]:
        torch.manual_seed(0)
        net = Mlp("momentum", peak=0.2)
        run = trainer(RotationControl(replay=log), max_epochs=epochs)
        run.fit(net, loader(), ckpt_path=resume)
        run.save_checkpoint(tmp_path / "end.ckpt")
        return net.state_dict()

    whole = run(3)
    run(1)
    resumed = run(3, tmp_path / "end.ckpt")
    assert all(value.equal(resumed[key]) for key, value in whole.items())


def test_a_set() -> None:
    """Its rotation is that of the concatenation of its tensors, whatever the log has of one of them."""
    log = table({STREAM: {0: 0.03, 3: 0.06}, "net.embed.weight": {0: 0.1, 3: 0.1}})
    model = Stream(depth=1).double()
    fitted(model, RotationControl(replay=log, unit="set"), precision="64-true")
    names = writers(LLAMA, 1)
    agree([angle(flat(a, names), flat(b, names)) for a, b in model.steps], [0.03, 0.04, 0.05, 0.06])


def test_a_set_has_to_be_asked_for() -> None:
    """Where it is in the log and not in the run, that is said."""
    log = LOG.assign(**{f"weights/rotation/{STREAM}": 0.1})
    with pytest.warns(UserWarning, match=r"rotations of residual_stream, of which no.*Sets need unit='set'"):
        replayed(log)


def test_names_that_only_one_side_has() -> None:
    """Are said; a weight that the log lacks is left alone."""
    log = table({FIRST: {0: 0.1, 17: 0.1}, "third.weight": {0: 0.1, 17: 0.1}})
    with (
        pytest.warns(UserWarning, match=r"leaves second\.weight alone.*per_layer=True"),
        pytest.warns(UserWarning, match=r"`replay` has rotations of third\.weight, of which no weights are here"),
    ):
        net = replayed(log)
    agree(turned(net, FIRST), [0.1] * 18)
    assert turned(net, SECOND)[5] != pytest.approx(0.1, rel=1e-3)


LOG = table({name: {0: 0.1, 17: 0.1} for name in CONTROLLED})


@pytest.mark.parametrize(
    "make, match",
    [
        (partial(RotationControl, "run"), "`replay` must be the log of a run with angle='run', got None"),
        (partial(RotationControl, 0.1, replay=LOG), "`angle` must be 'run' and `hold` 'step' with `replay`.*angle=0.1"),
        (partial(RotationControl, "equilibrium", replay=LOG), "`angle` must be 'run'.*got angle='equilibrium'"),
        (partial(RotationControl, hold="mean", replay=LOG), "`hold` 'step' with `replay`.*hold='mean'"),
        (partial(RotationControl, replay=LOG, replay_over="run"), "`replay_over` must be 'steps' or 'share', got"),
        (partial(RotationControl, replay="nowhere"), "`replay` must be the log of a run. There is no 'nowhere'. Give "),
        (partial(RotationControl, replay=pd.DataFrame({"step": [0]})), "`replay` must have curves of this package"),
        (partial(RotationControl, replay=3), "`replay` must be a folder, a data frame,.* got 3"),
        (partial(RotationControl, replay={"a": LOG, "b": LOG}), "`replay` must be one run, but there are 2: a, b"),
        (partial(RotationControl, replay=LOG.rename(columns=lambda tag: tag.replace("rotation", "weight_norm"))),
         r"`replay` must have curves of the rotation.*EffectiveLRMonitor\(per_layer=True\)"),
    ],
)  # fmt: skip
def test_what_cannot_be_replayed_at_all(make: Any, match: str) -> None:
    """Refused when the callback is made."""
    with pytest.raises((ValueError, TypeError), match=match):
        make()


@pytest.mark.parametrize(
    "log, options, match",
    [
        (table({"conv.weight": {0: 0.1, 17: 0.1}}), {}, "weights of the same names, but it has conv.weight and none of "
         "first.weight, second.weight. Rename"),
        (LOG, {"max_epochs": 7}, "as long as the run with replay_over='steps', but its last step is 17, and 42 steps "
         "are planned. Give the Trainer max_steps=18, or say replay_over='share'"),
        (LOG, {"max_epochs": -1}, "`replay` must be for a run of a known length.* Give the Trainer max_steps=18"),
    ],
)  # fmt: skip
def test_a_log_that_does_not_fit_the_run(log: Any, options: dict[str, Any], match: str) -> None:
    """Refused before the first step."""
    net = Mlp("adamw")
    with pytest.raises(ValueError, match=match):
        fit(net, RotationControl(replay=log), **options)
    assert not any(not s.before[n].equal(s.after[n]) for s in net.steps for n in s.before)
