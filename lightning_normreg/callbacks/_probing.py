"""One verdict on scale invariance for all callbacks of a Trainer: given, restored, or probed at the first batch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lightning_normreg._symmetries import (
    NARROW_OBSERVER,
    WIDE_OBSERVER,
    ObserverThresholds,
    ProbeError,
    find_scale_invariance,
    load_verdict,
    verdict_to_dict,
)
from lightning_normreg._weights import Verdict, is_sharded, summarize
from lightning_normreg.steps._observer import GradientObserver

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

SAMPLES = 4
LONG_SECONDS = 2.0
LARGEST = 500_000_000
"""Parameters of a model that is still copied: the probe takes five times their memory in float64."""


def probe(trainer: Trainer, pl_module: LightningModule, batch: Any) -> Verdict:
    """Ask the module's own ``training_step`` on a few samples; every rank takes what rank 0 finds, empty if nothing."""
    started = time.perf_counter()
    try:
        verdict = _on_few_samples(pl_module, batch)
        seconds = time.perf_counter() - started
        took = f" (the probe took {seconds:.0f} s)" if seconds > LONG_SECONDS else ""
        rank_zero_info(f"Scale invariance: {summarize(verdict)}{took}")
    except Exception as error:  # whatever the user's code raises on a copy, or memory: training must go on
        verdict = {}
        rank_zero_warn(
            f"Which weights are scale-invariant could not be found out on a private copy: {error} Monitors watch the "
            f"gradients of the first {GradientObserver.STEPS[-1] + 1} optimizer steps instead, which is weaker "
            "evidence and never enough to project; their curves begin after that. The remedy: invariance=, a verdict "
            "from find_scale_invariance(module, forward=…) on this model or a small copy, saved by save_verdict."
        )
    return same_on_all_ranks(trainer, verdict)


def same_on_all_ranks(trainer: Trainer, verdict: Verdict) -> Verdict:
    """The verdict of rank 0."""
    plain: dict[str, Any] = trainer.strategy.broadcast(verdict_to_dict(verdict))
    return load_verdict(plain)


def observer_limits(trainer: Trainer) -> ObserverThresholds:
    """How small is zero, in the precision that gradients are computed in."""
    return WIDE_OBSERVER if trainer.precision in ("32-true", "64-true") else NARROW_OBSERVER


def say_lost(lost: Mapping[str, float]) -> None:
    """Warn of parameters that are no longer scale-invariant, with the statistic that says so."""
    if lost:
        names = ", ".join(f"{name!r} (T = {statistic:.2g})" for name, statistic in lost.items())
        rank_zero_warn(
            f"No longer scale-invariant: {names}. Their gradients have left the right angle: a normalization was "
            "frozen, the loss has changed, or the weights are so small that eps takes over. Their effective learning "
            "rates mean nothing from here on, and projecting them changes the function. Start a new fit, which asks "
            "again, or leave them out by `exclude`."
        )


def few_samples(batch: Any) -> Any:
    """The first samples of a batch of plain values and tensors that agree on their number; any other one as it is."""
    leaves = tree_leaves(batch)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not all(isinstance(leaf, (Tensor, bool, int, float, str, type(None))) for leaf in leaves):
        return batch
    lengths = {t.shape[0] if t.ndim else 0 for t in tensors}
    if len(lengths) != 1 or lengths == {0}:
        return batch
    return tree_map(lambda leaf: leaf[:SAMPLES] if isinstance(leaf, Tensor) else leaf, batch)


def _on_few_samples(pl_module: LightningModule, batch: Any) -> Verdict:
    size = sum(p.numel() for p in pl_module.parameters())
    if size > LARGEST:
        raise ProbeError(f"{size / 1e6:.0f} million parameters are too many to probe on a copy.")
    if any(is_sharded(p) for p in pl_module.parameters()):
        raise ProbeError("The model is sharded, so no process has all of it.")
    few = few_samples(batch)
    try:
        return find_scale_invariance(pl_module, few)
    except ProbeError:
        if few is batch:
            raise
        return find_scale_invariance(pl_module, batch)  # a loss that wants the whole batch
