"""One verdict on scale invariance for all callbacks of a Trainer: given, restored, or probed at the first batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lightning_normreg._symmetries import (
    MOST,
    NARROW_OBSERVER,
    WIDE_OBSERVER,
    NoLossError,
    ObserverThresholds,
    OwnStep,
    ProbeError,
    Symmetries,
    find_in_place,
    find_scale_invariance,
    find_symmetries,
    find_symmetries_in_place,
    load_verdict,
    passes_needed,
    verdict_to_dict,
)
from lightning_normreg._weights import Verdict, is_sharded, named_roles
from lightning_normreg.steps._observer import GradientObserver

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

SAMPLES = 4
LONG_SECONDS = 2.0
LARGEST = 500_000_000
"""Parameters of a model that is still copied, which takes five times their memory in float64; else in place."""


def probe(
    trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, *, give_up: bool, again: bool
) -> Verdict | None:
    """Ask the module's own ``training_step`` on a few samples; every rank takes what rank 0 finds, empty if nothing.

    None where another batch may tell: this one has no loss, and it is not yet time to ``give_up``. Where something was
    found out before (``again``), nothing is lost by a probe that fails.
    """
    started = time.perf_counter()
    verdict: Verdict | None = {}
    try:
        verdict = _on_few_samples(pl_module, batch, _asking(trainer, pl_module, batch_idx))
        seconds = time.perf_counter() - started
        if seconds > LONG_SECONDS:
            rank_zero_info(f"The probe for scale invariance took {seconds:.0f} s.")
    except Exception as error:  # whatever the user's code raises on a copy, or memory: training must go on
        if isinstance(error, NoLossError) and not give_up:
            verdict = None
        elif again:
            rank_zero_info(f"What is unknown of scale invariance could not be asked again: {error}")
        else:
            rank_zero_warn(
                f"Which weights are scale-invariant could not be found out by a probe: {error} Monitors watch "
                f"the gradients of the first {GradientObserver.STEPS[-1] + 1} optimizer steps instead, which is weaker "
                "evidence and never enough to project; their curves begin after that. The remedy: invariance=, a "
                "verdict from find_scale_invariance(module, forward=…) on this model or a small copy, saved by "
                "save_verdict."
            )
    plain = trainer.strategy.broadcast(None if verdict is None else verdict_to_dict(verdict))
    return None if plain is None else load_verdict(plain)


def probe_symmetries(
    trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
) -> tuple[Symmetries | None, list[str]]:
    """All scaling symmetries of the module's own ``training_step`` on a few samples; every rank takes rank 0's.

    None where it would take too many passes, or fails, with a sentence that says so.
    """
    passes = passes_needed(pl_module)
    how = (
        "Write find_symmetries(module, batch).save(path) on this model or a small copy, and pass the path as "
        "`symmetries`, as in NormSummary(symmetries=path)."
    )
    if passes > MOST:
        return None, [f"Which tensors may only be rescaled together was not asked, as that is {passes} passes. {how}"]
    started, found, why = time.perf_counter(), None, ""
    try:
        bar = trainer.progress_bar_callback is not None
        if can_be_copied(pl_module):
            found = find_symmetries(pl_module, few_samples(batch), forward=OwnStep(batch_idx), progress=bar)
        else:
            step = OwnStep(batch_idx, through=trainer.strategy.training_step)
            outer = trainer.model or pl_module
            found = find_symmetries_in_place(pl_module, few_samples(batch), step, outer=outer, progress=bar)
    except Exception as error:  # as in `probe`: training must go on
        why = f"Which tensors may only be rescaled together could not be found out: {error} {how}"
    if time.perf_counter() - started > LONG_SECONDS:
        rank_zero_info(f"The probe for scaling symmetries took {time.perf_counter() - started:.0f} s.")
    plain = trainer.strategy.broadcast(None if found is None else found.to_dict())
    return (None, [why] if why else []) if plain is None else (Symmetries.load(plain), [])


def same_on_all_ranks(trainer: Trainer, verdict: Verdict) -> Verdict:
    """The verdict of rank 0."""
    plain: dict[str, Any] = trainer.strategy.broadcast(verdict_to_dict(verdict))
    return load_verdict(plain)


def observer_limits(trainer: Trainer) -> ObserverThresholds:
    """How small is zero, in the precision that gradients are computed in."""
    return WIDE_OBSERVER if trainer.precision in ("32-true", "64-true") else NARROW_OBSERVER


def say_lost(lost: Mapping[str, float]) -> None:
    """Warn of parameters that are no longer scale-invariant, with the statistic that says so."""
    names = ", ".join(f"{name!r} (T = {statistic:.2g})" for name, statistic in lost.items())
    rank_zero_warn(
        f"No longer scale-invariant: {names}. Their gradients have left the right angle: a normalization was frozen, "
        "the loss has changed, or the weights are so small that eps takes over. From here on their effective learning "
        "rates mean nothing by themselves and are logged as effective_lr_not_invariant."
    )


def few_samples(batch: Any) -> Any:
    """The first samples of a batch of plain values and tensors that agree on their number; any other one as it is."""
    leaves = tree_leaves(batch)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not all(isinstance(leaf, (Tensor, bool, int, float, str, type(None))) for leaf in leaves):
        return batch
    lengths = {t.shape[0] if t.ndim else 0 for t in tensors}
    if len(lengths) != 1 or max(lengths) <= SAMPLES:
        return batch
    return tree_map(lambda leaf: leaf[:SAMPLES] if isinstance(leaf, Tensor) else leaf, batch)


def can_be_copied(pl_module: LightningModule) -> bool:
    """Whether this process has all of a module, and memory for more of it."""
    parameters = list(pl_module.parameters())
    return sum(p.numel() for p in parameters) <= LARGEST and not any(map(is_sharded, parameters))


def _asking(trainer: Trainer, pl_module: LightningModule, batch_idx: int) -> Callable[[Any], Verdict]:
    """How the model is asked of a batch: on a private copy, or in place where it is sharded or too large for that."""
    bar = trainer.progress_bar_callback is not None  # enable_progress_bar=False is meant for all of them
    if can_be_copied(pl_module):
        return lambda batch: find_scale_invariance(pl_module, batch, forward=OwnStep(batch_idx), progress=bar)
    step = OwnStep(batch_idx, through=trainer.strategy.training_step)
    return lambda batch: find_in_place(pl_module, batch, step, outer=trainer.model or pl_module, progress=bar)


def _on_few_samples(pl_module: LightningModule, batch: Any, ask: Callable[[Any], Verdict]) -> Verdict:
    few = few_samples(batch)
    try:
        verdict = ask(few)
    except ProbeError:
        if few is batch:
            raise
        return ask(batch)  # a loss that wants the whole batch
    trained = {name for name, p, _ in named_roles(pl_module) if p.requires_grad}
    if few is not batch and any(v.is_unknown for name, v in verdict.items() if name in trained):
        whole = ask(batch)  # experts that few samples do not reach
        return {name: whole[name] if v.is_unknown else v for name, v in verdict.items()}
    return verdict
