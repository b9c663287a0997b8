"""One verdict on scale invariance for all callbacks of a Trainer: given, restored, or probed at the first batch."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lightning_normreg._invariance import (
    ProbeError,
    ScaleInvariance,
    find_scale_invariance,
    load_verdict,
    summarize,
    verdict_to_dict,
)

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

SAMPLES = 4
LONG_SECONDS = 2.0
LARGEST = 500_000_000
"""Parameters of a model that is still copied: the probe takes five times their memory in float64."""

Verdict = dict[str, ScaleInvariance]


def probe(trainer: Trainer, pl_module: LightningModule, batch: Any) -> Verdict:
    """Ask the module's own ``training_step`` on a few samples; every rank takes what rank 0 finds.

    Returns:
        The verdict, empty where the module cannot be probed, which is then said with the reason and the remedy.
    """
    started = time.perf_counter()
    try:
        verdict = _on_few_samples(pl_module, batch)
        seconds = time.perf_counter() - started
        took = f" (the probe took {seconds:.0f} s)" if seconds > LONG_SECONDS else ""
        rank_zero_info(f"Scale invariance: {summarize(verdict)}{took}")
    except Exception as error:  # whatever the user's code raises on a copy, or memory: training must go on
        verdict = {}
        rank_zero_warn(
            f"Which weights are scale-invariant could not be found out: {error} Until then every weight is watched "
            "neuron by neuron, and its effective learning rate holds only if a normalization follows it. The remedy: "
            "invariance=, a verdict from find_scale_invariance(module, forward=…), saved by save_verdict."
        )
    plain: dict[str, Any] = trainer.strategy.broadcast(verdict_to_dict(verdict))
    return load_verdict(plain)


def few_samples(batch: Any) -> Any:
    """The first samples of a batch of tensors that agree on their number; any other batch as it is."""
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    lengths = {t.shape[0] if t.ndim else 0 for t in tensors}
    if len(lengths) != 1 or lengths == {0}:
        return batch
    return tree_map(lambda leaf: leaf[:SAMPLES] if isinstance(leaf, Tensor) else leaf, batch)


def _on_few_samples(pl_module: LightningModule, batch: Any) -> Verdict:
    size = sum(p.numel() for p in pl_module.parameters())
    if size > LARGEST:
        raise ProbeError(f"{size / 1e6:.0f} million parameters are too many to probe on a copy.")
    few = few_samples(batch)
    try:
        return find_scale_invariance(pl_module, few)
    except ProbeError:
        if few is batch:
            raise
        return find_scale_invariance(pl_module, batch)  # a loss that wants the whole batch
