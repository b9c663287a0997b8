"""Maps a Trainer to the one step dispatcher that all of its callbacks share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_normreg._compat import CallbackBase
from lightning_normreg._param_groups import load_by_name
from lightning_normreg._symmetries import load_verdict, verdict_to_dict
from lightning_normreg._weights import ParameterRole, Verdict, find_flat_pieces, named_roles, summarize
from lightning_normreg.callbacks._probing import observer_limits, probe, same_on_all_ranks, say_lost
from lightning_normreg.steps._observer import GradientObserver, InvarianceWatchdog
from lightning_normreg.steps._step_hooks import BackwardGuard, StepDispatcher, torch_optimizer

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer
    from torch import Tensor
    from torch.nn.parameter import Parameter
    from torch.optim import Optimizer
    from torch.utils.hooks import RemovableHandle


class Run:
    """What the callbacks of one ``Trainer.fit`` share."""

    def __init__(self) -> None:
        self.dispatcher = StepDispatcher()
        self.claims: dict[Parameter, str] = {}
        self.named: list[tuple[str, Parameter, ParameterRole]] = []
        self.layout_written = False
        self.has_batches = False
        self.verdict: Verdict | None = None
        self.observer: GradientObserver | None = None
        self.watchdog: InvarianceWatchdog | None = None
        self.backward: BackwardGuard | None = None
        self.restored_schedulers: list[dict[str, Any]] | None = None
        self.temporary: list[RemovableHandle] = []

    def observed(self, trainer: Trainer, pl_module: LightningModule) -> Verdict | None:
        """What the gradients of the first steps show, where the probe failed; None until there are enough of them."""
        if self.observer is None:
            self.observer = GradientObserver(self.named, observer_limits(trainer))
            self.dispatcher.subscribe(self.observer)
        if self.observer.is_done and not self.verdict:
            self.verdict = same_on_all_ranks(trainer, self.observer.verdict())
            self.dispatcher.unsubscribe(self.observer)
            rank_zero_info(f"Scale invariance, from gradients of training: {summarize(self.verdict)}")
        return self.verdict or None

    def guard(self, trainer: Trainer, pl_module: LightningModule, verdict: Verdict) -> None:
        """Keep an eye on the units that are scale-invariant, once for all callbacks."""
        if self.watchdog is None and any(v.is_invariant for v in verdict.values()):
            self.watchdog = InvarianceWatchdog(self.named, verdict, observer_limits(trainer))
            self.dispatcher.subscribe(self.watchdog)


_RUNS: WeakKeyDictionary[object, Run] = WeakKeyDictionary()


def run_of(trainer: Trainer) -> Run:
    """The shared state of a Trainer's present run."""
    if trainer not in _RUNS:
        _RUNS[trainer] = Run()
    return _RUNS[trainer]


def optimizers_of(trainer: Trainer) -> list[Optimizer]:
    """The torch optimizers behind a Trainer's optimizers."""
    return [torch_optimizer(optimizer) for optimizer in trainer.optimizers]


def batches_that_stepped(trainer: Trainer) -> int:
    """The x-axis of ``LearningRateMonitor`` and ``self.log``: one step for all optimizers of a batch."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def callbacks_of(trainer: Trainer) -> list[Any]:
    """A Trainer's callbacks; an attribute that its class does not declare."""
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]


def log_interval(trainer: Trainer) -> int:
    """The Trainer's ``log_every_n_steps``, 0 for never; an attribute that its class does not declare."""
    return int(trainer.log_every_n_steps)  # type: ignore[attr-defined]


class StepCallback(CallbackBase):
    """A callback that acts on optimizer steps. Hooks are on while a fit runs, and only then.

    What it does depends on which units are scale-invariant: that is known from the first batch on, or, where the model
    cannot be probed, when enough gradients have been seen.
    """

    waits_for_observer = False
    """Whether it does not begin before something is known."""

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
            self._reset()

    def _reset(self) -> None:
        """Forget what a fit before this one has left, where a subclass keeps such things."""

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note the states of schedulers, which are restored after the optimizers'."""
        run_of(trainer).restored_schedulers = checkpoint.get("lr_schedulers", [])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the arguments against the model; what one callback has restored all others share."""
        optimizers = optimizers_of(trainer)
        run = run_of(trainer)
        if trainer.model is not None:
            find_flat_pieces(trainer.model)
        # Later, after validation, FSDP shows other objects under these names than those that the optimizer has.
        run.named = run.named or named_roles(pl_module)
        run.verdict = run.verdict or self._verdict
        if run.restored_schedulers is not None:
            schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
            states = zip(schedulers, run.restored_schedulers, strict=False)
            run.temporary += load_by_name(optimizers, pl_module, list(states))
            run.restored_schedulers = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hook the optimizers, now that a checkpoint has been restored."""
        while run_of(trainer).temporary:
            run_of(trainer).temporary.pop().remove()
        run_of(trainer).dispatcher.attach(trainer.optimizers)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Hook them again where they have been replaced; on the first batch find out what is scale-invariant."""
        run = run_of(trainer)
        run.has_batches = True
        run.dispatcher.attach(trainer.optimizers)
        if run.watchdog is not None:
            say_lost(run.watchdog.lost())
        if self._begun:
            return
        if self._given is None and run.verdict is None:
            run.verdict = probe(trainer, pl_module, batch)
        # What is given may have been found out by each process on batches of its own.
        verdict = same_on_all_ranks(trainer, self._given) if self._given else run.verdict or {}
        if not verdict and self.waits_for_observer:
            verdict = run.observed(trainer, pl_module) or {}
            if not verdict:
                return
        self._begun, self._verdict = True, verdict
        run.guard(trainer, pl_module, verdict)
        self._begin(trainer, pl_module, verdict)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Until an optimizer has been seen to step, look whether others do so in the backward pass."""
        run = run_of(trainer)
        if not run.dispatcher.has_seen_updates:
            run.backward = run.backward or BackwardGuard((name, p) for name, p, _ in run.named)
            run.backward.begin()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a run whose steps cannot be seen."""
        run = run_of(trainer)
        if run.backward is not None and not run.dispatcher.has_seen_updates:
            run.backward.end()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Show the gradients, which are complete now, to those who watch them; they look only once a step."""
        run = run_of(trainer)
        index = trainer.optimizers.index(optimizer)
        for watch in (run.observer, run.watchdog):
            if watch is not None:
                watch.gradients_ready(index, optimizers_of(trainer)[index])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so where nothing was done, because no optimizer has stepped or the run was too short to begin."""
        if run_of(trainer).has_batches and not run_of(trainer).dispatcher.has_seen_updates:
            rank_zero_warn(
                f"No optimizer of the Trainer has updated a weight, so {type(self).__name__} had nothing to do. Return "
                "the optimizers that step from `configure_optimizers`."
            )
            return
        observer = run_of(trainer).observer
        if observer is not None and not self._begun:
            rank_zero_warn(
                f"{type(self).__name__} logged nothing: the model could not be probed, and its {observer.steps} "
                f"optimizer steps are fewer than the {observer.STEPS[-1] + 1} that the observer of gradients needs. "
                "Train longer, or pass `invariance`."
            )

    def state_dict(self) -> dict[str, Any]:
        """The verdict, in plain types, so that a resumed run does not ask again."""
        return {"invariance": verdict_to_dict(self._verdict or {})}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the verdict of the run that is resumed."""
        self._verdict = load_verdict(state_dict["invariance"]) or None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the hooks off."""
        self._end(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the hooks off: after an exception there is no teardown."""
        self._end(trainer)

    def _end(self, trainer: Trainer) -> None:
        run = _RUNS.pop(trainer, None)
        if run is not None:
            run.dispatcher.remove()
