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
    """At the end of a short run, once."""
    with pytest.warns(UserWarning, match="`training_step` has returned no loss in"):
        trainer(NormProjection()).fit(Late(99), DataLoader(samples(), 8))


class Gan(LightningModule):
    """The critic steps in every batch, the generator in the last of every twenty."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6))
        self.critic = nn.Sequential(nn.Linear(6, 8, bias=False), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One or the other."""
        generator, critic = self.optimizers()
        fake = self.generator(torch.randn(len(batch[0]), 4))
        if (batch_idx + 1) % 20:
            self.toggle_optimizer(critic)
            self.manual_backward(self.critic(fake.detach()).mean() - self.critic(batch[0]).mean())
            critic.step()
            critic.zero_grad()
            self.untoggle_optimizer(critic)
        else:
            self.toggle_optimizer(generator)
            self.manual_backward(-self.critic(fake).mean())
            generator.step()
            generator.zero_grad()
            self.untoggle_optimizer(generator)

    def configure_optimizers(self) -> Any:
        """One for each player."""
        return [torch.optim.SGD(m.parameters(), lr=0.01) for m in (self.generator, self.critic)]


def test_a_player_that_steps_seldom() -> None:
    """Its curves and its projection begin after its first step, long before the epoch ends."""
    net, monitor = Gan(), EffectiveLRMonitor()
    run = trainer(monitor, NormProjection(), max_epochs=1)
    run.fit(net, DataLoader(samples(240), 4))
    history = monitor.history()
    # The critic from the first batch on; the generator at its second and third step, in batches 40 and 60.
    assert len(history["weights/effective_lr/generator.0.weight"].dropna()) == 2
    assert len(history["weights/effective_lr/critic.0.weight"].dropna()) == 57
    assert row_norms(net.generator[0].weight) == pytest.approx(torch.ones(8), rel=1e-6)
    assert net.critic[0].weight.detach().norm().item() == pytest.approx(8**0.5, rel=1e-6)


class TwoSpeeds(Gan):
    """Cannot be copied, so gradients of training tell; the generator has made its 33 steps after 660 batches."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("not to be copied")


def test_the_observer_waits_for_the_slowest_optimizer() -> None:
    """It says "unknown" of what it has not seen often enough, and looks on."""
    net, monitor = TwoSpeeds(), EffectiveLRMonitor()
    run = trainer(monitor, max_epochs=12)
    with pytest.warns(UserWarning, match="could not be found out by a probe"):
        run.fit(net, DataLoader(samples(240), 4))
    known = monitor.state_dict()["invariance"]["parameters"]
    assert known["generator.0.weight"]["kind"] == "neuron"
    assert known["critic.0.weight"]["kind"] == "layer"
    history = monitor.history().set_index("step")
    assert history["weights/effective_lr/critic.0.weight"].dropna().index.min() < 40
    assert history["weights/effective_lr/generator.0.weight"].dropna().index.min() >= 660


class Fragile:
    """Can be copied as long as nobody has said otherwise."""

    allowed = True

    def __deepcopy__(self, memo: Any) -> Fragile:
        if not Fragile.allowed:
            raise RuntimeError("not any more")
        return Fragile()


class CopiedOnce(Tuned):
    """Cannot be copied after its first epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.fragile = Fragile()
        Fragile.allowed = True

    def on_train_epoch_start(self) -> None:
        """From the second epoch on."""
        Fragile.allowed = self.current_epoch == 0


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist:UserWarning")
def test_asking_again_in_vain_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """What was known stays, nothing is said of observers, and the thawed weight is still unknown."""
    monitor = EffectiveLRMonitor()
    with caplog.at_level("INFO"):
        trainer(thaw(), monitor, max_epochs=4).fit(CopiedOnce(), DataLoader(samples(), 16))  # warnings are errors
    assert "could not be asked again" in caplog.text
    assert len(monitor.history()["weights/effective_lr/head.0.weight"].dropna()) == 16
    assert not any("backbone" in tag for tag in monitor.history())


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist:UserWarning")
def test_a_callback_that_waits_keeps_what_it_was_given(tmp_path: Any) -> None:
    """Radii of a weight that is frozen again are in the next checkpoint as they were in the last."""
    path, radii = tmp_path / "first.ckpt", torch.arange(1.0, 9.0)
    for epochs in (1, 2):
        held = NormProjection("initial", include=["backbone.0.weight"])
        run = trainer(thaw(), held, max_epochs=epochs)
        run.fit(Tuned(), DataLoader(samples(), 16), ckpt_path=path if epochs == 2 else None)
        if epochs == 1:
            run.save_checkpoint(path)
            saved = torch.load(path, weights_only=True)
            saved["callbacks"][held.state_key]["initial"] = {"backbone.0.weight": radii}
            torch.save(saved, path)
    assert held._projector is None  # thawed after the second epoch only
    assert torch.equal(held.state_dict()["initial"]["backbone.0.weight"], radii)


def test_what_is_allowed_does_not_wait(caplog: pytest.LogCaptureFixture) -> None:
    """A weight that no batch has reached is held at once where the user allows weights that are not scale-invariant."""
    net = Gan()
    with caplog.at_level("INFO"):
        trainer(NormProjection(include=["generator.0.weight"], on_not_invariant="allow")).fit(
            net, DataLoader(samples(16), 4)
        )
    assert "waits with" not in caplog.text
    assert row_norms(net.generator[0].weight) == pytest.approx(torch.ones(8), rel=1e-6)
