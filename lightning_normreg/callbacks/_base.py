"""Maps a Trainer to the one step dispatcher that all of its callbacks share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from lightning_normreg._compat import CallbackBase
from lightning_normreg._invariance import load_verdict, verdict_to_dict
from lightning_normreg._step_hooks import StepDispatcher, torch_optimizer
from lightning_normreg.callbacks._verdict import Verdict, probe

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
        self.verdict: Verdict | None = None


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
    """A callback that acts on optimizer steps. Hooks are on while a fit runs, and only then.

    What it does depends on which units are scale-invariant: that is known from the first batch on.
    """

    def __init__(self, invariance: str | Mapping[str, Any] | None) -> None:
        super().__init__()
        self.invariance = invariance
        self._given = None if invariance is None else load_verdict(invariance)
        self._verdict: Verdict | None = None
        self._begun = False

    @abstractmethod
    def _begin(self, trainer: Trainer, pl_module: LightningModule, verdict: Verdict) -> None:
        """Select the weights, knowing the verdict (empty where there is none), and subscribe to their steps."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start afresh; a checkpoint's state is loaded after this."""
        if stage == "fit":
            self._verdict, self._begun = None, False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the arguments against the model; what one callback has restored all others share."""
        optimizers_of(trainer)
        run = run_of(trainer)
        run.verdict = run.verdict or self._verdict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hook the optimizers, now that a checkpoint has been restored."""
        run_of(trainer).dispatcher.attach(trainer.optimizers)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Hook them again where they have been replaced; on the first batch find out what is scale-invariant."""
        run = run_of(trainer)
        run.dispatcher.attach(trainer.optimizers)
        if not self._begun:
            self._begun = True
            if self._given is None and run.verdict is None:
                run.verdict = probe(trainer, pl_module, batch)
            self._verdict = self._given or run.verdict or {}
            self._begin(trainer, pl_module, self._verdict)

    def state_dict(self) -> dict[str, Any]:
        """The verdict, in plain types, so that a resumed run does not ask again."""
        return {"invariance": verdict_to_dict(self._verdict or {})}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the verdict of the run that is resumed."""
        self._verdict = load_verdict(state_dict["invariance"]) or None

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
