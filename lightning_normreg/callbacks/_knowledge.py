"""What is known of scale invariance, once for all callbacks of a fit, and when it is asked again."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_normreg._weights import ParameterRole, ScaleInvariance, Verdict, listed, summarize
from lightning_normreg.callbacks._probing import few_samples, observer_limits, probe, same_on_all_ranks
from lightning_normreg.steps._observer import GradientObserver
from lightning_normreg.steps._step_hooks import StepDispatcher

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer
    from torch.nn.parameter import Parameter

AGAIN = (2, 8, 32, 128)
"""Batches, counted from 1, at which what is unknown is asked again; so it is after 1, 2, 4, 8, … epochs.

At the last two it is also asked again whether an eps rules.
"""


class Knowledge:
    """The verdict so far. Every process comes to the same one, at the same batch.

    Attributes:
        verdict: What is known; None before there was an answer, empty where there is none to be had.
        named: All parameters, by clean names.
        observer: Watches gradients where nothing could be asked.
    """

    def __init__(self, dispatcher: StepDispatcher) -> None:
        self.verdict: Verdict | None = None
        self.named: Sequence[tuple[str, Parameter, ParameterRole]] = ()
        self.observer: GradientObserver | None = None
        self._dispatcher = dispatcher
        self._batch = 0
        self._epoch = 0
        self._due: Literal["now", "last"] | None = None
        self._open: set[str] = set()
        self._stepped: set[int] = set()
        self._observed = 0
        self._last: tuple[Any, int] = (None, 0)
        self._read: Verdict | None = None
        self._candidates: set[str] = set()

    def begin_batch(self, trainer: Trainer) -> None:
        """Decide whether it is time to ask, and of which batch."""
        self._batch += 1
        still_open = self._unknown(trainer)
        epoch = trainer.current_epoch
        again = self._batch in (1, *AGAIN) or (epoch > self._epoch and epoch.bit_count() == 1)
        new = {i for i, _ in enumerate(trainer.optimizers) if self._dispatcher.has_updated(i)} - self._stepped
        self._due = None
        ruled = self._batch in AGAIN[2:] and any(
            v.has_units and v.is_ruled_by_eps for v in (self.verdict or {}).values()
        )
        if still_open - self._open or (again and (self.verdict is None or still_open)) or ruled:
            self._due = "now"
        elif still_open and new and self._stepped:
            self._due = "last"  # a player that steps seldom has done so in that batch
        self._stepped |= new
        self._open, self._epoch = still_open, epoch

    def ask(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, *, observe: bool
    ) -> Verdict | None:
        """What is known by now; the same object as long as nothing new is.

        Args:
            trainer: The Trainer.
            pl_module: Its module.
            batch: The coming batch.
            batch_idx: Its number.
            observe: Watch gradients of training where nothing can be found out otherwise.
        """
        if self._due is not None:
            asked = self._last if self._due == "last" else (batch, batch_idx)
            self._due = None
            give_up = self._batch >= AGAIN[-1]
            found = probe(trainer, pl_module, *asked, give_up=give_up, again=bool(self.verdict))
            if found is not None:
                self._learn(found, "Scale invariance")
            self._open = self._unknown(trainer)
        self._last = (few_samples(batch), batch_idx) if self._open else (None, 0)
        if observe and (not self.verdict or self.observer is not None):
            self._observe(trainer)
        return self.verdict

    def lose(self, lost: Collection[str]) -> None:
        """Note that units have turned out to be no longer scale-invariant."""
        self.verdict = without(self.verdict or {}, lost)

    def _learn(self, found: Verdict, whence: str) -> None:
        known = self.verdict or {}
        new = {name: v for name, v in found.items() if name not in known or _says_more(v, known[name])}
        if not new and self.verdict is not None:
            return
        self.verdict = {**known, **new}
        if new:
            also = f" New: {listed(list(new), 5)}." if known else ""
            rank_zero_info(f"{whence}: {summarize(self.verdict)}{also}")

    def _observe(self, trainer: Trainer) -> None:
        if self.observer is None:
            self.observer = GradientObserver(self.named, observer_limits(trainer))
            self._dispatcher.subscribe(self.observer)
        elif self.observer.done > self._observed:
            self._observed = self.observer.done
            self._learn(same_on_all_ranks(trainer, self.observer.verdict()), "Scale invariance, from gradients")

    def _unknown(self, trainer: Trainer) -> set[str]:
        """Names of parameters that are trained, and of which nothing is known that a probe could find out."""
        if self._read is not self.verdict:  # not in every batch
            self._read = self.verdict
            unknown = {n: v for n, v in (self.verdict or {}).items() if v.is_unknown}
            self._candidates = {name for name, v in unknown.items() if v.evidence != "observer"}
        if not self._candidates:
            return set()
        trained = {p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
        return {name for name, p, _ in self.named if name in self._candidates and p.requires_grad and p in trained}


def _says_more(new: ScaleInvariance, old: ScaleInvariance) -> bool:
    """Whether something unknown is known now, or an eps has gained or lost its rule, as weights grow and shrink."""
    if old.is_unknown:
        return not new.is_unknown
    return old.has_units and old.holds and new.has_units and new.is_ruled_by_eps != old.is_ruled_by_eps


def without(verdict: Verdict, lost: Collection[str]) -> Verdict:
    """A verdict in which some units no longer hold; the verdict itself where that is said already."""
    if not any(name in verdict and verdict[name].holds for name in lost):
        return verdict
    return {name: replace(v, holds=False) if name in lost else v for name, v in verdict.items()}
