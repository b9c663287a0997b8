"""What the first projection does to the outputs is measured, and said as it is."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_normreg import NormProjection, find_scale_invariance
from tests.harness import trainer


class OwnNorm(nn.Module):
    """A BatchNorm of one's own, which assigns its running statistics anew."""

    def __init__(self, features: int, **constants: float) -> None:
        super().__init__()
        for name, value in constants.items():
            self.register_buffer(name, torch.full((features,), value))
        self.register_buffer("avg_mean", torch.zeros(features))
        self.register_buffer("avg_var", torch.ones(features))
        self.momentum = 0.2

    def forward(self, x: Tensor) -> Tensor:
        """By batch statistics in training, by the running ones else."""
        if self.training:
            mean, var = x.mean(0), x.var(0)
            self.avg_mean = (1 - self.momentum) * self.avg_mean + self.momentum * mean.detach()
            self.avg_var = (1 - self.momentum) * self.avg_var + self.momentum * var.detach()
        else:
            mean, var = self.avg_mean, self.avg_var
        return (x - mean) / (var + 1e-5).sqrt()


class InPlaceNorm(OwnNorm):
    """The same, in place, by exponents of its own name."""

    def forward(self, x: Tensor) -> Tensor:
        """As above."""
        if not self.training:
            return (x - self.avg_mean) / (self.avg_var + 1e-5).sqrt()
        mean, var = x.mean(0), x.var(0)
        with torch.no_grad():
            self.avg_mean.mul_(0.9).add_(mean, alpha=0.1)
            self.avg_var.mul_(0.9).add_(var, alpha=0.1)
        return (x - mean) / (var + 1e-5).sqrt()


class WithConstants(OwnNorm):
    """The same behind a standardization of inputs by numbers that never change, which are buffers as well."""

    def __init__(self, features: int) -> None:
        super().__init__(features, input_mean=0.5, input_var=4.0)

    def forward(self, x: Tensor) -> Tensor:
        """As above."""
        return super().forward((x - self.input_mean) / self.input_var.sqrt())


class Instance(nn.Module):
    """InstanceNorm with running statistics, over the last half of the features as positions."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm1d(features, track_running_stats=True, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        """Four positions by shifted copies."""
        shifted = torch.stack([x.roll(k, 0) for k in range(4)], dim=2)
        return self.norm(shifted)[..., 0]


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm1d,
    "cumulative": lambda n: nn.BatchNorm1d(n, momentum=None),
    "without-affine": lambda n: nn.BatchNorm1d(n, affine=False),
    "without-statistics": lambda n: nn.BatchNorm1d(n, track_running_stats=False),
    "own": OwnNorm,
    "in-place": InPlaceNorm,
    "constants": WithConstants,
    "instance": Instance,
    "layer": nn.LayerNorm,
    "group": lambda n: nn.GroupNorm(2, n),
    "rms": nn.RMSNorm,
}


class Model(LightningModule):
    """A linear layer that is ten times too long, a normalization that has seen data, and a head."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.head = nn.Linear(6, 8), norm(8), nn.Linear(8, 3)
        with torch.no_grad():
            self.first.weight.mul_(10)
            self.first.bias.mul_(10)
            for _ in range(50):
                self(batch())

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.head(torch.relu(self.norm(self.first(x))))

    def training_step(self, x: Any, batch_idx: int) -> Tensor:
        """Some loss of the logits."""
        return self(x[0]).logsumexp(1).mean()

    def configure_optimizers(self) -> Any:
        """Steps that do nothing."""
        return torch.optim.SGD(self.parameters(), lr=0.0)


def batch() -> Tensor:
    """Always the same one."""
    return torch.randn(16, 6, generator=torch.Generator().manual_seed(1)) + 0.5


def outputs(model: Model, *, training: bool) -> Tensor:
    """In float64, without moving any running statistic."""
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    model.double().train(training)
    with torch.no_grad():
        found: Tensor = model(batch().double())
    model.float().train()
    for name, b in model.named_buffers():
        b.copy_(buffers[name])
    return found


class Look(Callback):
    """Outputs as the batch begins, before the callbacks behind it and after those in front of it."""

    def on_train_batch_start(self, run: Any, model: Any, x: Any, index: int) -> None:
        """In both modes."""
        self.outputs = [outputs(model, training=mode) for mode in (True, False)]


@pytest.mark.parametrize("name", NORMS)
def test_what_is_said_is_what_is_measured(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """For many kinds of normalization: the function is kept, and the numbers are those of a float64 recomputation."""
    model, before, after = Model(NORMS[name]), Look(), Look()
    norm_before = model.first.weight.detach().norm()
    with caplog.at_level("INFO"):
        trainer(before, NormProjection(), after, limit_train_batches=1).fit(
            model, DataLoader(TensorDataset(batch()), 16)
        )
    assert model.first.weight.detach().norm() < norm_before / 3
    found = re.search(
        r"keeps the function: outputs of this batch change by (\S+) of their size in training and (\S+) in", caplog.text
    )
    assert found is not None, caplog.text
    for said, old, new in zip(found.groups(), before.outputs, after.outputs, strict=True):
        change = (new - old).abs().max() / old.square().mean().sqrt()
        # Said with two digits, from a float32 calculation whose own roundoff is some 1e-6.
        assert float(said) == pytest.approx(float(change), rel=0.06, abs=3e-6)
        assert change < 1e-3


class Unknown(OwnNorm):
    """Keeps the standard deviation, under a name that says nothing."""

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.register_buffer("s", torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        """As above."""
        if self.training:
            self.s = 0.8 * self.s + 0.2 * x.std(0).detach()
        mean, std = (x.mean(0), x.std(0)) if self.training else (0.0, self.s)
        return (x - mean) / std


def test_a_change_is_said_as_a_warning() -> None:
    """Statistics that nobody knows do not follow: only the evaluation mode changes, and by how much is said."""
    model, before, after = Model(Unknown), Look(), Look()
    changes = r"changes what the network computes: outputs of this batch change by \S+ of their size in training and "
    with pytest.warns(UserWarning, match=changes) as caught:
        trainer(before, NormProjection(), after, limit_train_batches=1).fit(
            model, DataLoader(TensorDataset(batch()), 16)
        )
    (text,) = [str(w.message) for w in caught if "what the network computes" in str(w.message)]
    found = re.search(r"change by (\S+) of their size in training and (\S+) in", text)
    assert found is not None
    sizes = [old.square().mean().sqrt() for old in before.outputs]
    pairs = zip(before.outputs, after.outputs, sizes, strict=True)
    changed = [float((new - old).abs().max() / size) for old, new, size in pairs]
    assert [float(said) for said in found.groups()] == pytest.approx(changed, rel=0.06, abs=3e-6)
    assert changed[1] > 0.1
    assert changed[0] < 1e-4


def test_what_the_user_allows_is_said_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """A weight that is not scale-invariant."""
    with caplog.at_level("INFO"):
        trainer(NormProjection(include=["head.weight"], on_not_invariant="allow"), limit_train_batches=1).fit(
            Model(nn.BatchNorm1d), DataLoader(TensorDataset(batch()), 16)
        )
    assert "The first projection changes what the network computes, as allowed: outputs change by" in caplog.text


@pytest.mark.parametrize("name, passes", [("batch", 6), ("layer", 6), ("own", 8)])
def test_what_it_costs(name: str, passes: int) -> None:
    """Forward passes of the batch on private copies, beside the one of training; the verdict is given."""

    class Counting(Model):
        calls = 0

        def training_step(self, x: Any, batch_idx: int) -> Tensor:
            Counting.calls += 1
            return super().training_step(x, batch_idx)

    model = Counting(NORMS[name])
    verdict = find_scale_invariance(model, [batch()])
    Counting.calls = 0
    trainer(NormProjection(invariance=verdict), limit_train_batches=1).fit(
        model, DataLoader(TensorDataset(batch()), 16)
    )
    assert Counting.calls == passes + 1
