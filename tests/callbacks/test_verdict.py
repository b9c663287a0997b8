"""What is known of scale invariance decides what the callbacks do, and costs the run nothing else."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn

from lightning_normreg import (
    EffectiveLRMonitor,
    NormProjection,
    WeightNormMonitor,
    find_scale_invariance,
    save_verdict,
)
from lightning_normreg._weights import norms_of
from lightning_normreg.callbacks import _knowledge
from tests.harness import Net, around_the_first_projection, loader, moved, sgd, trainer


class Any2d(LightningModule):
    """Any network of images, with cross entropy."""

    def __init__(self, *layers: nn.Module, lr: float = 0.0) -> None:
        super().__init__()
        self.layers, self.lr = nn.Sequential(*layers), lr

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.layers(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross entropy."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        """SGD."""
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def batch_norm(lr: float = 0.0) -> Any2d:
    """A convolution with a bias before BatchNorm, and a head."""
    return Any2d(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3), lr=lr)


def group_norm(lr: float = 0.0) -> Any2d:
    """Two groups of three filters with their biases are the units."""
    return Any2d(nn.Conv2d(2, 6, 3), nn.GroupNorm(2, 6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3), lr=lr)


def layer_norm(lr: float = 0.0) -> Any2d:
    """The whole of weight and bias is one unit."""
    return Any2d(nn.Flatten(), nn.Linear(72, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3), lr=lr)


class StandardizedConv2d(nn.Conv2d):
    """Convolution with rows of mean 0 and variance 1."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve."""
        variance, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True, correction=0)
        return nn.functional.conv2d(x, (self.weight - mean) * torch.rsqrt(variance + 1e-5), self.bias)


def test_weight_standardization_is_held_at_the_root_of_fan_in() -> None:
    """There eps is added to the mean square of 18 entries: at norm 1 it would be 18 times as large a share."""
    net = Any2d(StandardizedConv2d(2, 6, 3), nn.GroupNorm(2, 6), nn.Flatten(), nn.Linear(96, 3), lr=0.1)
    trainer(NormProjection()).fit(net, loader())
    norms = net.layers[0].weight.detach().flatten(1).norm(dim=1)
    assert norms == pytest.approx(torch.full((6,), 18**0.5), rel=1e-6)


def test_columns_on_the_sphere() -> None:
    """The recipe of nGPT: every vector along the embedding dimension has norm 1, whichever dimension that is."""
    net = Any2d(nn.Flatten(), nn.Linear(72, 8), nn.Tanh(), nn.Linear(8, 3), lr=0.1)
    rows = NormProjection(1.0, unit="neuron", include=["layers.3.weight"], on_not_invariant="allow")
    columns = NormProjection(1.0, unit="column", include=["layers.1.weight"], on_not_invariant="allow")
    trainer(rows, columns).fit(net, loader())
    assert net.layers[3].weight.detach().norm(dim=1) == pytest.approx(torch.ones(3), rel=1e-6)
    assert net.layers[1].weight.detach().norm(dim=0) == pytest.approx(torch.ones(72), rel=1e-6)


@pytest.mark.parametrize("make, pieces", [(batch_norm, 6), (group_norm, 2), (layer_norm, 1)])
def test_the_first_projection_keeps_the_function(make: Any, pieces: int) -> None:
    """Training output moves by less than 1e-5, evaluation output by less than 1e-3, though norms change threefold."""
    torch.manual_seed(0)
    net = make(0.05)
    trainer(max_epochs=3).fit(net, loader())  # running statistics and biases that mean something
    with torch.no_grad():
        for p in net.layers[0 if make is not layer_norm else 1].parameters():
            p.mul_(1.0 if make is batch_norm else 3.0)
    projection = NormProjection()
    training, evaluation = moved(*around_the_first_projection(projection, net, loader()), next(iter(loader()))[0])
    assert training < 1e-5
    assert evaluation < 1e-3
    assert projection._projector is not None
    (target,) = projection._projector.targets
    assert len(norms_of([target])[0]) == pieces
    radius = {6: 1.0, 2: 3**0.5, 1: 8**0.5}[pieces]  # √ of the neurons in a unit
    assert norms_of([target])[0] == pytest.approx(torch.full((pieces,), radius), rel=1e-6)


def test_without_following_evaluation_would_be_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: where running statistics do not follow, evaluation changes by more than a tenth."""
    monkeypatch.setattr("lightning_normreg.steps._following._affine_", lambda *args: None)
    torch.manual_seed(0)
    net = batch_norm(0.05)
    trainer(max_epochs=3).fit(net, loader())
    with pytest.warns(
        UserWarning, match=r"outputs of this batch change by \S+ of their size in training and 0\.\d+ in ev"
    ):
        nets = around_the_first_projection(NormProjection(), net, loader())
    assert moved(*nets, next(iter(loader()))[0])[1] > 0.1


def test_exactly_the_invariant_weights_are_projected() -> None:
    """Without arguments: every filter before BatchNorm is at norm 1, the head is where its own steps took it."""
    ends = {}
    for name, callbacks in {"free": [], "held": [NormProjection()]}.items():
        torch.manual_seed(0)
        net = Net(sgd(momentum=0.9))
        trainer(*callbacks).fit(net, loader())
        ends[name] = net
    for weight in (ends["held"].conv1.weight, ends["held"].up.weight.view(2, 3, 2, 9).transpose(1, 2).flatten(0, 1)):
        assert weight.detach().flatten(1).norm(dim=1) == pytest.approx(torch.ones(len(weight)), rel=1e-6)
    heads = [ends[name].head.weight.detach() for name in ("free", "held")]
    assert not torch.equal(*heads)  # other gradients, since the layers before it turn at another rate …
    assert heads[0].norm().item() == pytest.approx(heads[1].norm().item(), rel=1e-2)  # … but its norm is its own


def test_a_run_is_the_same_with_and_without_the_probe() -> None:
    """Weights, buffers, and the random states of torch, NumPy and Python, bit for bit, with dropout in the model."""
    ends = []
    for callbacks in ([], [WeightNormMonitor(), EffectiveLRMonitor()]):
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        net = Any2d(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Dropout(), nn.Flatten(), nn.Linear(96, 3), lr=0.1)
        trainer(*callbacks).fit(net, loader())
        states = (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate())
        ends.append((net.state_dict(), states))
    assert ends[0][1] == ends[1][1]
    for name, value in ends[0][0].items():
        assert torch.equal(value, ends[1][0][name]), name


def test_one_probe_for_all_callbacks_and_none_on_resume(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three callbacks ask once; what they learned is in the checkpoint."""
    calls = []
    probe = _knowledge.probe
    monkeypatch.setattr(_knowledge, "probe", lambda *args, **options: calls.append(1) or probe(*args, **options))
    for path in (None, tmp_path / "end.ckpt"):
        everything = [WeightNormMonitor(), EffectiveLRMonitor(), NormProjection()]
        run = trainer(*everything, max_epochs=1 if path is None else 2)
        run.fit(Net(sgd()), loader(), ckpt_path=path)
        run.save_checkpoint(tmp_path / "end.ckpt")
        assert "weights/effective_lr/conv1.weight" in run.callback_metrics
    assert calls == [1]
    # A callback that was not there before shares what another one has restored.
    four = [EffectiveLRMonitor(include=["up.*"]), WeightNormMonitor(), EffectiveLRMonitor(), NormProjection()]
    run = trainer(*four, max_epochs=3)
    run.fit(Net(sgd()), loader(), ckpt_path=tmp_path / "end.ckpt")
    assert calls == [1]


def test_a_saved_verdict_is_taken_instead_of_a_probe(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every callback takes the file, or what is in it."""
    net = Net(sgd())
    verdict = find_scale_invariance(net, next(iter(loader())))
    save_verdict(verdict, tmp_path / "verdict.json")
    monkeypatch.setattr(_knowledge, "probe", None)
    path = str(tmp_path / "verdict.json")
    run = trainer(
        WeightNormMonitor(invariance=path), EffectiveLRMonitor(invariance=verdict), NormProjection(invariance=path)
    )
    run.fit(net, loader())
    assert run.callback_metrics["weights/unit_norm_max/up.weight"].item() == pytest.approx(1.0, rel=1e-6)
    assert "weights/effective_lr_not_invariant/head.weight" in run.callback_metrics


def fit_plain(*callbacks: Any, net: LightningModule | None = None) -> LightningModule:
    """Train a network of two linear layers, in which nothing is scale-invariant."""
    net = net or Any2d(nn.Flatten(), nn.Linear(72, 8), nn.Tanh(), nn.Linear(8, 3), lr=0.1)
    trainer(*callbacks).fit(net, loader())
    return net


def test_nothing_to_project_is_said_with_the_remedy() -> None:
    """By default an error; the documented line for such models holds every layer at its initial norm."""
    with pytest.raises(ValueError, match=r"no selected weight is scale-invariant by itself, as in most transformers\."):
        fit_plain(NormProjection())
    net = Any2d(nn.Flatten(), nn.Linear(72, 8), nn.Tanh(), nn.Linear(8, 3), lr=0.1)
    start = {n: p.detach().clone() for n, p in net.named_parameters()}
    fit_plain(NormProjection("initial", unit="layer", include=["*.weight"], on_not_invariant="allow"), net=net)
    for name, p in net.named_parameters():
        assert not torch.equal(p, start[name])
        if name.endswith("weight"):
            assert p.norm().item() == pytest.approx(start[name].norm().item(), rel=1e-6)


def test_a_named_weight_that_is_not_invariant() -> None:
    """Raise with the reason, skip, or allow."""
    with pytest.raises(ValueError, match=r"but 'head\.weight': .* Leave it out by `exclude`, or say on_not_invariant"):
        trainer(NormProjection(include=["*.weight"], exclude=["norm*"])).fit(Net(sgd()), loader())
    for how, norm in (("skip", None), ("allow", 3**0.5)):
        net = Net(sgd())
        start = net.head.weight.norm().item()
        callback = NormProjection(include=["*.weight"], exclude=["norm*"], on_not_invariant=how)
        trainer(callback).fit(net, loader())
        expected = start if norm is None else norm
        assert net.head.weight.norm().item() == pytest.approx(expected, rel=1e-2 if norm is None else 1e-6)


def test_a_unit_that_the_verdict_does_not_support() -> None:
    """Rows before LayerNorm are not scale-invariant one by one."""
    with pytest.raises(ValueError, match=r"must name scale-invariant weights, but 'layers\.1\.weight'"):
        trainer(NormProjection(unit="neuron", include=["layers.1.weight"])).fit(layer_norm(), loader())


@pytest.mark.parametrize("eps, outcome", [(1e-5, "fine"), (0.02, "warns"), (1.0, "refuses")])
def test_eps_that_rules_the_normalization(eps: float, outcome: str) -> None:
    """Above 1 % of the variance it is said, above 10 % the weight counts as not scale-invariant everywhere."""

    def net() -> Any2d:
        torch.manual_seed(0)
        return Any2d(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6, eps=eps), nn.Flatten(), nn.Linear(96, 3))

    if outcome == "refuses":
        with pytest.raises(ValueError, match=r"'layers\.0\.weight': The eps .* makes up 76% of the variance"):
            trainer(NormProjection()).fit(net(), loader())
        with pytest.raises(ValueError, match="more than 10 %"):
            trainer(NormProjection("initial")).fit(net(), loader())
        monitor = EffectiveLRMonitor()  # the same rule for curves
        trainer(monitor, NormProjection("initial", include=["layers.0.weight"], on_not_invariant="allow")).fit(
            net(), loader()
        )
        assert "weights/effective_lr_not_invariant/layers.0.weight" in monitor.history()
        assert "weights/effective_lr/layers.0.weight" not in monitor.history()
    elif outcome == "warns":
        shows = pytest.warns(UserWarning, match=r"eps of a normalization shows behind 'layers\.0\.weight' \([2-9]%\)")
        with shows, pytest.warns(UserWarning, match="outputs of this batch change by"):
            trainer(NormProjection()).fit(net(), loader())
    else:
        trainer(NormProjection()).fit(net(), loader())


def test_the_factor_on_the_effective_rate_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """Old norm squared over radius squared for SGD; nothing for radius="initial"."""
    net = batch_norm()
    factor = net.layers[0].weight.detach().double().square().sum().item() / 6
    with caplog.at_level("INFO"):
        trainer(NormProjection("initial")).fit(net, loader())
        assert "effective learning rates under" not in caplog.text
        trainer(NormProjection()).fit(net, loader())
    assert "puts 1 weight at the radius, which changes the recipe: effective learning rates" in caplog.text
    assert f"under SGD change by a factor of {factor:.3g}, and" in caplog.text


class Manual(Any2d):
    """Steps its optimizer itself, with running statistics from earlier training."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3), lr=0.1)
        self.automatic_optimization = False
        self.steps = 0

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One step."""
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()
        self.steps += 1


def test_manual_optimization_is_probed_and_projected() -> None:
    """At the first batch, on a copy with stand-ins for its optimizers; BatchNorm's statistics follow."""
    net = Manual()
    net.layers(next(iter(loader()))[0])  # running statistics have seen a batch
    run = trainer(NormProjection())
    run.fit(net, loader())  # warnings are errors
    assert net.steps == run.global_step == 6
    assert net.layers[0].weight.detach().flatten(1).norm(dim=1) == pytest.approx(torch.ones(6), rel=1e-6)


def _loss(net: Any, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(net(batch[0]), batch[1])


def test_a_loader_whose_first_batch_is_none() -> None:
    """Lightning skips the step and still ends the batch."""

    class Sparse(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            yield None
            yield from loader()

    everything = [WeightNormMonitor(), EffectiveLRMonitor(), NormProjection()]
    run = trainer(*everything)
    with pytest.warns(UserWarning, match="train_dataloader yielded None"):
        run.fit(Net(sgd(), schedule=False), torch.utils.data.DataLoader(Sparse(), batch_size=None))
    assert "weights/effective_lr/up.weight" in run.callback_metrics


def test_a_bias_that_belongs_to_a_unit_is_held_once() -> None:
    """Globs that match it as well do not give it a radius of its own, and a second projection must not either."""
    net = group_norm(0.1)
    trainer(NormProjection(include=["layers.0.*"], on_not_invariant="allow")).fit(net, loader())
    weight, bias = net.layers[0].weight.detach(), net.layers[0].bias.detach()
    joined = torch.cat([weight.reshape(2, -1), bias.reshape(2, -1)], dim=1)
    assert joined.norm(dim=1) == pytest.approx(torch.full((2,), 3**0.5), rel=1e-6)
    assert not math.isclose(bias.norm().item(), 1.0, rel_tol=1e-3)
    both = [NormProjection(), NormProjection(include=["layers.0.bias"], on_not_invariant="allow")]
    with pytest.raises(ValueError, match=r"'layers\.0\.bias' must be held by one callback"):
        trainer(*both).fit(group_norm(0.1), loader())
