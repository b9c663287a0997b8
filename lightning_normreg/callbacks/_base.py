"""Maps a Trainer to the one step dispatcher that all of its callbacks share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from lightning_normreg._compat import CallbackBase
from lightning_normreg._step_hooks import StepDispatcher, torch_optimizer

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer
    from torch.nn.parameter import Parameter
    from torch.optim import Optimizer


class Run:
    """What the callbacks of one ``Trainer.fit`` share."""

    def __init__(self) -> None:
        self.dispatcher = StepDispatcher()
        self.claims: dict[Parameter, str] = {}
        self.layout_written = False


_RUNS: WeakKeyDictionary[object, Run] = WeakKeyDictionary()


def run_of(trainer: Trainer) -> Run:
    """The shared state of a Trainer's present run."""
    return _RUNS.setdefault(trainer, Run())


def optimizers_of(trainer: Trainer) -> list[Optimizer]:
    """The torch optimizers behind a Trainer's optimizers.

    Raises:
        TypeError: If one is no torch optimizer and wraps none.
    """
    return [torch_optimizer(optimizer) for optimizer in trainer.optimizers]


def batches_that_stepped(trainer: Trainer) -> int:
    """The x-axis of ``LearningRateMonitor`` and ``self.log``: one step for all optimizers of a batch."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def log_interval(trainer: Trainer) -> int:
    """The Trainer's ``log_every_n_steps``, 0 for never; an attribute that its class does not declare."""
    return int(trainer.log_every_n_steps)  # type: ignore[attr-defined]


class StepCallback(CallbackBase):
    """A callback that acts on optimizer steps. Hooks are on while a fit runs, and only then."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the arguments against the model, and subscribe."""
        optimizers_of(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hook the optimizers, now that a checkpoint has been restored."""
        run_of(trainer).dispatcher.attach(trainer.optimizers)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Hook them again where they have been replaced."""
        run_of(trainer).dispatcher.attach(trainer.optimizers)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the hooks off."""
        _end(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the hooks off: after an exception there is no teardown."""
        _end(trainer)


def _end(trainer: Trainer) -> None:
    run = _RUNS.pop(trainer, None)
    if run is not None:
        run.dispatcher.remove()
