"""The callback that acts on optimizer steps: when it begins, and what a checkpoint keeps of it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_normreg._compat import CallbackBase
from lightning_normreg._symmetries import Symmetries, load_verdict, verdict_to_dict
from lightning_normreg._weights import Verdict, fitted_to
from lightning_normreg.callbacks._knowledge import without
from lightning_normreg.callbacks._probing import same_on_all_ranks
from lightning_normreg.callbacks._run import end_run, run_of
from lightning_normreg.steps._subscriber import StepSubscriber

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer
    from torch import Tensor
    from torch.optim import Optimizer

S = TypeVar("S", bound=StepSubscriber)


class StepCallback(CallbackBase):
    """A callback that acts on optimizer steps. Hooks are on while a fit runs, and only then.

    What it does depends on which units are scale-invariant: that is known from the first batch on, or, where the model
    cannot be probed, when enough gradients have been seen.
    """

    waits_for_observer = False
    """Whether it has use for what gradients of training show, and does not begin before."""

    _symmetries: Symmetries | None
    """All scaling symmetries, where they were looked for."""

    def __init__(
        self, invariance: str | Mapping[str, Any] | None, symmetries: str | Mapping[str, Any] | Symmetries | None = None
    ) -> None:
        super().__init__()
        self.invariance, self.symmetries = invariance, symmetries
        self._given = None if invariance is None else load_verdict(invariance)
        self._given_symmetries = None if symmetries in ("auto", None) else Symmetries.load(symmetries)
        self._reset()

    @abstractmethod
    def _begin(self, trainer: Trainer, pl_module: LightningModule, verdict: Verdict) -> None:
        """Select the weights, knowing the verdict (empty where there is none), and subscribe to their steps.

        Called again when more is known: then weights are taken up that were left out before.
        """

    def _all_symmetries(self, trainer: Trainer) -> tuple[Symmetries | None, list[str]]:
        """All scaling symmetries, as given or found on the coming batch; with words where they could not be found."""
        if self.symmetries != "auto":
            return self._given_symmetries, []
        found, why = run_of(trainer).symmetries(trainer)
        self._symmetries = found
        return found, why

    def _known_symmetries(self) -> Symmetries | None:
        """All scaling symmetries, as far as they are known by now."""
        return self._given_symmetries or self._symmetries

    def _subscribe(self, trainer: Trainer, subscriber: S) -> S:
        """Let a subscriber go on where a checkpoint was written, and be told of steps."""
        subscriber.load_state_dict(self._restored)
        run_of(trainer).dispatcher.subscribe(subscriber)
        self._subscribers.append(subscriber)
        return subscriber

    def _reset(self) -> None:
        """Forget what a fit before this one has left."""
        self._verdict: Verdict | None = None
        self._acted_on: Verdict | None = None
        self._symmetries = None
        self._subscribers: list[StepSubscriber] = []
        self._restored: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start afresh; a checkpoint's state is loaded after this."""
        if stage == "fit":
            self._reset()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note what is restored after the optimizers."""
        run_of(trainer).note_restored(checkpoint)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the arguments against the model; what one callback has restored all others share."""
        run = run_of(trainer)
        run.prepare(trainer, pl_module, self)
        run.knowledge.verdict = run.knowledge.verdict or self._verdict
        self._given = self._given and fitted_to(self._given, run.knowledge.named)
        if self._symmetries is not None:
            run.know(self._symmetries)
        if self._given_symmetries is not None:
            self._given_symmetries.check_names(name for name, _, _ in run.named)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hook the optimizers."""
        run_of(trainer).begin_training(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin when it is known what is scale-invariant, on the first batch mostly; go on when more is known."""
        run = run_of(trainer)
        run.begin_batch(trainer, self)
        if self._given is None:
            known = run.knowledge.ask(trainer, pl_module, batch, batch_idx, observe=self.waits_for_observer)
            if known is None or (self.waits_for_observer and not known):
                return
        else:
            # What is given may have been found out by each process on batches of its own.
            known = same_on_all_ranks(trainer, self._given) if self._acted_on is None else self._acted_on
            known = without(known, run.lost)
        if known is not self._acted_on:
            self._acted_on = self._verdict = known
            run.guard(trainer, known)
            run.batch = (batch, batch_idx)
            self._begin(trainer, pl_module, known)
            run.batch = (None, 0)
            run.unseen.forget()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Look whether the backward pass moves weights."""
        run_of(trainer).before_backward()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a run whose steps cannot be seen."""
        run_of(trainer).after_backward()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Tell all subscribers that the gradients are complete, once for all callbacks."""
        if run_of(trainer).leader is self:
            run_of(trainer).gradients_ready(trainer, optimizer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so where nothing was done, because no optimizer has stepped or the run was too short to begin."""
        run = run_of(trainer)
        if run.unseen.batches and not run.dispatcher.has_seen_updates:
            run.unseen.end(trainer)
        elif self._acted_on is None and (observer := run.knowledge.observer) is not None:
            rank_zero_warn(
                f"{type(self).__name__} logged nothing: the model could not be probed, and its {observer.steps} "
                f"optimizer steps are fewer than the {observer.STEPS[-1] + 1} that the observer of gradients needs. "
                "Train longer, or pass `invariance`."
            )
        elif self._acted_on is None and run.unseen.batches:
            rank_zero_warn(
                f"{type(self).__name__} did nothing: none of the batches that were tried had a loss, so it is not "
                "known which weights are scale-invariant. Train longer, or pass `invariance`."
            )

    def state_dict(self) -> dict[str, Any]:
        """Verdict and symmetries, so that a resumed run does not ask again, and subscribers' states; plain types."""
        state = {} if self._subscribers else dict(self._restored)  # a callback that waits keeps what it was given
        for subscriber in self._subscribers:
            state |= subscriber.state_dict()
        found = {} if self._symmetries is None else {"symmetries": self._symmetries.to_dict()}
        return state | found | {"invariance": verdict_to_dict(self._verdict or {})}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was written."""
        self._restored = dict(state_dict)
        self._verdict = load_verdict(state_dict["invariance"]) or None
        if self.symmetries == "auto" and "symmetries" in state_dict:
            self._symmetries = Symmetries.load(state_dict["symmetries"])

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the hooks off."""
        self._end(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the hooks off: after an exception there is no teardown."""
        self._end(trainer)

    def _end(self, trainer: Trainer) -> None:
        end_run(trainer)
