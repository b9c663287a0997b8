"""Embeddings with sparse gradients: each number against float64 on dense tensors, of the rows that were reached."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_normreg import (
    CorrectedDecay,
    EffectiveLRMonitor,
    NormProjection,
    RotationControl,
    WeightNormMonitor,
)
from tests.harness import trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),  # of torch's own Adagrad
    pytest.mark.filterwarnings("ignore:`effective_lr` is left out for the weights of SparseAdam"),
]
ROWS = 60


def batches(n: int = 48, size: int = 8) -> DataLoader[Any]:
    """Four of 40 rows each, so that 20 rows are never seen; some are seen twice in a batch."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randint(40, (n, 4), generator=generator), torch.randint(3, (n,), generator=generator)
    return DataLoader(TensorDataset(x, y), size)


class Words(LightningModule):
    """A mean of rows, normalized or not: with one row at a time the rows are scale-invariant, else they are not."""

    def __init__(self, make: Callable[[Any], Any], *, bag: bool = False, invariant: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.words = (nn.EmbeddingBag if bag else nn.Embedding)(ROWS, 6, sparse=True)
        self.norm, self.head = nn.LayerNorm(6, eps=1e-12), nn.Linear(6, 3)
        self.make, self.bag, self.invariant = make, bag, invariant
        self.every = 1
        self.steps: list[tuple[Tensor, Tensor, Tensor]] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Both optimizers step every few batches."""
        x, y = batch
        if self.invariant:
            h = self.norm(self.words(x[:, :1]).reshape(len(x), 6) if self.bag else self.words(x[:, 0]))
        else:
            h = self.words(x) if self.bag else self.words(x).mean(1)
        self.manual_backward(nn.functional.cross_entropy(self.head(h), y))
        if (batch_idx + 1) % self.every:
            return
        words, others = self.optimizers()
        before = self.words.weight.detach().clone()
        gradient = self.words.weight.grad
        dense = before if gradient is None else gradient.to_dense().double()
        words.step()
        others.step()
        self.steps.append((before.double(), dense, self.words.weight.detach().double().clone()))
        words.zero_grad()
        others.zero_grad()

    def configure_optimizers(self) -> Any:
        """One for the sparse weight, one for the others."""
        others = [*self.norm.parameters(), *self.head.parameters()]
        return self.make(self.words.parameters()), torch.optim.SGD(others, 0.05)


MAKERS: dict[str, Callable[[Any], Any]] = {
    "SparseAdam": lambda p: torch.optim.SparseAdam(p, 0.01),
    "SGD": lambda p: torch.optim.SGD(p, 0.5),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.05),
}


def expected(before: Tensor, gradient: Tensor, after: Tensor) -> dict[str, float]:
    """The curves of the reached rows, from dense float64 tensors."""
    reached = gradient.norm(dim=1) > 0
    w, g, v = before[reached], gradient[reached], after[reached]
    chord = (w / w.norm(dim=1, keepdim=True) - v / v.norm(dim=1, keepdim=True)).norm(dim=1)
    numbers = {
        "rotation": 2 * torch.asin(chord / 2),
        "relative_update": (v - w).norm(dim=1) / w.norm(dim=1),
        "gradient_alignment": (w * g).sum(1) / (w.norm(dim=1) * g.norm(dim=1)),
    }
    means = {name: values.square().mean().sqrt().item() for name, values in numbers.items()}
    return means | {"gradient_norm": gradient.norm().item()}


@pytest.mark.parametrize("every", [1, 3], ids=["each batch", "accumulated"])
@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("bag", [False, True], ids=["embedding", "bag"])
@pytest.mark.parametrize("name", MAKERS)
def test_every_curve_is_over_the_rows_that_were_reached(name: str, bag: bool, invariant: bool, every: int) -> None:
    """Entries of float32 near 1 are rounded by 6e-8, and rotations are about 1e-2 long: 1e-4 of them at the most."""
    net, monitor, norms = (
        Words(MAKERS[name], bag=bag, invariant=invariant),
        EffectiveLRMonitor(gradient=True),
        WeightNormMonitor(),
    )
    net.every = every
    trainer(monitor, norms, max_epochs=2).fit(net, batches())
    rows = monitor.history()["weights/rotation/words.weight"].dropna().index
    assert len(rows) == len(net.steps) == 12 // every
    for number, (at, step) in enumerate(zip(rows, net.steps, strict=True)):
        row = monitor.history().loc[at]
        found = {curve: row[f"weights/{curve}/words.weight"] for curve in expected(*step)}
        assert found == pytest.approx(expected(*step), rel=1e-4, abs=1e-6)
        rms = (step[0].norm() / ROWS**0.5).item()
        assert norms.history()["weights/unit_norm_rms/words.weight"].iloc[number] == pytest.approx(rms, rel=1e-6)
        if name != "SparseAdam":
            key = "effective_lr" if invariant else "effective_lr_not_invariant"
            power = 1 if name == "Adagrad" else 2
            lr = {"SGD": 0.5, "momentum": 0.1, "Adagrad": 0.05}[name]
            assert row[f"weights/{key}/words.weight"] == pytest.approx(lr / rms**power, rel=1e-5)


def test_means_of_an_epoch() -> None:
    """Are those of the rows that are logged step by step."""
    steps, epochs = EffectiveLRMonitor(gradient=True), EffectiveLRMonitor(gradient=True, logging_interval="epoch")
    for monitor in (steps, epochs):
        trainer(monitor).fit(Words(MAKERS["SGD"]), batches())
    mean = steps.history().filter(like="words").mean()
    assert dict(epochs.history().filter(like="words").iloc[-1]) == pytest.approx(dict(mean), rel=1e-9)


@pytest.mark.parametrize("hold", ["step", "mean"])
@pytest.mark.parametrize("name", ["SparseAdam", "SGD", "Adagrad"])
def test_control_turns_the_reached_rows_by_the_angle(name: str, hold: Any) -> None:
    """On average over them in each step; the others stay where they are, bit by bit."""
    net = Words(MAKERS[name], invariant=True)
    control = RotationControl(include=["words.weight"], angle=0.02, hold=hold)
    trainer(control, max_epochs=2).fit(net, batches())
    for before, gradient, after in net.steps:
        away = gradient.norm(dim=1) == 0
        assert torch.equal(before[away], after[away])
        if hold == "step":
            # Rounding turns a row of norm 1 by 1e-7, of an angle of 0.02.
            assert expected(before, gradient, after)["rotation"] == pytest.approx(0.02, rel=1e-4)
        assert after.norm(dim=1) == pytest.approx(torch.ones(ROWS).double(), rel=1e-6)


@pytest.mark.parametrize("name", MAKERS)
def test_projection_holds_all_rows(name: str) -> None:
    """Those that were reached as well as the others."""
    net = Words(MAKERS[name], invariant=True)
    trainer(NormProjection(include=["words.weight"]), max_epochs=2).fit(net, batches())
    assert net.words.weight.detach().norm(dim=1) == pytest.approx(torch.ones(ROWS), rel=1e-6)


def test_a_decay_that_is_not_there_is_not_corrected() -> None:
    """SparseAdam has none; torch itself refuses the decay of SGD and Adagrad with sparse gradients."""
    with pytest.raises(ValueError, match=r"must have a decay to correct, but SparseAdam has no `weight_decay`"):
        trainer(CorrectedDecay(), max_epochs=1).fit(Words(MAKERS["SparseAdam"], invariant=True), batches())


class Lost(Words):
    """From the 200th step on a penalty acts on the rows."""

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Its gradient is sparse as well."""
        if self.trainer.global_step // 2 >= 200:
            first = self.words(torch.arange(10))
            loss = loss + first.square().sum()
        super().manual_backward(loss, *args, **kwargs)


@pytest.mark.parametrize("lost", [False, True])
def test_the_watchdog_looks_at_sparse_gradients(lost: bool) -> None:
    """After 200 steps it is quiet where rows are scale-invariant, and tells where they are not any more."""
    net = (Lost if lost else Words)(MAKERS["SGD"], invariant=True)
    monitor = WeightNormMonitor(every_n_steps=50)
    run = trainer(monitor, max_epochs=35)
    if lost:
        with pytest.warns(UserWarning, match=r"No longer scale-invariant: 'words\.weight'"):
            run.fit(net, batches())
    else:
        run.fit(net, batches())
    assert len(net.steps) == 210


class OnlyReal(Words):
    """Cannot be called on a copy, so its gradients are observed."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """See Words."""
        if not isinstance(self.head.weight, nn.Parameter):
            raise RuntimeError("only on the real thing")
        super().training_step(batch, batch_idx)


def test_the_observer_finds_rows_by_sparse_gradients() -> None:
    """With the answer of the probe."""
    net, monitor = OnlyReal(MAKERS["SGD"], invariant=True), EffectiveLRMonitor()
    with pytest.warns(UserWarning, match="only on the real thing"):
        trainer(monitor, max_epochs=7).fit(net, batches())
    assert "weights/effective_lr/words.weight" in monitor.history()


@pytest.mark.parametrize("on_unhealthy", ["warn", "stop"])
def test_updates_of_reached_rows_that_are_lost(on_unhealthy: Any) -> None:
    """Are noticed among rows most of which have no gradient; those are none that should have moved."""
    net = Words(lambda p: torch.optim.SGD(p, 1e-12), invariant=False)
    monitor = EffectiveLRMonitor(include=["words.weight"], on_unhealthy=on_unhealthy)
    with pytest.warns(UserWarning, match=r"of 2\d units of 'words.weight' with a gradient did not move"):
        trainer(monitor, max_epochs=1).fit(net, batches())
    assert len(net.steps) == (1 if on_unhealthy == "stop" else 6)
