"""Manual optimization: each backward pass is a loss of its own, and those count that reach a weight before it steps."""

from __future__ import annotations

import copy

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_normreg import find_scale_invariance, find_symmetries
from tests.symmetries._labels import differences
from tests.symmetries.test_privacy import ProbeAtFirstBatch

NORMED = {"1.weight": "neuron", "1.bias": "inert"}


def body(inputs, outputs):
    """Linear layers around a BatchNorm: the first one's rows are scale-invariant, and its bias is inert."""
    return nn.Sequential(nn.Identity(), nn.Linear(inputs, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, outputs))


def labels(*names):
    """Labels of some bodies by name."""
    return {f"{name}.{key}": value for name in names for key, value in NORMED.items()}


# The critic's BatchNorm sees a batch of generated samples by itself, behind linear layers only: so the generator's last
# layer may be rescaled as a whole, and the mean takes its bias away.
SHOWN = {"generator.4.weight": "layer", "generator.4.bias": "inert"}


class Manual(LightningModule):
    """Two players on vectors of 6 features."""

    expected = labels("generator", "critic") | SHOWN

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.critic = body(4, 6), body(6, 1)

    def configure_optimizers(self):
        """One for each player."""
        return [torch.optim.SGD(p.parameters(), 0.1) for p in (self.generator, self.critic)]

    def fake(self, x):
        """Generated samples."""
        return self.generator(torch.randn(len(x), 4))

    def losses(self, x):
        """Of the generator, and of the critic."""
        return F.softplus(-self.critic(self.fake(x))).mean(), (
            F.softplus(-self.critic(x)).mean() + F.softplus(self.critic(self.fake(x).detach())).mean()
        )


class TwoPlayers(Manual):
    """The generator's loss reaches the critic too, whose gradients are then dropped."""

    def training_step(self, batch, batch_idx):
        """As in the examples: no toggling, zero_grad in front of each backward pass."""
        for optimizer, index in zip(self.optimizers(), (0, 1), strict=True):
            loss = self.losses(batch[0])[index]
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        self.log("loss", loss)


class Dropped(Manual):
    """The generator's loss has the norm of the critic's first layer in it, but that gradient is dropped."""

    def training_step(self, batch, batch_idx):
        """A penalty that no optimizer of the critic ever sees."""
        generator, critic = self.optimizers()
        loss = self.losses(batch[0])[0] + self.critic[1].weight.square().sum()
        generator.zero_grad()
        self.manual_backward(loss)
        generator.step()
        critic.zero_grad()
        self.manual_backward(self.losses(batch[0])[1])
        critic.step()


class Penalized(Dropped):
    """The same penalty, but the critic's gradients are not dropped."""

    expected = labels("generator") | SHOWN | {"critic.1.bias": "inert"}

    def training_step(self, batch, batch_idx):
        """Both losses go backward before anything steps."""
        for loss in (self.losses(batch[0])[0] + self.critic[1].weight.square().sum(), self.losses(batch[0])[1]):
            loss.backward()
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()


class Three(Manual):
    """Three optimizers, the third one on an encoder whose output is normalized in the loss."""

    expected = labels("generator", "critic") | SHOWN | {"encoder.weight": "layer"}

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 4, bias=False)

    def configure_optimizers(self):
        """With a scheduler, as a pair of lists."""
        optimizers = [*super().configure_optimizers(), torch.optim.Adam(self.encoder.parameters(), 0.1)]
        return optimizers, [torch.optim.lr_scheduler.StepLR(optimizers[0], 1)]

    def training_step(self, batch, batch_idx):
        """The scheduler steps too."""
        generator, critic, encoder = self.optimizers()
        x = batch[0]
        losses = [*self.losses(x), -F.cosine_similarity(self.encoder(x), self.encoder(x.roll(1, 0))).exp().mean()]
        for optimizer, loss in zip((generator, critic, encoder), losses, strict=True):
            optimizer.zero_grad()
            self.manual_backward(loss, retain_graph=True)
            optimizer.step()
        self.lr_schedulers().step()


class Toggled(Manual):
    """Toggled by Lightning for one player, by hand for the other."""

    def training_step(self, batch, batch_idx):
        """Both ways."""
        generator, critic = self.optimizers()
        self.toggle_optimizer(generator)
        loss = self.losses(batch[0])[0]
        generator.zero_grad()
        self.manual_backward(loss)
        assert not self.critic[1].weight.requires_grad
        generator.step()
        self.untoggle_optimizer(generator)
        self.generator.requires_grad_(False)
        critic.zero_grad()
        self.manual_backward(self.losses(batch[0])[1])
        critic.step()
        self.generator.requires_grad_(True)


class GradientPenalty(Manual):
    """The critic's gradient in its input, whose norm is brought to one: still a function of normalized rows."""

    def training_step(self, batch, batch_idx):
        """Gradients of gradients."""
        generator, critic = self.optimizers()
        generator.zero_grad()
        self.manual_backward(-self.critic(self.fake(batch[0])).tanh().mean())
        generator.step()
        x = batch[0].requires_grad_()
        (gradient,) = torch.autograd.grad(self.critic(x).sum(), x, create_graph=True)
        critic.zero_grad()
        self.manual_backward(self.losses(batch[0])[1] + (gradient.norm(dim=1) - 1).square().mean())
        critic.step()


class Closures(Manual):
    """Everything happens in closures."""

    def training_step(self, batch, batch_idx):
        """One closure for each player."""
        for index, optimizer in enumerate(self.optimizers()):

            def closure(index=index, optimizer=optimizer):
                loss = self.losses(batch[0])[index]
                optimizer.zero_grad()
                self.manual_backward(loss)
                return loss

            assert optimizer.step(closure=closure).detach() > 0


class Target(Manual):
    """A learner whose target is a slow copy of itself, moved by hand and never trained."""

    expected = labels("learner")

    def __init__(self) -> None:
        super().__init__()
        del self.generator, self.critic
        self.learner = body(6, 1)
        self.target = copy.deepcopy(self.learner).requires_grad_(False)

    def configure_optimizers(self):
        """One."""
        return torch.optim.Adam(self.learner.parameters(), 0.1)

    def training_step(self, batch, batch_idx):
        """Temporal difference."""
        optimizer = self.optimizers()
        x = batch[0]
        wanted = 1 + 0.9 * self.target(x.roll(1, 0)).detach()
        optimizer.zero_grad()
        self.manual_backward(F.smooth_l1_loss(self.learner(x), wanted))
        optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(self.target.parameters(), self.learner.parameters(), strict=True):
                slow.lerp_(fast, 0.5)


class Seldom(Manual):
    """The generator steps in every 20th batch only, so nothing is known of it in the first."""

    expected = labels("critic") | {
        f"generator.{name}": "unknown" for name in ("1.weight", "1.bias", "2.weight", "2.bias", "4.weight", "4.bias")
    }

    def training_step(self, batch, batch_idx):
        """Critic first."""
        generator, critic = self.optimizers()
        critic.zero_grad()
        self.manual_backward(self.losses(batch[0])[1])
        critic.step()
        if batch_idx % 20 == 19:
            generator.zero_grad()
            self.manual_backward(self.losses(batch[0])[0])
            generator.step()


class Accumulated(Manual):
    """Nothing steps in the first batch: its gradients wait, and count."""

    def training_step(self, batch, batch_idx):
        """Every fourth batch."""
        for loss in self.losses(batch[0]):
            self.manual_backward(loss / 4)
        if batch_idx % 4 == 3:
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()


MODELS = [TwoPlayers, Dropped, Penalized, Three, Toggled, GradientPenalty, Closures, Target, Seldom, Accumulated]


def batch(seed=0):
    """Eight samples."""
    return [torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))]


def trained(verdicts, module):
    """Verdicts on what is trained."""
    return {name: verdicts[name] for name, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("model", MODELS)
def test_manual_steps_get_the_labels_made_by_hand(model, seed, dtype):
    """Without a Trainer, with optimizers that configure_optimizers returns."""
    torch.manual_seed(seed)
    module = model()
    before = copy.deepcopy(module.state_dict())
    verdicts = find_scale_invariance(module, batch(seed), seed=seed, dtype=dtype)
    assert differences(trained(verdicts, module), module.expected) == {}
    assert all(torch.equal(a, b) for a, b in zip(before.values(), module.state_dict().values(), strict=True))
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("model", MODELS)
def test_a_run_with_the_probe_is_that_without(model, tmp_path):
    """In a Trainer, at the first batch: right, and weights and learning rates are bit-identical afterwards."""

    def fit(*callbacks):
        torch.manual_seed(0)
        module = model()
        trainer = Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=list(callbacks), default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(module, DataLoader(TensorDataset(torch.cat([batch(s)[0] for s in range(3)])), batch_size=8))
        return module, [group["lr"] for o in trainer.optimizers for group in o.param_groups]

    probe = ProbeAtFirstBatch()
    (plain, rates), (probed, probed_rates) = fit(), fit(probe)
    assert differences(trained(probe.verdicts, probed), probed.expected) == {}
    assert rates == probed_rates
    assert all(
        torch.equal(a, b) for a, b in zip(plain.state_dict().values(), probed.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("players", [TwoPlayers, Dropped, Penalized])
def test_symmetries_of_several_losses(players):
    """Each tensor has the losses that train it: the units that were reasoned above, and nothing besides.

    Tanh hands no factor on, and logits have a scale. The penalty counts where the critic's optimizer sees it.
    """
    torch.manual_seed(0)
    model = players().train()
    found = find_symmetries(model, [torch.randn(8, 6)])
    weights = {name for name, label in model.expected.items() if label != "inert"}
    assert {(s.kind, *s.exponents) for s in found.basis} == {("unit", name) for name in weights}
    assert set(found.inert) == {name for name, label in model.expected.items() if label == "inert"}
    assert found.certificate < 1e-12
