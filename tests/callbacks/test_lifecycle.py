"""What happens to a run from outside: thawing, toggling, compiling, tuning, a second fit, checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.callbacks import BaseFinetuning, BatchSizeFinder, LearningRateFinder, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_normreg import (
    CorrectedDecay,
    EffectiveLRMonitor,
    NormProjection,
    NormSummary,
    WeightNormMonitor,
    find_scale_invariance,
)
from lightning_normreg.steps import StepDispatcher, StepSubscriber
from tests.harness import Net, RecordingLogger, images, loader, sgd, trainer


def rows(run: Any) -> list[tuple[int, dict[str, float]]]:
    """What was logged."""
    assert isinstance(run.logger, RecordingLogger)
    return run.logger.rows


class Thaw(BaseFinetuning):
    """Freezes the first convolution for an epoch."""

    def freeze_before_training(self, pl_module: Any) -> None:
        """The first convolution."""
        self.freeze(pl_module.conv1)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        """Give it to the optimizer in the second epoch, as a group; a run that is resumed has frozen it once more."""
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.conv1, optimizer, lr=1e-2)
        elif epoch > 1:
            self.make_trainable(pl_module.conv1)


class Trained(Net):
    """Optimizes what is not frozen."""

    def configure_optimizers(self) -> Any:
        """One group."""
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1e-2, momentum=0.9)


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_late_thawing_is_logged_and_resumed(tmp_path: Path) -> None:
    """Curves begin with the first step of a thawed layer; a checkpoint with the added group resumes exactly."""

    def fit(epochs: int, resume: Path | None = None) -> Any:
        torch.manual_seed(0)
        saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        projection = NormProjection(include=["conv1.weight"], unit="neuron", on_not_invariant="allow")
        run = trainer(Thaw(), EffectiveLRMonitor(), projection, saver, max_epochs=epochs, enable_checkpointing=True)
        run.fit(Trained(sgd()), DataLoader(images(12), batch_size=4), ckpt_path=resume)
        return run

    whole = fit(3)
    assert [s for s, row in rows(whole) if "weights/relative_update/conv1.weight" in row] == list(range(3, 9))
    assert [s for s, row in rows(whole) if "weights/relative_update/head.weight" in row] == list(range(9))
    resumed = fit(3, tmp_path / "epoch=1.ckpt")
    for name, value in whole.lightning_module.state_dict().items():
        assert torch.equal(value, resumed.lightning_module.state_dict()[name]), name
    assert rows(resumed) == [row for row in rows(whole) if row[0] >= 6]


class Toggled(LightningModule):
    """A GAN's loop: while one network learns, the other's parameters require no gradient."""

    def __init__(self, toggle: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.toggle = toggle
        self.generator, self.critic = nn.Linear(72, 6, bias=False), nn.Linear(6, 1)
        self.norm = nn.LayerNorm(6)

    def loss(self, x: Tensor) -> Tensor:
        """Any loss that both depend on."""
        return self.critic(torch.tanh(self.norm(self.generator(x.flatten(1))))).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One step of each."""
        for optimizer in self.optimizers():
            if self.toggle:
                self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch[0]))
            optimizer.step()
            if self.toggle:
                self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        """One for each."""
        return torch.optim.SGD(self.critic.parameters(), lr=0.1), torch.optim.Adam(self.generator.parameters())


def test_toggling_changes_no_number() -> None:
    """Weights and curves are those of a run without it: membership in an optimizer counts, never requires_grad."""
    found = []
    for toggle in (False, True):
        torch.manual_seed(0)
        net = Toggled(toggle)
        verdict = find_scale_invariance(net, next(iter(loader())), forward=lambda m, batch: m.loss(batch[0]))
        run = trainer(EffectiveLRMonitor(invariance=verdict), NormProjection(invariance=verdict))
        run.fit(net, loader())
        found.append((rows(run), net.state_dict()))
    assert found[0][0] == found[1][0]
    assert len(found[0][0]) == 6
    assert "weights/effective_lr/generator.weight" in found[0][0][0][1]
    assert all(torch.equal(value, found[1][1][name]) for name, value in found[0][1].items())


def test_a_second_fit_on_one_module_counts_every_step_once() -> None:
    """With the same Trainer and with another one, callbacks included: hooks neither double nor stay."""
    net, monitor = Net(sgd()), EffectiveLRMonitor()
    callbacks = [monitor, NormProjection()]
    first = trainer(*callbacks)
    for run, epochs in ((first, 1), (first, 2), (trainer(*callbacks), 1)):
        run.fit_loop.max_epochs = epochs
        before = len(rows(run))
        run.fit(net, loader())
        assert len(rows(run)) - before == 6
        assert len(monitor.history()) == 6
        assert not run.optimizers[0]._optimizer_step_post_hooks


@pytest.mark.pitfall(21)
@pytest.mark.parametrize("compiled", ["module", "submodule", "nn.Module.compile"])
def test_compiled_modules_have_the_same_curves_under_the_same_names(compiled: str) -> None:
    """The probe asks a private copy, also of a LightningModule whose methods have been replaced by compiled ones."""
    found = []
    for way in ("", compiled):
        torch._dynamo.reset()
        torch.manual_seed(0)
        net: Any = Net(lambda groups: torch.optim.SGD([p for g in groups for p in g["params"]], lr=0.1), False)
        if way == "module":
            net = torch.compile(net, backend="eager")
        elif way == "submodule":
            net.conv1 = torch.compile(net.conv1, backend="eager")
        elif way:
            net.up.compile(backend="eager")
        run = trainer(EffectiveLRMonitor(), WeightNormMonitor(), NormProjection())
        run.fit(net, loader())
        found.append(rows(run))
    assert "weights/effective_lr/conv1.weight" in found[0][0][1]
    assert found[0] == found[1]


def graphs(hooks: bool) -> tuple[int, Tensor]:
    """Graphs that a compiled step of an optimizer is made of, and a weight after three steps."""
    torch._dynamo.reset()
    made: list[Any] = []

    def backend(module: Any, inputs: Any) -> Any:
        made.append(module)
        return module.forward

    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(4, 4))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    dispatcher = StepDispatcher()
    seen = []

    class Subscriber(StepSubscriber):
        def before_step(self, index: int, optimizer: Any) -> None:
            seen.append(weight.detach().norm() + 1)

        def after_step(self, index: int, optimizer: Any, skipped: Any) -> None:
            seen.append(weight.detach().norm() + 1)

    if hooks:
        dispatcher.subscribe(Subscriber())
        dispatcher.attach([optimizer])
    step = torch.compile(optimizer.step, backend=backend)
    for _ in range(3):
        weight.grad = weight.detach().clone()
        step()
    assert len(seen) == 6 * hooks
    return len(made), weight.detach()


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch, on itself
def test_hooks_stay_out_of_a_compiled_step() -> None:
    """As many graphs as without hooks, every step seen, and the same weights."""
    (plain, weight), (hooked, other) = graphs(False), graphs(True)
    assert plain == hooked
    assert torch.equal(weight, other)


@pytest.mark.pitfall(27)
@pytest.mark.parametrize(
    "finder", [LearningRateFinder(num_training_steps=5, update_attr=False), BatchSizeFinder(max_trials=1)]
)
def test_finders_run_without_us(finder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take all other callbacks away for their own steps: none is projected or logged, and the fit after it is."""

    class Tuned(Net):
        lr, batch_size = 1e-3, 4
        stepped = 0

        def train_dataloader(self) -> Any:
            return loader(self.batch_size)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            self.stepped += 1
            super().optimizer_step(*args, **kwargs)

    seen = []
    enter = StepDispatcher.enter
    monkeypatch.setattr(StepDispatcher, "enter", lambda *args: (seen.append(1), enter(*args))[1])
    net = Tuned(sgd())
    run = trainer(EffectiveLRMonitor(), NormProjection(), finder, default_root_dir=tmp_path)
    run.fit(net)
    steps = 24 // net.batch_size
    assert net.stepped > steps
    assert len(seen) == len(rows(run)) == steps


@pytest.mark.pitfall(18)
def test_all_states_are_of_plain_types(tmp_path: Path) -> None:
    """A checkpoint of all callbacks with all their options loads with ``weights_only=True``."""
    everything = {"gradient": True, "scale_exponent": True, "logging_interval": "epoch"}
    callbacks = [
        WeightNormMonitor(logging_interval="epoch"),
        EffectiveLRMonitor(**everything, on_unhealthy="stop"),
        NormProjection("initial", include=["conv1.weight"]),
        CorrectedDecay(include=["up.weight"]),
        NormSummary(),
    ]
    net = Net(lambda groups: torch.optim.AdamW(groups, weight_decay=0.1))
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=4)
    trainer(*callbacks, saver, enable_checkpointing=True, limit_train_batches=4).fit(net, loader())
    (path,) = tmp_path.iterdir()
    states = torch.load(path, weights_only=True)["callbacks"]
    assert len(states) == 6
