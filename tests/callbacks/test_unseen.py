"""Steps that nobody sees: those of an optimizer inside of another are, and of others it is said within ten batches."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_normreg import EffectiveLRMonitor, NormProjection, WeightNormMonitor
from lightning_normreg._weights import ScaleInvariance
from lightning_normreg.steps import StepDispatcher, StepSubscriber
from tests.harness import images, trainer


class SAM(torch.optim.Optimizer):
    """As davda54/sam has it: two steps of its own, the second of which lets the optimizer inside step."""

    def __init__(self, params: Any, base: Any, rho: float = 0.05, **options: Any) -> None:
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """To the worst point nearby."""
        grads = [p.grad.norm() for g in self.param_groups for p in g["params"] if p.grad is not None]
        scale = 0.05 / (torch.stack(grads).norm() + 1e-12)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["old_p"] = p.data.clone()
                    p.add_(p.grad * scale)
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Back, and the step with the gradient from there."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data = self.state[p]["old_p"]
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Both, with a closure in between."""
        closure = torch.enable_grad()(closure)
        loss = closure()
        self.first_step(zero_grad=True)
        closure()
        self.second_step()
        return loss


class Lookahead(torch.optim.Optimizer):
    """Its step is the inner one's, and every second time half the way back."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.slow, self.count = inner, {}, 0  # type: ignore[var-annotated]
        super().__init__(inner.param_groups, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step."""
        for group in self.inner.param_groups:
            for p in group["params"]:
                self.slow.setdefault(p, p.clone())
        loss = self.inner.step(closure)
        self.count += 1
        if self.count % 2 == 0:
            for p, slow in self.slow.items():
                slow.lerp_(p, 0.5)
                p.copy_(slow)
        return loss


class Told(StepSubscriber):
    """Notes what it is told."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.starts, self.afters = weight, [], []  # type: ignore[var-annotated]

    def before_step(self, index: int, optimizer: Any) -> None:
        """The weight before."""
        self.starts.append(self.weight.detach().clone())

    def after_step(self, index: int, optimizer: Any, skipped: Any) -> None:
        """The weight after."""
        self.afters.append(self.weight.detach().clone())


@pytest.mark.parametrize("how", ["two steps", "closure", "lookahead", "inner is known too"])
def test_an_update_inside_of_a_wrapper_is_told_once(how: str) -> None:
    """From the weights before the perturbation to those after the update, by hooks that can be taken off again."""
    weight = nn.Parameter(torch.randn(3, 2, generator=torch.Generator().manual_seed(0)))
    sam: Any = SAM([weight], torch.optim.SGD, lr=0.1, momentum=0.9)
    optimizer: Any = Lookahead(torch.optim.SGD([weight], 0.1)) if how == "lookahead" else sam
    dispatcher, told = StepDispatcher(), Told(weight)
    dispatcher.subscribe(told)
    known = [optimizer, sam.base_optimizer] if how == "inner is known too" else [optimizer]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = weight.pow(4).sum()
        loss.backward()
        return loss

    wanted: tuple[list[Tensor], list[Tensor]] = ([], [])
    for _ in range(4):
        dispatcher.attach(known)
        wanted[0].append(weight.detach().clone())
        if how in ("two steps", "inner is known too"):
            closure()
            optimizer.first_step(zero_grad=True)
            closure()
            optimizer.second_step(zero_grad=False)
        else:
            optimizer.step(closure)
        wanted[1].append(weight.detach().clone())
    assert torch.equal(torch.stack(told.starts), torch.stack(wanted[0]))
    assert torch.equal(torch.stack(told.afters), torch.stack(wanted[1]))
    assert [dispatcher.updates(i) for i in range(len(known))] == ([0, 4] if len(known) > 1 else [4])
    dispatcher.remove()
    left = [each._optimizer_step_post_hooks for each in (sam.base_optimizer, optimizer)]
    assert not any(left)


class Model(LightningModule):
    """A scale-invariant weight and a head, trained in whatever way ``act`` says."""

    def __init__(self, act: Callable[[Model, Callable[[], Tensor], int], Any], make: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.net = nn.Sequential(nn.Linear(72, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        self.twin = nn.Linear(2, 2).requires_grad_(False)
        self.act, self.made = act, make or (lambda net: torch.optim.SGD(net.parameters(), 0.1))
        self.turned: list[float] = []
        self.said: list[int] = []

    def loss(self, batch: Any) -> Tensor:
        """Cross entropy, whose gradient is taken."""
        loss = nn.functional.cross_entropy(self.net(batch[0].flatten(1)), batch[1])
        self.manual_backward(loss)
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """What ``act`` does; it notes how far the weight turned."""
        before = torch.nn.functional.normalize(self.net[0].weight.detach().double())
        with torch.no_grad():
            self.twin.weight.add_(1)  # as an average by hand
        found = self.act(self, lambda: self.loss(batch), batch_idx)
        after = torch.nn.functional.normalize(self.net[0].weight.detach().double())
        self.turned.append((2 * torch.asin((before - after).norm(dim=1) / 2)).square().mean().sqrt().item())
        return found

    def configure_optimizers(self) -> Any:
        """What was asked for."""
        return self.made(self.net)


def data(batches: int) -> DataLoader[Any]:
    """So many batches."""
    return DataLoader(images(4 * batches), 4)


def sam(model: Model, loss: Callable[[], Tensor], batch_idx: int) -> None:
    """Two steps."""
    optimizer: Any = model.optimizers(use_pl_optimizer=False)
    loss()
    optimizer.first_step(zero_grad=True)
    loss()
    optimizer.second_step(zero_grad=True)


@pytest.mark.filterwarnings("ignore:`effective_lr` is left out for the weights of SAM")
def test_sam_in_two_steps_is_measured_and_held() -> None:
    """The rotation is that of the real update, and not of the perturbation; the norm stays where it is put."""
    net = Model(sam, lambda net: SAM(net.parameters(), torch.optim.SGD, lr=0.1))
    monitor = EffectiveLRMonitor()
    trainer(monitor, NormProjection()).fit(net, data(12))
    # Entries of float32, rotations of 1e-2.
    assert list(monitor.history()["weights/rotation/net.0.weight"]) == pytest.approx(net.turned, rel=1e-3)
    assert net.net[0].weight.detach().norm(dim=1) == pytest.approx(torch.ones(8), rel=1e-6)


def stranger(model: Model, loss: Callable[[], Tensor], batch_idx: int) -> None:
    """An optimizer that the Trainer does not know."""
    loss()
    with torch.no_grad():
        for p in model.net.parameters():
            p.data -= 0.1 * p.grad
            p.grad = None


def every_tenth(model: Model, loss: Callable[[], Tensor], batch_idx: int) -> None:
    """A step in every 24th batch."""
    loss()
    if (batch_idx + 1) % 24 == 0:
        model.optimizers().step()
        model.optimizers().zero_grad()


def skipping(model: Model, loss: Callable[[], Tensor], batch_idx: int) -> None:
    """A scaler that skips its first steps."""
    loss()
    if batch_idx > 20:
        model.optimizers().step()
    model.optimizers().zero_grad()


class Automatic(Model):
    """Lightning steps.

    Args:
        nothing: No batch has a loss.
        frozen: Nothing is trained.
    """

    def __init__(self, *, nothing: bool = False, skip: Callable[[int], bool] = lambda i: False) -> None:
        super().__init__(lambda *_: None)
        self.automatic_optimization, self.nothing, self.skip = True, nothing, skip

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Whether the rest of the epoch is skipped."""
        return -1 if self.skip(batch_idx) else None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """A loss, or none."""
        return None if self.nothing else nn.functional.cross_entropy(self.net(batch[0].flatten(1)), batch[1])


def said(net: LightningModule, batches: int = 30, **options: Any) -> list[tuple[int, str]]:
    """What was said of steps, and in which batch; with monitors whose verdict is given."""
    found: list[tuple[int, str]] = []
    given: dict[str, Any] = {"invariance": {"net.0.weight": ScaleInvariance("none")}}
    run = trainer(WeightNormMonitor(**given), EffectiveLRMonitor(**given), **options)

    def show(message: Any, *_: Any, **__: Any) -> None:
        if "step" in str(message) and "returned `None`" not in str(message):
            found.append((run.fit_loop.epoch_loop.batch_progress.total.ready - 1, str(message)))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        run.fit(net, data(batches))
    return found


@pytest.mark.parametrize("batches", [3, 30])
def test_weights_that_move_without_a_step_are_noticed(batches: int) -> None:
    """Once, after ten batches or at the end of a shorter run, with both ways out."""
    ((batch, message),) = said(Model(stranger), batches)
    assert message.startswith(f"No step of SGD has been seen in {min(batches, 10)} batches although its weights have")
    assert "Call `step()` of what `configure_optimizers` returns" in message
    assert batch <= 10


def test_one_of_two_optimizers_that_is_not_seen() -> None:
    """While the other one is."""

    def both(model: Model, loss: Callable[[], Tensor], batch_idx: int) -> None:
        loss()
        seen, _ = model.optimizers()
        seen.step()
        stranger(model, loss, batch_idx)

    def make(net: Any) -> Any:
        return torch.optim.SGD(net[3].parameters(), 0.1), torch.optim.Adam(net[0].parameters())

    ((batch, message),) = said(Model(both, make))
    assert message.startswith("No step of Adam has been seen in 10 batches")
    assert batch == 10


def test_an_epoch_that_is_skipped_from_its_first_batch() -> None:
    """Ten times -1, and then it is said why nothing happens."""
    ((batch, message),) = said(Automatic(skip=lambda i: True), 4, max_epochs=15)
    assert message.startswith("`on_train_batch_start` has returned -1 in each of 10 batches")
    assert batch <= 10


def test_batches_without_a_loss() -> None:
    """Are said to be what they are."""
    ((batch, message),) = said(Automatic(nothing=True))
    assert message.startswith("`training_step` has returned no loss in 10 batches")
    assert batch <= 10


def test_a_run_in_which_nothing_moves() -> None:
    """Only its end says that there was nothing to do."""
    ((batch, message),) = said(Model(lambda model, loss, i: loss()))
    assert message.startswith("No optimizer of the Trainer has updated a weight in 30 batches")
    assert batch >= 29


def frozen() -> Model:
    """A model of which the first layer alone is an optimizer's, and frozen."""
    net = Model(every_tenth)
    net.net[0].requires_grad_(False)
    return net


@pytest.mark.parametrize(
    "net, options",
    [
        (lambda: Model(every_tenth), {}),
        (lambda: Model(skipping), {}),
        (frozen, {}),
        (Automatic, {"accumulate_grad_batches": 64, "batches": 130}),
        (Automatic, {"limit_train_batches": 1, "max_epochs": 12}),
        (lambda: Automatic(skip=lambda i: i == 2), {"max_epochs": 12}),
    ],
    ids=["every 24th batch", "scaler", "frozen", "accumulated", "limit", "ends of epochs"],
)
def test_what_is_as_it_should_be_is_not_warned_of(net: Callable[[], Any], options: dict[str, Any]) -> None:
    """Steps far apart, skipped ones, frozen weights, epochs that end early; the twin that moves is no optimizer's."""
    assert said(net(), **options) == []
