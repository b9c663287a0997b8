"""What is unknown at the first batch is asked again, and then every callback takes it up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.callbacks import BackboneFinetuning
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_normreg import (
    CorrectedDecay,
    EffectiveLRMonitor,
    NormProjection,
    NormSummary,
    RotationControl,
    WeightNormMonitor,
)
from tests.harness import trainer


def samples(n: int = 64) -> TensorDataset:
    """Vectors with labels."""
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(n, 6, generator=generator), torch.randint(3, (n,), generator=generator))


class Tuned(LightningModule):
    """A backbone that finetuning thaws, and a head, both scale-invariant but for the last layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(8, 5, bias=False), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Cross entropy."""
        return nn.functional.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

    def configure_optimizers(self) -> Any:
        """What is trained from the start; the finetuning callback adds the rest."""
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(trained, lr=0.05, weight_decay=1e-2)


def thaw() -> BackboneFinetuning:
    """At the third epoch, at the learning rate that the head has."""
    return BackboneFinetuning(2, lambda _: 1.0, backbone_initial_lr=0.05, train_bn=False)


def row_norms(weight: Tensor) -> Tensor:
    """Of every neuron."""
    return weight.detach().flatten(1).norm(dim=1)


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist:UserWarning")  # Lightning, of itself
@pytest.mark.parametrize("hold", [NormProjection, RotationControl])
def test_thawed_weights_are_taken_up_when_they_are_trained(hold: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Frozen is not "not invariant": curves and control begin at the third epoch, and it is said both times."""
    net = Tuned()
    start = net.backbone[0].weight.detach().clone()
    monitor, norms = EffectiveLRMonitor(), WeightNormMonitor()
    with caplog.at_level("INFO"):
        run = trainer(thaw(), monitor, norms, hold(), max_epochs=4)
        run.fit(net, DataLoader(samples(), 16))
    history = monitor.history().set_index("step")
    assert not any("not_invariant/backbone" in tag for tag in history)
    curve = history["weights/effective_lr/backbone.0.weight"].dropna()
    assert list(curve.index) == list(range(8, 16))  # four batches an epoch
    assert len(history["weights/effective_lr/head.0.weight"].dropna()) == 16
    assert "weights/unit_norm_rms/backbone.0.weight" in norms.history()
    assert row_norms(net.backbone[0].weight) == pytest.approx(torch.ones(8), rel=1e-6)
    assert row_norms(net.head[0].weight) == pytest.approx(torch.ones(5), rel=1e-6)
    assert not torch.equal(start, net.backbone[0].weight)
    assert "waits with backbone.0.weight" in caplog.text
    assert "New: backbone.0.weight" in caplog.text


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist:UserWarning")
def test_thawed_weights_may_be_named() -> None:
    """`include` of a weight that a finetuning callback thaws is no error, and corrected decay takes it up as well."""
    net = Tuned()
    trainer(thaw(), NormProjection(include=["backbone.0.weight"]), CorrectedDecay(), max_epochs=3).fit(
        net, DataLoader(samples(), 16)
    )
    assert row_norms(net.backbone[0].weight) == pytest.approx(torch.ones(8), rel=1e-6)


class Experts(LightningModule):
    """Every sample goes to one of twelve experts, by its label; each ends in a normalization."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 8, bias=False), nn.LayerNorm(8, elementwise_affine=False)) for _ in range(12)
        )
        self.head = nn.Linear(8, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Cross entropy; only experts that have samples are called."""
        x, y = batch
        expert = torch.arange(len(x)) // 5 % 12
        mixed = torch.zeros(len(x), 8, dtype=x.dtype)
        for number in expert.unique().tolist():
            mixed[expert == number] = self.experts[number](x[expert == number])
        return nn.functional.cross_entropy(self.head(mixed), y)

    def configure_optimizers(self) -> Any:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def test_experts_that_a_few_samples_do_not_reach() -> None:
    """Four samples reach one of twelve; all of the batch does."""
    monitor, summary = EffectiveLRMonitor(), NormSummary()
    trainer(monitor, summary, max_epochs=1).fit(Experts(), DataLoader(samples(), 64))
    tags = set(monitor.history())
    for number in range(12):
        assert f"weights/effective_lr/experts.{number}.0.weight" in tags
    units = {row["parameter"]: row["units"] for row in summary.rows()}
    assert {units[f"experts.{number}.0.weight"] for number in range(12)} == {"whole tensor"}


class Late(Tuned):
    """Some of its first batches have no loss."""

    def __init__(self, without: int) -> None:
        super().__init__()
        self.without = without

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """None: Lightning goes on with the next batch."""
        return None if batch_idx < self.without else super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")
def test_a_first_batch_without_a_loss() -> None:
    """The next one is asked, well before the gradients of 33 steps have been seen."""
    net, monitor = Late(1), EffectiveLRMonitor()
    trainer(monitor, NormProjection()).fit(net, DataLoader(samples(), 8))
    assert monitor.history()["step"].min() <= 1
    assert row_norms(net.head[0].weight) == pytest.approx(torch.ones(5), rel=1e-6)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")
def test_no_batch_with_a_loss_is_said() -> None:
    """At the end, by every callback that has waited."""
    with pytest.warns(UserWarning, match="had nothing to do|did nothing"):
        trainer(NormProjection()).fit(Late(99), DataLoader(samples(), 8))
