"""The callback that lets weight decay follow the learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_normreg._optimizers import unequal
from lightning_normreg._param_groups import highest_rates
from lightning_normreg._symmetries import Symmetries
from lightning_normreg._weights import Verdict, in_words, listed, strong
from lightning_normreg.callbacks._run import optimizers_of, run_of
from lightning_normreg.callbacks._selecting import WeightCallback
from lightning_normreg.steps._decay_corrector import DecayCorrector
from lightning_normreg.steps._step_hooks import torch_optimizer
from lightning_normreg.steps._targets import OnNotInvariant

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer
    from pytorch_lightning.utilities.types import LRSchedulerConfig
    from torch.optim import Optimizer


class CorrectedDecay(WeightCallback):
    r"""Decays scale-invariant weights in proportion to the learning rate: :math:`\lambda_t=\lambda\eta_t/\eta_{\max}`.

    The norm at which decay and updates balance is proportional to a power of η/λ (1/4 for SGD, 1/2 for AdamW), so under
    a learning-rate schedule it moves, far too slowly to keep up, and the effective learning rate at the end of training
    is not what the schedule says. With this correction the equilibrium norm stays put, and the schedule is that of the
    rotation, to the first power. Weights that are not scale-invariant keep their decay: there it may do more
    (:func:`reduce_decay` says what).

    When it runs: between the closure of an optimizer's step (in Lightning the whole training step) and its arithmetic.
    Only then have the weights parameter groups of their own: your code, other hooks on the optimizer, schedulers and
    checkpoints see the groups that you made, and what they change in them is kept.

    What it logs: nothing.

    What it costs: two groups instead of one in each step of an optimizer; before the first one a copy of the scheduler
    is run ahead, at most 100 000 steps of it: below a second with a few groups, about ten seconds with fifty.

    Args:
        peak_lr: η_max, the learning rate at which decay is what the optimizer was given; ``"auto"``: of each group the
            highest that the run will reach, by torch's own schedulers run ahead over it. Where that cannot be known
            (ReduceLROnPlateau, schedulers of your own or stepped by yourself, none, a run without an end), the highest
            so far: then decay is corrected from the peak on. Which it is, and why, is said.
        unit: ``"auto"``: weights that are scale-invariant by themselves; ``"set"``: also those that are so together, as
            the residual stream's writers of a transformer are.
        include: Globs over clean parameter names; by default all weights and embeddings that are scale-invariant, or
            all with ``on_not_invariant="allow"``. A glob that matches nothing is an error.
        exclude: Globs of parameters to leave out.
        invariance: Which units are scale-invariant, as a file of ``save_verdict`` or what is in it; by default the
            model is probed at the first batch (:func:`find_scale_invariance`), once for all callbacks.
        symmetries: For ``unit="set"``, all scaling symmetries as a file of :meth:`Symmetries.save` or what is in it; by
            default they are looked for on the first batch (:func:`find_symmetries`), where 60 passes are enough.
        on_not_invariant: What to do with a weight that is not known to be scale-invariant by itself, as most are in
            transformers: ``"raise"`` if ``include`` names it, ``"skip"`` it, or ``"allow"``: correct its decay too. The
            sources do that with language models, for all that a normalization follows; leave out the head then.

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
        peak_lr: float | Literal["auto"] = "auto",
        *,
        unit: Literal["auto", "set"] = "auto",
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        invariance: str | Mapping[str, Any] | None = None,
        symmetries: str | Mapping[str, Any] | Symmetries | None = "auto",
        on_not_invariant: OnNotInvariant = "raise",
    ) -> None:
        if unit not in ("auto", "set"):
            raise ValueError(f"`unit` must be 'auto' or 'set', got {unit!r}.")
        super().__init__(unit, include, exclude, invariance, symmetries)
        if peak_lr != "auto" and not (isinstance(peak_lr, (int, float)) and 0 < peak_lr < math.inf):
            raise ValueError(f"`peak_lr` must be 'auto' or a positive number, got {peak_lr!r}.")
        if on_not_invariant not in get_args(OnNotInvariant):
            raise ValueError(f"`on_not_invariant` must be 'raise', 'skip' or 'allow', got {on_not_invariant!r}.")
        self.peak_lr = peak_lr
        self.on_not_invariant = on_not_invariant

    def _reset(self) -> None:
        super()._reset()
        self._corrector: DecayCorrector | None = None
        self._corrected: list[str] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the selection before anything is trained."""
        super().on_fit_start(trainer, pl_module)
        self._selected(trainer)

    def _begin(self, trainer: Trainer, pl_module: LightningModule, verdict: Verdict) -> None:
        try:
            allows = self.on_not_invariant == "allow"  # without names it takes what is watched by default
            named = allows or self.include is not None
            targets = self._choose(trainer, strong(verdict), self.on_not_invariant, named=named)
        except ValueError as error:
            if not run_of(trainer).dispatcher.has_seen_updates:
                raise
            targets = []  # a run that has come this far is not ended
            rank_zero_warn(f"CorrectedDecay leaves decay as it is. {error}")
        if [target.name for target in targets] == self._corrected:
            return  # what is known now is of other weights
        self._corrected = [target.name for target in targets]
        if self._corrector is not None:
            self._corrector.aim(targets)
        elif targets:
            peak = None if self.peak_lr == "auto" else float(self.peak_lr)
            self._corrector = self._subscribe(trainer, DecayCorrector(targets, peak))
        for index, optimizer in enumerate(optimizers_of(trainer)):
            mine = {p for group in optimizer.param_groups for p in group["params"]}
            its = [t for t in targets if t.parameter in mine]
            names = [t.name for t in its]
            if self._corrector is not None and names:
                self._corrector.check(optimizer)
                peaks = self._expect(self._corrector, trainer, pl_module, index)
                apart = {t.name: unequal(optimizer, t.tensors(), "lr", "weight_decay") for t in its if t.members}
                for name, keys in apart.items():
                    if keys:
                        rank_zero_warn(
                            f"The tensors of {name!r} have unequal {' and '.join(keys)}: their decay is corrected, but "
                            "the set has no equilibrium norm that stays put. Give them the same."
                        )
                others = [t.name for t in targets if t.name in names and not t.invariant]
                rank_zero_info(
                    f"CorrectedDecay: the decay of {in_words(its)} is proportional to lr/lr_max, with lr_max {peaks}."
                    + (f" Not scale-invariant by themselves: {listed(others, 5)}." if others else "")
                )

    def _expect(self, corrector: DecayCorrector, trainer: Trainer, pl_module: LightningModule, index: int) -> str:
        """Tell what the schedule will reach; the same in words."""
        if self.peak_lr != "auto":
            return f"= {self.peak_lr:.3g}"
        try:
            rates = _highest_rates(trainer, pl_module, optimizers_of(trainer)[index])
        except Exception as error:  # whatever a user's lambda raises on a step that it is not asked for in training
            return f"the highest learning rate so far ({error})"
        corrector.expect(index, rates)
        words = " to ".join(f"{rate:.3g}" for rate in sorted({min(rates), max(rates)}))
        return f"= {words} by the schedule"


def _highest_rates(trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> list[float]:
    """What the rest of the run will reach.

    Raises:
        ValueError: If that cannot be known; the message says why.
    """
    configs = [c for c in trainer.lr_scheduler_configs if _drives(c.scheduler, optimizer)]
    if not configs:
        raise ValueError("the Trainer steps no scheduler")
    own = not type(pl_module).lr_scheduler_step.__module__.startswith(("pytorch_lightning.", "lightning.pytorch."))
    if own or not pl_module.automatic_optimization:
        raise ValueError("schedulers are stepped by your own code")
    steps = trainer.estimated_stepping_batches
    if not 0 < steps < math.inf:
        raise ValueError("the run has no end")
    if trainer.num_training_batches == math.inf and any(config.interval == "epoch" for config in configs):
        raise ValueError("an epoch has no known length")
    schedulers = [(config.scheduler, partial(_is_due, trainer, config)) for config in configs]
    return highest_rates(optimizer, schedulers, range(trainer.global_step + 1, int(steps) + 1))


def _is_due(trainer: Trainer, config: LRSchedulerConfig, step: int) -> bool:
    """Whether the Trainer steps a scheduler after the optimizer's step of this number, counted from 1."""
    batches, apart = trainer.num_training_batches, trainer.accumulate_grad_batches
    in_epoch = math.inf if batches == math.inf else math.ceil(batches / apart)
    epoch, place = divmod(step - 1, in_epoch)
    if config.interval == "epoch":
        return place == in_epoch - 1 and (epoch + 1) % config.frequency == 0
    return min((place + 1) * apart, batches) % config.frequency == 0


def _drives(scheduler: Any, optimizer: Optimizer) -> bool:
    its = getattr(scheduler, "optimizer", optimizer)
    return its is optimizer or torch_optimizer(its) is optimizer
