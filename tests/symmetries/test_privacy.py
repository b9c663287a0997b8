"""The probe leaves no trace on the module, its Trainer, or the random states."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Callback
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_normreg._symmetries import find_scale_invariance


class Busy(LightningModule):
    """Has a buffer, a metric, a counter, dropout, and draws from every random state in its training_step."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.3), nn.Linear(5, 3))
        self.accuracy = MulticlassAccuracy(num_classes=3)
        self.calls = 0
        self.seen: list[float] = []

    def training_step(self, batch, batch_idx):
        """Cross entropy of noisy inputs."""
        x, y = batch
        self.calls += 1
        self.seen.append(random.random() + np.random.rand())
        logits = self.net(x + 0.1 * torch.randn_like(x))
        self.accuracy(logits, y)
        loss = F.cross_entropy(logits, y)
        self.log("loss", loss)
        self.log_dict({"accuracy": self.accuracy})
        if self.trainer.logger:
            self.trainer.logger.log_metrics({"own": float(loss.detach())})
        return {"loss": loss, "logits": logits}

    def configure_optimizers(self):
        """SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def batch():
    """Eight samples of three classes."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(8, 6, generator=generator), torch.arange(8) % 3


def random_states():
    """Of torch, NumPy and Python."""
    return torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()


def test_module_and_random_states_are_untouched():
    """Weights, buffers, gradients, modes, batch, default type and random states are the same bits as before."""
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(), nn.Linear(5, 3))
    net[0].weight.grad = torch.ones(5, 6)
    before, states, (x, y) = copy.deepcopy(net), random_states(), batch()
    find_scale_invariance(net, (x, y), forward=lambda m, b: F.cross_entropy(m(b[0]), b[1]))

    assert all(torch.equal(a, b) for a, b in zip(before.state_dict().values(), net.state_dict().values(), strict=True))
    assert torch.equal(net[0].weight.grad, torch.ones(5, 6))
    assert all(p.grad is None for p in list(net.parameters())[1:])
    assert [m.training for m in before.modules()] == [m.training for m in net.modules()]
    assert torch.equal(x, batch()[0])
    assert torch.get_default_dtype() == torch.float32
    for expected, actual in zip(states, random_states(), strict=True):
        assert np.array_equal(expected, actual) if not isinstance(expected, tuple) else expected == actual


class ProbeAtFirstBatch(Callback):
    """Probes as a callback of the package would."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        """Probe before the first step."""
        if batch_idx == 0:
            self.verdicts = find_scale_invariance(pl_module, batch)


class Recorder(Callback):
    """Keeps what every step logged."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        """Copy the logged values."""
        self.rows.append({k: float(v) for k, v in trainer.callback_metrics.items()} | {"out": float(outputs["loss"])})


def train(tmp_path, *callbacks):
    """Three epochs; weights, what was logged, and the module."""
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    model, recorder = Busy(), Recorder()
    trainer = Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[*callbacks, recorder], default_root_dir=tmp_path,
    )  # fmt: skip
    x, y = torch.randn(32, 6), torch.arange(32) % 3
    trainer.fit(model, DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True))
    return model, recorder.rows, random_states()


def test_a_run_with_the_probe_is_bit_identical_to_one_without(tmp_path):
    """Losses, logged metrics, weights, counters and random states do not know of the probe."""
    probe = ProbeAtFirstBatch()
    plain, rows, states = train(tmp_path)
    probed, probed_rows, probed_states = train(tmp_path, probe)

    assert probe.verdicts["net.0.weight"].kind == "neuron"
    assert rows == probed_rows
    assert (plain.calls, plain.seen) == (probed.calls, probed.seen)
    assert all(
        torch.equal(a, b) for a, b in zip(plain.state_dict().values(), probed.state_dict().values(), strict=True)
    )
    assert torch.equal(states[0], probed_states[0])
    assert np.array_equal(states[1], probed_states[1])
    assert states[2] == probed_states[2]


class CountingLogger:
    """A logger that counts."""

    calls = 0

    def log_metrics(self, metrics):
        """Count."""
        self.calls += 1


def test_the_trainers_loggers_hear_nothing():
    """A training_step that writes to the logger itself writes nowhere while it is probed."""

    class FakeTrainer:
        logger = CountingLogger()
        loggers = (logger,)
        current_epoch = global_step = 0

    module = Busy()
    module._trainer = FakeTrainer()
    verdicts = find_scale_invariance(module, batch())
    assert verdicts["net.0.weight"].kind == "neuron"
    assert CountingLogger.calls == 0
    assert module.calls == 0


@pytest.mark.parametrize("name", ["net.0.weight", "net.0.bias", "net.1.weight", "net.4.weight"])
def test_training_step_of_a_lightning_module_is_asked(name):
    """With a LightningModule the loss is its own training_step's."""
    module = Busy()
    module._trainer = type("FakeTrainer", (), {"logger": None, "current_epoch": 0, "global_step": 0})()
    kinds = {"net.0.weight": "neuron", "net.0.bias": "inert", "net.1.weight": "none", "net.4.weight": "none"}
    assert find_scale_invariance(module, batch())[name].kind == kinds[name]


@pytest.mark.parametrize("moment, is_shown", [(0.0, True), (60.0, False)])
def test_progress_is_shown_where_it_takes_a_moment(moment, is_shown, monkeypatch, capsys):
    """A bar on stderr, which a short probe never draws."""
    monkeypatch.setattr("lightning_normreg._symmetries._probe.MOMENT", moment)
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    find_scale_invariance(net, torch.randn(8, 6), forward=lambda module, x: module(x).exp().mean())
    assert ("Scale invariance" in capsys.readouterr().err) == is_shown
