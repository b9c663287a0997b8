"""One real update, one count: under accumulation, closures, manual optimization and skipped steps."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import Tensor, nn

from lightning_normreg import EffectiveLRMonitor, NormProjection, WeightNormMonitor, find_scale_invariance
from lightning_normreg.callbacks._run import run_of
from lightning_normreg.steps._step_hooks import StepDispatcher
from tests.harness import Net, RecordingLogger, images, loader, sgd, trainer


class Count(EffectiveLRMonitor):
    """Remembers how many updates the dispatcher of the run has seen, per optimizer."""

    counts: list[int]

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Ask before the hooks are gone."""
        self.counts = [run_of(trainer).dispatcher.updates(i) for i in range(len(trainer.optimizers))]


def fit(net: LightningModule, **options: Any) -> tuple[list[int], list[int]]:
    """Counted updates per optimizer, and the x of every logged row."""
    counter = Count(gradient=True)
    options["callbacks"] = [counter, NormProjection(include=["conv1.weight"]), *options.get("callbacks", [])]
    run = trainer(**options)
    run.fit(net, loader())
    logger = run.logger
    assert isinstance(logger, RecordingLogger)
    rows = [step for step, row in logger.rows if any(k.startswith("weights/rotation/") for k in row)]
    return counter.counts, rows


def really_changed(net: Net) -> int:
    """Steps after which the head is another."""
    return sum(not torch.equal(s.before["head.weight"], s.after["head.weight"]) for s in net.steps)


@pytest.mark.pitfall(9)
@pytest.mark.parametrize(
    "options, updates",
    [
        ({}, 6),
        ({"gradient_clip_val": 1e-3}, 6),
        ({"accumulate_grad_batches": 2}, 3),
        ({"accumulate_grad_batches": 4}, 2),
        ({"precision": "bf16-mixed"}, 6),
    ],
    ids=["plain", "clip", "accumulate2", "accumulate4-short-end", "bf16-mixed"],
)
def test_automatic_optimization(options: dict[str, Any], updates: int) -> None:
    """One row for each update, at the x of LearningRateMonitor; micro-batches count for nothing."""
    net = Net(sgd(momentum=0.9))
    assert fit(net, **options) == ([updates], list(range(updates)))
    assert really_changed(net) == updates


@pytest.mark.pitfall(1, 7)
def test_lbfgs_counts_steps_not_closures() -> None:
    """LBFGS evaluates its closure several times in a step, and steps once."""

    class Closures(Net):
        norms: ClassVar[list[tuple[int, float]]] = []

        def on_after_backward(self) -> None:
            self.norms.append((self.global_step, self.head.weight.grad.norm().item()))

        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4)

    net = Closures(sgd())
    monitor = EffectiveLRMonitor(gradient=True, include=["head.weight"])
    with pytest.warns(UserWarning, match="`effective_lr` is left out for the weights of LBFGS"):
        assert fit(net, callbacks=[monitor])[0] == [6]
    assert len(net.norms) > 12
    # The gradients are those of the first evaluation, at the weights that the step starts from.
    first = [next(norm for step, norm in net.norms if step == i) for i in range(6)]
    assert monitor.history()["weights/gradient_norm/head.weight"].tolist() == pytest.approx(first, rel=1e-6)


@pytest.mark.pitfall(3)
@pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")  # Lightning, once a process
def test_training_step_that_returns_none() -> None:
    """Lightning calls the optimizer all the same, which updates nothing."""

    class Sometimes(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx == 2 else super().training_step(batch, batch_idx)

    net = Sometimes(sgd())
    assert fit(net) == ([5], [0, 1, 3, 4, 5])
    assert really_changed(net) == 5


@pytest.mark.pitfall(3)
@pytest.mark.parametrize("fused", [False, True], ids=["skips-the-call", "skips-in-the-kernel"])
def test_gradient_scaler_that_skips(fused: bool) -> None:
    """A step with infinite gradients is skipped by the scaler, in a fused optimizer inside its kernel."""

    class Overflow(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss * float("inf") if batch_idx == 2 else loss

    net = Overflow(sgd(fused=fused, momentum=0.9), schedule=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    assert fit(net, plugins=[plugin]) == ([5], [0, 1, 3, 4, 5])
    assert really_changed(net) == 5


@pytest.mark.parametrize("fused", [False, True])
def test_gradient_norm_is_free_of_the_loss_scale(fused: bool) -> None:
    """The same norm at loss scales 64 and 4096, whether Lightning or the optimizer's kernel takes the scale out.

    Half precision keeps 11 bits, but both runs scale by powers of two, so only overflow could tell them apart.
    """
    values = []
    for scale in (64.0, 4096.0):
        torch.manual_seed(0)
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))
        run = trainer(EffectiveLRMonitor(gradient=True), plugins=[plugin], limit_train_batches=1)
        run.fit(Net(sgd(fused=fused), schedule=False), loader())
        values.append(run.callback_metrics["weights/gradient_norm/head.weight"].item())
    assert values[0] == pytest.approx(values[1], rel=1e-2)
    assert 1e-3 < values[0] < 10


class Gan(LightningModule):
    """Two optimizers by hand: the critic steps three times a batch, the generator once."""

    def __init__(self, wrapped: bool = True) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.conv1 = nn.Conv2d(2, 4, 3)
        self.critic = nn.Linear(4, 1)
        self.wrapped = wrapped
        self.angles: list[float] = []

    def loss(self, x: Tensor) -> Tensor:
        """Any loss that both depend on."""
        return self.critic(torch.relu(self.conv1(x)).mean(dim=(2, 3))).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Three critic steps with growing losses, one generator step."""
        generator, critic = self.optimizers(use_pl_optimizer=self.wrapped)
        for factor in (1.0, 2.0, 3.0):
            before = self.critic.weight.detach().double().clone()
            critic.zero_grad()
            self.manual_backward(factor * self.loss(batch[0]))
            critic.step()
        after = self.critic.weight.detach().double()
        chord = before / before.norm() - after / after.norm()
        self.angles.append(2 * torch.asin(chord.norm() / 2).item())
        generator.zero_grad()
        self.manual_backward(self.loss(batch[0]))
        generator.step()

    def configure_optimizers(self) -> Any:
        """One for each."""
        return torch.optim.Adam(self.conv1.parameters()), torch.optim.SGD(self.critic.parameters(), lr=0.1)


@pytest.mark.pitfall(8)
@pytest.mark.parametrize("wrapped", [True, False], ids=["lightning-optimizers", "raw-optimizers"])
def test_manual_optimization_with_two_optimizers(wrapped: bool) -> None:
    """All steps are counted; of several steps in a batch the last is logged, at one x for both optimizers."""
    torch.manual_seed(0)
    gan = Gan(wrapped)
    verdict = find_scale_invariance(gan, next(iter(loader())), forward=lambda net, batch: net.loss(batch[0]))
    counter = Count(invariance=verdict)
    run = trainer(counter)
    run.fit(gan, loader())
    logger = run.logger
    assert isinstance(logger, RecordingLogger)
    assert counter.counts == [6, 18]
    assert len(logger.curves("weights/effective_lr_not_invariant/conv1.weight")) == 6
    curve = logger.curves("weights/rotation/critic.weight")
    assert [step for step, _ in curve] == list(range(6))
    assert [value for _, value in curve] == pytest.approx(gan.angles, rel=1e-5)


@pytest.mark.pitfall(24)
@pytest.mark.filterwarnings("ignore:Running statistics could not follow")
def test_an_optimizer_of_which_nothing_is_watched() -> None:
    """Its steps have an empty list of weights; those of the other one are measured and held."""
    gan, chosen = Gan(), ["conv1.weight"]
    verdict = find_scale_invariance(gan, next(iter(loader())), forward=lambda net, batch: net.loss(batch[0]))
    choice: dict[str, Any] = {"include": chosen, "invariance": verdict}
    monitors = [EffectiveLRMonitor(gradient=True, **choice), WeightNormMonitor(**choice)]
    trainer(*monitors, NormProjection(unit="neuron", on_not_invariant="allow", **choice)).fit(gan, loader())
    assert len(monitors[0].history()) == len(monitors[1].history()) == 6
    assert gan.conv1.weight.detach().flatten(1).norm(dim=1) == pytest.approx(torch.ones(4), abs=1e-6)


@pytest.mark.pitfall(2)
def test_a_subclass_that_calls_super_step_counts_once() -> None:
    """Its hooks fire twice once the parent class has been instantiated: only the outer pair counts."""
    parameter = nn.Parameter(torch.ones(2, 2))
    torch.optim.SGD([parameter])  # torch patches the parent's step now

    class Twice(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    optimizer = Twice([parameter], lr=0.1)
    fired = []
    optimizer.register_step_post_hook(lambda *_: fired.append(1))
    dispatcher = StepDispatcher()
    dispatcher.attach([optimizer])
    for _ in range(3):
        parameter.grad = torch.ones(2, 2)
        optimizer.step()
    assert len(fired) == 6
    assert dispatcher.updates(0) == 3


@pytest.mark.pitfall(5)
def test_an_optimizer_that_is_replaced_is_hooked_again() -> None:
    """Finetuning schedulers put another optimizer into the running Trainer."""

    class Replace(Net):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:
                self.trainer.strategy.optimizers = [torch.optim.SGD(self.parameters(), lr=1e-3)]

    net = Replace(sgd(), schedule=False)
    counts, rows = fit(net)
    # The batch in which it is replaced has started: its step is the first that only the next batch's check would see.
    assert rows == [0, 1, 3, 4, 5]
    assert counts == [5]


class Several(LightningModule):
    """A few updates in each batch, as PPO makes them; the first weight is scale-invariant as a whole, and decays.

    Args:
        times: Updates in a batch.
        shared: Give the weights to a second optimizer as well, which updates them after the first.
        wrapped: Step by Lightning's wrapper.
        fixed: The batch to use instead of others.
    """

    def __init__(self, times: int = 5, *, shared: bool = False, wrapped: bool = True, fixed: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.net = nn.Sequential(nn.Linear(72, 6, bias=False), nn.LayerNorm(6), nn.Linear(6, 3))
        self.times, self.shared, self.wrapped, self.fixed = times, shared, wrapped, fixed
        self.updates: list[tuple[int, float, float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """All optimizers in turn, with a learning rate that falls in each update."""
        optimizers = self.optimizers(use_pl_optimizer=self.wrapped)
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        x, y = self.fixed or batch
        for _ in range(self.times):
            for index, optimizer in enumerate(optimizers):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(self.net(x.flatten(1)), y)
                self.manual_backward((1 + len(self.updates) % 5) * loss)
                optimizer.param_groups[0]["lr"] = lr = 0.1 / (1 + len(self.updates))
                before = self.net[0].weight.detach().double().clone()
                optimizer.step()
                after = self.net[0].weight.detach().double()
                turned = 2 * torch.asin((before / before.norm() - after / after.norm()).norm() / 2).item()
                self.updates.append((index, turned, lr / before.norm().square().item()))

    def configure_optimizers(self) -> Any:
        """SGD, twice where the weight is shared."""
        return [torch.optim.SGD(self.net.parameters(), 0.1, weight_decay=0.1) for _ in range(1 + self.shared)]


ROTATION, RATE = "weights/rotation/net.0.weight", "weights/effective_lr/net.0.weight"


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("every", [1, 2, 7])
@pytest.mark.parametrize("shared", [False, True])
def test_a_row_for_each_of_several_updates_in_a_batch(shared: bool, every: int, wrapped: bool) -> None:
    """The first of each optimizer and every n-th, at the number of updates before it, with its own learning rate."""
    net, monitor = Several(shared=shared, wrapped=wrapped), EffectiveLRMonitor(every_n_updates=every)
    trainer(monitor, WeightNormMonitor(every_n_updates=every)).fit(net, loader())
    assert len(net.updates) == 6 * 5 * (1 + shared)
    made, wanted = [0, 0], []
    for number, (index, _, _) in enumerate(net.updates):
        made[index] += 1
        if made[index] == 1 or made[index] % every == 0:
            wanted.append(number)
    history = monitor.history()
    assert list(history["step"]) == wanted
    # Rotations of 1e-3 and more of float32 entries.
    assert list(history[ROTATION]) == pytest.approx([net.updates[n][1] for n in wanted], rel=1e-3)
    assert list(history[RATE]) == pytest.approx([net.updates[n][2] for n in wanted], rel=1e-5)
    assert not any("updates" in tag for tag in history)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("times", [1, 5])
def test_how_many_updates_a_batch_had_stands_beside_its_last(times: int, shared: bool) -> None:
    """Only where a weight had more than one: five of one optimizer, or one of each of two."""
    net, monitor = Several(times, shared=shared), EffectiveLRMonitor()
    trainer(monitor).fit(net, loader())
    history = monitor.history()
    apart = times * (1 + shared)
    assert list(history[ROTATION]) == pytest.approx(
        [turned for _, turned, _ in net.updates[apart - 1 :: apart]], rel=1e-3
    )
    assert list(history[RATE]) == pytest.approx([rate for _, _, rate in net.updates[apart - 1 :: apart]], rel=1e-5)
    tags = {tag: set(history[tag]) for tag in history if "/updates/" in tag}
    assert tags == {f"weights/updates/{i}": {float(times)} for i in range(1 + shared) if apart > 1}


def test_equilibria_are_followed_update_by_update() -> None:
    """A row for each update of a batch gives the predictions of as many batches with one update each."""
    found = []
    for times, batches in ((5, 6), (1, 30)):
        net, monitor = Several(times, fixed=next(iter(loader()))), EffectiveLRMonitor(every_n_updates=1)
        trainer(monitor).fit(net, torch.utils.data.DataLoader(images(4 * batches), 4))
        found.append(monitor.history().filter(regex="equilibrium_.*net.0"))
    assert len(found[0]) == 30
    assert found[0].iloc[1:].notna().all(axis=None)
    assert found[0].to_numpy() == pytest.approx(found[1].to_numpy(), rel=1e-6, nan_ok=True)


def test_counting_goes_on_after_a_resume(tmp_path: Any) -> None:
    """In the x of rows, and in which update is the next to be logged."""
    whole, first, second = (EffectiveLRMonitor(every_n_updates=3) for _ in range(3))
    trainer(whole, max_epochs=2).fit(Several(), loader())
    run = trainer(first, max_epochs=1)
    run.fit(Several(), loader())
    run.save_checkpoint(tmp_path / "last.ckpt")
    trainer(second, max_epochs=2).fit(Several(), loader(), ckpt_path=str(tmp_path / "last.ckpt"))
    steps = [list(monitor.history()["step"]) for monitor in (whole, first, second)]
    assert steps[0] == steps[1] + steps[2]
    assert steps[0] == [0, *range(2, 60, 3)]


@pytest.mark.parametrize("arguments", [{"every_n_updates": 0}, {"every_n_updates": 1, "every_n_steps": 1}])
def test_arguments_that_say_when(arguments: Any) -> None:
    """Batches or updates are counted, not both."""
    with pytest.raises(ValueError, match="`every_n_updates` must be"):
        EffectiveLRMonitor(**arguments)
    with pytest.raises(ValueError, match="of a batch's last update"):
        WeightNormMonitor(every_n_updates=1, histograms=True)
