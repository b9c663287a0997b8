"""What the callbacks of one fit share: a Trainer's hooks, and what is known of its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_normreg._param_groups import load_by_name
from lightning_normreg._symmetries import Symmetries
from lightning_normreg._weights import ParameterRole, Verdict, about_masks, find_flat_pieces, named_roles
from lightning_normreg.callbacks._knowledge import Knowledge
from lightning_normreg.callbacks._probing import observer_limits, probe_symmetries, say_lost
from lightning_normreg.callbacks._unseen import BackwardGuard, UnseenSteps
from lightning_normreg.steps._observer import InvarianceWatchdog
from lightning_normreg.steps._step_hooks import StepDispatcher, torch_optimizer

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer
    from torch.nn.parameter import Parameter
    from torch.optim import Optimizer
    from torch.utils.hooks import RemovableHandle


class Run:
    """One ``Trainer.fit``: owns the hooks on its optimizers, and asks once for all callbacks."""

    def __init__(self) -> None:
        self.dispatcher = StepDispatcher()
        self.claims: dict[Parameter, str] = {}
        self.knowledge = Knowledge(self.dispatcher)
        self.layout_written = False
        self.unseen = UnseenSteps(self.dispatcher)
        self.lost: set[str] = set()
        self._masked: set[str] = set()
        self.leader: object = None
        self.batch: tuple[Any, int] = (None, 0)
        self._symmetries: tuple[Symmetries | None, list[str]] | None = None
        self._watchdog: InvarianceWatchdog | None = None
        self._guarded: Verdict = {}
        self._backward: BackwardGuard | None = None
        self._schedulers: list[dict[str, Any]] | None = None
        self._temporary: list[RemovableHandle] = []

    def note_restored(self, checkpoint: Mapping[str, Any]) -> None:
        """Note the states of schedulers, which are restored after the optimizers'."""
        self._schedulers = checkpoint.get("lr_schedulers", [])

    def prepare(self, trainer: Trainer, pl_module: LightningModule, leader: object) -> None:
        """Name the parameters, before a checkpoint's optimizers are restored; the first callback leads."""
        self.leader = self.leader or leader
        if trainer.model is not None:
            find_flat_pieces(trainer.model)
        # Later, after validation, FSDP shows other objects under these names than those that the optimizer has.
        self.knowledge.named = self.knowledge.named or named_roles(pl_module)
        if self._schedulers is not None:
            schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
            states = list(zip(schedulers, self._schedulers, strict=False))
            self._temporary += load_by_name(optimizers_of(trainer), pl_module, states)
            self._schedulers = None

    def begin_training(self, trainer: Trainer) -> None:
        """Hook the optimizers, now that a checkpoint has been restored."""
        while self._temporary:
            self._temporary.pop().remove()
        self.dispatcher.attach(trainer.optimizers)

    @property
    def named(self) -> Sequence[tuple[str, Parameter, ParameterRole]]:
        """All parameters, by clean names."""
        return self.knowledge.named

    def begin_batch(self, trainer: Trainer, callback: object) -> None:
        """Hook them again where they have been replaced, and say what has lost its invariance; once for all."""
        if callback is not self.leader:
            return
        self.dispatcher.attach(trainer.optimizers)
        self.unseen.begin_batch(trainer)
        self.knowledge.begin_batch(trainer)
        lost = {} if self._watchdog is None else self._watchdog.lost()
        if lost:
            say_lost(lost)
            self.lost |= lost.keys()
            self.knowledge.lose(self.lost)

    def know(self, symmetries: Symmetries) -> None:
        """Note all scaling symmetries, which a checkpoint has."""
        self._symmetries = self._symmetries or (symmetries, [])

    def symmetries(self, trainer: Trainer) -> tuple[Symmetries | None, list[str]]:
        """All scaling symmetries, asked once for all callbacks, of the coming batch; with words where that failed."""
        if self._symmetries is None:
            self._symmetries = probe_symmetries(trainer, trainer.lightning_module, *self.batch)
        return self._symmetries

    def warn_of_masks(self, verdict: Verdict) -> None:
        """Say once that norms count what a mask hides."""
        new = {name: v for name, v in verdict.items() if v.masked and name not in self._masked}
        if new:
            self._masked |= new.keys()
            rank_zero_warn(about_masks(new))

    def guard(self, trainer: Trainer, verdict: Verdict) -> None:
        """Keep an eye on the units that are scale-invariant, once for all callbacks."""
        if verdict is self._guarded or not any(v.is_invariant for v in verdict.values()):
            return
        if self._watchdog is not None:
            self.dispatcher.unsubscribe(self._watchdog)
        self._guarded = verdict
        self._watchdog = InvarianceWatchdog(self.named, verdict, observer_limits(trainer))
        self.dispatcher.subscribe(self._watchdog)

    def before_backward(self) -> None:
        """Until an optimizer has been seen to step, look whether others do so in the backward pass."""
        self.unseen.backwards += 1
        if not self.dispatcher.has_seen_updates:
            self._backward = self._backward or BackwardGuard((name, p) for name, p, _ in self.named)
            self._backward.begin()

    def after_backward(self) -> None:
        """Refuse a run whose steps cannot be seen."""
        if self._backward is not None and not self.dispatcher.has_seen_updates:
            self._backward.end()

    def gradients_ready(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Tell of gradients: complete, not clipped yet, and unscaled unless the optimizer does that itself."""
        index = trainer.optimizers.index(optimizer)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        # Fused optimizers take the loss scale out in their own kernel, after this.
        own = scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False)
        scale = float(scaler.get_scale()) if scaler is not None and own else 1.0
        self.dispatcher.gradients_ready(index, optimizers_of(trainer)[index], scale)


_RUNS: WeakKeyDictionary[object, Run] = WeakKeyDictionary()


def run_of(trainer: Trainer) -> Run:
    """The shared state of a Trainer's present run."""
    if trainer not in _RUNS:
        _RUNS[trainer] = Run()
    return _RUNS[trainer]


def end_run(trainer: Trainer) -> None:
    """Take the hooks off, so that optimizers that outlive the training are as they were."""
    run = _RUNS.pop(trainer, None)
    if run is not None:
        run.dispatcher.remove()


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
