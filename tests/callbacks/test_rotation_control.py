"""RotationControl in real runs: every layer turns by the angle that the schedule says."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from lion_pytorch import Lion
from pytorch_lightning import LightningModule
from torch import Tensor, nn

from lightning_normreg import EffectiveLRMonitor, NormProjection, RotationControl, find_scale_invariance
from tests.harness import Net, loader, trainer

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "adamw": (torch.optim.AdamW, {}),
    "rmsprop": (torch.optim.RMSprop, {}),
    "lion": (Lion, {}),
    "muon": (torch.optim.Muon, {}),
}
pytestmark = pytest.mark.filterwarnings("ignore:Weight decay of .* still turns")
DECAY = 0.1
CONTROLLED = ("first.weight", "second.weight")
# Relative and absolute, for the rotation of a layer: roundings of the sums, and those of the stored weights, some
# 0.2 ε for each entry, of which a unit of m entries has 1/√m along the way that it turns.
TOLERANCE = {torch.float64: (1e-10, 1e-15), torch.float32: (1e-5, 2e-7)}


class Mlp(Net):
    """Two matrices with BatchNorm, which Muon takes as well, and a head that nothing normalizes."""

    def __init__(self, name: str = "sgd", peak: float = 0.05, decay: float = DECAY, **options: Any) -> None:
        LightningModule.__init__(self)
        self.kind, self.options, self.peak, self.decay = OPTIMIZERS[name][0], OPTIMIZERS[name][1] | options, peak, decay
        self.first, self.norm1 = nn.Linear(72, 10, bias=False), nn.BatchNorm1d(10)
        self.second, self.norm2 = nn.Linear(10, 6, bias=False), nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 3, bias=False)
        if name == "muon":
            self.norm1.requires_grad_(False)
            self.norm2.requires_grad_(False)
        self.steps = []

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = torch.relu(self.norm1(self.first(x.flatten(1))))
        return self.head(torch.relu(self.norm2(self.second(x))))

    def configure_optimizers(self) -> Any:
        """A short warm-up from a tenth, then a cosine to zero, step by step."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer = self.kind(parameters, lr=self.peak, weight_decay=self.decay, **self.options)
        warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
        scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], [4])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def unit_rotations(before: Tensor, after: Tensor) -> np.ndarray:
    """Angles of rows by the half-angle formula, in the longest floats of the machine."""
    a, b = (t.numpy().astype(np.longdouble) for t in (before, after))
    a, b = (x / np.sqrt((x**2).sum(1, keepdims=True)) for x in (a, b))
    return 2 * np.arctan2(np.sqrt(((a - b) ** 2).sum(1)), np.sqrt(((a + b) ** 2).sum(1)))


def rotation(before: Tensor, after: Tensor) -> float:
    """Root mean square over rows."""
    return float(np.sqrt((unit_rotations(before, after) ** 2).mean()))


def fit(net: Net, *callbacks: Any, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """Train on the same batches each time."""
    net.to(dtype)
    run = trainer(*callbacks, precision="64-true" if dtype == torch.float64 else "32-true", **options)
    run.fit(net, loader(dtype=dtype))
    return run


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["64", "32"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_layer_turns_by_the_learning_rate_at_every_step(name: str, dtype: torch.dtype) -> None:
    """Through warm-up, cosine and accumulation, with decay; and the norm is the radius after it."""
    torch.manual_seed(0)
    net = Mlp(name)
    fit(net, RotationControl(), dtype=dtype, max_epochs=6, accumulate_grad_batches=2)
    relative, absolute = TOLERANCE[dtype]
    assert len({step.lr["first.weight"] for step in net.steps}) > 10  # the schedule moves
    turned = 0
    for step in net.steps:
        for weight in CONTROLLED:
            angle = step.lr[weight]
            found = rotation(step.before[weight], step.after[weight])
            if step.before[weight].equal(step.after[weight]) and angle > 0:
                continue  # a batch that accumulates
            turned += 1
            assert abs(found - angle) <= relative * angle + absolute
            norms = step.after[weight].double().norm(dim=1)
            assert (norms - 1).abs().max() < 20 * torch.finfo(dtype).eps
    assert turned == 36


@pytest.mark.filterwarnings(
    "ignore:Running statistics could not follow"
)  # get_parameter finds no nn.Parameter on a copy
def test_two_optimizers_have_their_own_angles() -> None:
    """Stepped by hand, each with its own schedule, one of them every second batch."""

    class Manual(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.seen: list[tuple[str, float, float]] = []

        def configure_optimizers(self) -> Any:
            first = torch.optim.SGD([self.first.weight, *self.norm1.parameters()], lr=0.05, momentum=0.9)
            second = torch.optim.AdamW([self.second.weight, *self.norm2.parameters(), self.head.weight], lr=0.02)
            return [first, second], [torch.optim.lr_scheduler.ExponentialLR(o, 0.8) for o in (first, second)]

        def training_step(self, batch: Any, batch_idx: int) -> None:
            x, y = batch
            for i, (optimizer, name) in enumerate(zip(self.optimizers(), CONTROLLED, strict=True)):
                if i == 1 and batch_idx % 2:
                    continue
                optimizer.zero_grad()
                self.manual_backward(nn.functional.cross_entropy(self(x), y))
                before = self.get_parameter(name).detach().clone()
                optimizer.step()
                angle = optimizer.param_groups[0]["lr"]
                self.seen.append((name, angle, rotation(before, self.get_parameter(name).detach())))
            for scheduler in self.lr_schedulers():
                scheduler.step()

    net = Manual()
    verdict = find_scale_invariance(Mlp().double(), next(iter(loader(dtype=torch.float64))))
    fit(net, RotationControl(invariance=verdict), max_epochs=2)
    assert len(net.seen) == 12 + 6
    assert {name: len({angle for n, angle, _ in net.seen if n == name}) for name in CONTROLLED} == {
        "first.weight": 12,
        "second.weight": 6,
    }
    for _, angle, found in net.seen:
        assert abs(found - angle) <= 1e-10 * angle + 1e-15


@pytest.mark.parametrize("options", [{}, {"per": "unit"}, {"hold": "mean"}, {"hold": "mean", "per": "unit"},
                                     {"radius": "initial"}], ids=str)  # fmt: skip
@pytest.mark.parametrize("name", ["adamw", "momentum"])
def test_resume_bit_for_bit(name: str, options: dict[str, Any], tmp_path: Any) -> None:
    """Two epochs equal one that is saved, loaded and continued, in every weight, buffer and logged value."""

    def run(epochs: int, resume: Any = None) -> tuple[dict[str, Tensor], list[Any]]:
        torch.manual_seed(0)
        net = Mlp(name, peak=0.2)
        run = trainer(RotationControl(**options), EffectiveLRMonitor(), max_epochs=epochs)
        run.fit(net, loader(), ckpt_path=resume)
        run.save_checkpoint(tmp_path / "end.ckpt")
        return net.state_dict(), run.logger.rows  # type: ignore[union-attr]

    whole, rows = run(2)
    run(1)
    resumed, later = run(2, tmp_path / "end.ckpt")
    assert all(value.equal(resumed[key]) for key, value in whole.items())
    assert later == rows[6:]
    assert all("weights/rotation_factor/first.weight" in row for _, row in later)
    means = torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"]
    held = next(state["means"] for key, state in means.items() if key.startswith("RotationControl"))
    assert bool(held) == ("hold" in options)


@pytest.mark.parametrize("per", ["layer", "unit"])
def test_on_average_quiet_steps_stay_quiet(per: str) -> None:
    """With ``hold="mean"`` each step turns by its speed over the root mean square speed so far, times the angle."""

    class Quiet(Mlp):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) * (0.01 if batch_idx % 6 == 4 else 1.0)

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            gradients.append(self.first.weight.grad.detach().numpy().copy())

    gradients: list[np.ndarray] = []
    net = Quiet(peak=0.02, decay=0.0)
    fit(net, RotationControl(hold="mean", per=per), max_epochs=2)  # type: ignore[arg-type]
    ratios = np.array(
        [unit_rotations(s.before["first.weight"], s.after["first.weight"]) / s.lr["first.weight"] for s in net.steps]
    )
    # What plain SGD would turn each unit by, over the learning rate; all steps count, the last ones a little more.
    speeds = []
    for step, gradient in zip(net.steps, gradients, strict=True):
        unit = step.before["first.weight"].numpy() / step.before["first.weight"].norm(dim=1, keepdim=True).numpy()
        across = gradient - (gradient * unit).sum(1, keepdims=True) * unit
        speeds.append(np.sqrt((across**2).sum(1)) / step.before["first.weight"].norm(dim=1).numpy())
    squares = np.array(speeds) ** 2
    typical = squares.mean(1, keepdims=True) if per == "layer" else squares
    for step in range(12):
        weights = 0.99 ** np.arange(step, -1, -1.0)[:, None]
        mean = (weights * typical[: step + 1]).sum(0) / weights.sum()
        # Stored weights round each angle by some 1e-16 of about 1e-2, and sums of 72 entries a few times that.
        assert ratios[step] == pytest.approx(np.sqrt(squares[step] / mean), rel=1e-9)


@pytest.mark.parametrize(
    "name, options, expected",
    [
        ("adamw", {}, lambda lr: math.sqrt(2 * lr * DECAY * 0.1 / 1.9)),
        ("sgd", {}, lambda lr: math.acos(1 - lr * DECAY)),
        ("lion", {}, lambda lr: math.sqrt(2 * lr * DECAY / 45.9)),
    ],
)
def test_the_angle_of_a_recipe_with_decay(name: str, options: Any, expected: Any) -> None:
    """``angle="equilibrium"`` follows the live learning rate, to first order as the literature has it."""
    net = Mlp(name, peak=1e-3)  # the terms of higher order are below 1 % then
    fit(net, RotationControl("equilibrium"), max_epochs=2)
    for step in net.steps:
        lr = step.lr["first.weight"]
        assert rotation(step.before["first.weight"], step.after["first.weight"]) == pytest.approx(
            expected(lr), rel=0.02
        )


def test_a_number_is_the_angle_whatever_the_learning_rate() -> None:
    """For matched comparisons."""
    net = Mlp("adamw")
    fit(net, RotationControl(0.015, per="unit"))
    for step in net.steps:
        angles = unit_rotations(step.before["first.weight"], step.after["first.weight"]).astype(float)
        assert angles == pytest.approx(np.full(10, 0.015), rel=1e-10)


def test_the_monitor_sees_what_the_weights_have_done() -> None:
    """Whichever callback comes first: rotation after control, and the factor back to the optimizer's own."""
    for order in (1, -1):
        net = Mlp("adamw")
        run = fit(net, *[RotationControl(), EffectiveLRMonitor()][::order])
        for (_, row), step in zip(run.logger.rows, net.steps, strict=True):
            assert row["weights/rotation/first.weight"] == pytest.approx(step.lr["first.weight"], rel=1e-9)
            assert row["weights/rotation_factor/first.weight"] > 0
            assert "weights/rotation_factor/head.weight" not in row


def test_the_factor_is_that_of_the_tangential_part() -> None:
    """Of plain SGD from one point: the angle over the root mean square of lr·‖g_u‖/‖w_u‖, which is tangential."""
    net = Mlp("sgd")
    run = fit(net, RotationControl(), EffectiveLRMonitor(gradient=True), limit_train_batches=1)
    (_, row), lr = run.logger.rows[0], net.steps[0].lr["first.weight"]
    rms = lr * row["weights/gradient_norm/first.weight"] / math.sqrt(10)
    assert row["weights/rotation_factor/first.weight"] == pytest.approx(lr / rms, rel=1e-9)


def said_of(callback: RotationControl, net: Net, caplog: Any, **options: Any) -> str:
    """What is announced, as information or warning."""
    with warnings.catch_warnings(record=True) as caught, caplog.at_level("INFO"):
        warnings.simplefilter("always")
        fit(net, callback, **options)
    return "\n".join([record.getMessage() for record in caplog.records] + [str(w.message) for w in caught])


@pytest.mark.parametrize(
    "name, words",
    [
        ("sgd", "without effect under RotationControl, because that of SGD only makes weights shorter"),
        ("adamw", "without effect under RotationControl, because that of AdamW only makes weights shorter"),
        ("lion", "without effect under RotationControl, because that of Lion"),
        ("momentum", "still turns the weights under RotationControl, because SGD adds it to the gradient"),
        ("rmsprop", "still turns the weights under RotationControl, because RMSprop adds it to the gradient"),
    ],
)
def test_what_decay_does_is_announced(name: str, words: str, caplog: Any) -> None:
    """By what is known of the optimizer; nothing without decay."""
    said = said_of(RotationControl(), Mlp(name), caplog, limit_train_batches=1)
    assert f"Weight decay of first.weight, second.weight: {words}" in said
    assert "keeps a copy of the controlled weights: 0.00624 MB" in said
    caplog.clear()
    assert "Weight decay" not in said_of(RotationControl(), Mlp(name, decay=0.0), caplog, limit_train_batches=1)


def test_what_cannot_be_turned_as_asked_is_reported_once() -> None:
    """Updates below the rounding of float32, and a unit that has almost all of its layer's."""
    net = Mlp("sgd", peak=1e-6, decay=0.0)
    control = RotationControl(0.01, include=["first.weight"])
    with pytest.warns(
        UserWarning, match="a unit of 'first.weight' had an update so small that the rounding of"
    ) as found:
        fit(net, control, dtype=torch.float32)
    assert len([w for w in found if "'first.weight'" in str(w.message)]) == 1
    counts = control.counts()["first.weight"]
    assert counts["updates"] == 60 >= counts["steered"] > 30

    net = Mlp("sgd", peak=1e-12, decay=0.0)
    with pytest.warns(UserWarning, match="In several steps no unit of 'first.weight' has turned"):
        fit(net, RotationControl(0.01, include=["first.weight"]), dtype=torch.float32)

    net = Mlp("sgd")
    net.first.weight.register_hook(lambda g: g * torch.tensor([1.0] + [1e-6] * 9, dtype=g.dtype).unsqueeze(1))
    with pytest.warns(UserWarning, match="a unit of 'first.weight' was to turn by more than π/2 in a step"):
        fit(net, RotationControl(1.0, include=["first.weight"]))
    first = [unit_rotations(s.before["first.weight"], s.after["first.weight"]).max() for s in net.steps]
    assert max(first) == pytest.approx(math.pi / 2, rel=1e-9)


def test_a_gradient_that_is_not_finite_leaves_its_units_alone() -> None:
    """They stay as the optimizer has made them, which is reported; all others turn."""
    net = Mlp("sgd")
    mask = torch.ones(10, 1, dtype=torch.float64)
    mask[3] = math.nan
    net.first.weight.register_hook(lambda g: g * mask)
    with pytest.warns(UserWarning, match="'first.weight' has 1 non-finite unit of 10"):
        fit(net, RotationControl(), limit_train_batches=1)
    (step,) = net.steps
    others = [i for i in range(10) if i != 3]
    assert step.after["first.weight"][3].isnan().all()
    found = rotation(step.before["first.weight"][others], step.after["first.weight"][others])
    assert found == pytest.approx(step.lr["first.weight"], rel=1e-10)


@pytest.mark.parametrize("lr", [math.pi, 4.0, torch.tensor(4.0)], ids=["pi", "4", "tensor"])
def test_a_learning_rate_that_is_no_angle(lr: Any) -> None:
    """Said before the first step."""

    class Fixed(Mlp):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=lr)

    with pytest.raises(ValueError, match=r"`lr` must be in \[0, π\) radians for angle='lr', got"):
        fit(Fixed(), RotationControl())


def test_a_learning_rate_that_grows_out_of_range() -> None:
    """Said at the step that would use it."""

    class Growing(Mlp):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD([{"params": self.parameters(), "name": "all"}], lr=1.0)
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 2.0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    with pytest.raises(ValueError, match=r"`lr` of group 'all' must be in \[0, π\) radians for angle='lr', got 4"):
        fit(Growing(), RotationControl(per="unit"))


def test_a_learning_rate_on_the_device() -> None:
    """As capturable optimizers have it, it is the angle without being read."""

    class Tensors(Mlp):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=torch.tensor(0.02, dtype=torch.float64), foreach=False)

    net = Tensors()
    fit(net, RotationControl(), EffectiveLRMonitor())
    for step in net.steps:
        assert rotation(step.before["first.weight"], step.after["first.weight"]) == pytest.approx(0.02, rel=1e-10)


@pytest.mark.parametrize(
    "name, decay, match",
    [
        ("adamw", 0.0, r"`angle='equilibrium'` is that of weight decay at 'first\.weight': `weight_decay` must be"),
        ("rmsprop", 0.1, r"`angle` must be computable from the recipe for 'equilibrium', but what RMSprop turns"),
    ],
)
def test_an_angle_that_cannot_be_computed(name: str, decay: float, match: str) -> None:
    """Said before the first step, with what to do."""
    with pytest.raises(ValueError, match=match):
        fit(Mlp(name, decay=decay), RotationControl("equilibrium"))


@pytest.mark.parametrize("order", [1, -1])
def test_projection_of_the_same_weights_is_refused(order: int) -> None:
    """In either order; of others it is fine."""
    both = [RotationControl(), NormProjection(include=["second.weight"])][::order]
    with pytest.raises(ValueError, match=r"'second\.weight' must be held by one callback.*needs no NormProjection"):
        fit(Mlp(), *both)
    fit(Mlp(), *[RotationControl(exclude=["second.weight"]), NormProjection(include=["second.weight"])][::order])


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: RotationControl(math.pi), r"`angle` must be in \[0, π\) radians, got 3\.14159"),
        (lambda: RotationControl("decay"), "`angle` must be 'lr', 'equilibrium' or a number, got 'decay'"),  # type: ignore[arg-type]
        (lambda: RotationControl(per="row"), "`per` must be 'layer' or 'unit', got 'row'"),  # type: ignore[arg-type]
        (lambda: RotationControl(hold="epoch"), "`hold` must be 'step' or 'mean', got 'epoch'"),  # type: ignore[arg-type]
        (lambda: RotationControl(radius=-1.0), "`radius` must be positive"),
    ],
)
def test_arguments_out_of_range(make: Any, match: str) -> None:
    """Refused when the callback is made."""
    with pytest.raises(ValueError, match=match):
        make()
