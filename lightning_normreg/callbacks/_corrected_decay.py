"""The callback that lets weight decay follow the learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_normreg._weights import Verdict, strong
from lightning_normreg.callbacks._run import optimizers_of, run_of
from lightning_normreg.callbacks._selecting import WeightCallback
from lightning_normreg.steps._decay_corrector import DecayCorrector, PeakLR
from lightning_normreg.steps._targets import OnNotInvariant, choose_targets

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer


class CorrectedDecay(WeightCallback):
    r"""Decays scale-invariant weights in proportion to the learning rate: :math:`\lambda_t=\lambda\eta_t/\eta_{\max}`.

    The norm at which decay and updates balance is proportional to a power of η/λ (1/4 for SGD, 1/2 for AdamW), so under
    a learning-rate schedule it moves, far too slowly to keep up, and the effective learning rate at the end of training
    is not what the schedule says. With this correction the equilibrium norm stays put, and the schedule is that of the
    rotation, to the first power. Weights that are not scale-invariant keep their decay: there it regularizes.

    When it runs: around each optimizer step, for whose length the weights have parameter groups of their own.

    What it logs: nothing.

    What it costs: two groups instead of one in each step of an optimizer.

    Args:
        peak_lr: η_max, the learning rate at which decay is what the optimizer was given; ``"auto"``: the group's
            ``max_lr`` (one-cycle and cyclic schedules), else its ``initial_lr`` (all others).
        include: Globs over clean parameter names; by default all weights and embeddings that are scale-invariant. A
            glob that matches nothing, or a weight that is not scale-invariant, is an error.
        exclude: Globs of parameters to leave out.
        invariance: Which units are scale-invariant, as a file of ``save_verdict`` or what is in it; by default the
            model is probed at the first batch (:func:`find_scale_invariance`), once for all callbacks.

    Raises:
        ValueError: For an argument out of its range, no scale-invariant weight, or an optimizer that is not known;
            before the first step.

    Examples:
        >>> from pytorch_lightning import Trainer
        >>> trainer = Trainer(callbacks=[CorrectedDecay()], logger=False)

    Reference:
        Defazio 2025, https://arxiv.org/abs/2506.02285 (AdamC, and its form for SGD).
    """

    def __init__(
        self,
        peak_lr: PeakLR = "auto",
        *,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        invariance: str | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__("auto", include, exclude, invariance)
        if peak_lr != "auto" and not (isinstance(peak_lr, (int, float)) and 0 < peak_lr < math.inf):
            raise ValueError(f"`peak_lr` must be 'auto' or a positive number, got {peak_lr!r}.")
        self.peak_lr = peak_lr

    def _reset(self) -> None:
        super()._reset()
        self._corrector: DecayCorrector | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the selection before anything is trained."""
        super().on_fit_start(trainer, pl_module)
        self._selected(trainer)

    def _begin(self, trainer: Trainer, pl_module: LightningModule, verdict: Verdict) -> None:
        verdict = strong(verdict)
        watched = self._known(trainer, verdict)
        if self._waiting and not any(w.invariant for w in watched):
            return
        otherwise: OnNotInvariant = "skip" if run_of(trainer).dispatcher.has_seen_updates else "raise"
        targets = choose_targets(watched, verdict, named=self.include is not None, otherwise=otherwise)
        if self._corrector is None:
            self._corrector = self._subscribe(trainer, DecayCorrector(targets, self.peak_lr))
        else:
            self._corrector.aim(targets)
        for optimizer in optimizers_of(trainer):
            self._corrector.check(optimizer)
        rank_zero_info(
            f"CorrectedDecay: the decay of {len(targets)} scale-invariant weights is proportional to lr/lr_max."
        )

    def _end(self, trainer: Trainer) -> None:
        if self._corrector is not None:
            self._corrector.restore()
        super()._end(trainer)
