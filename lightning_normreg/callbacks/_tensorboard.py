"""What TensorBoard gets besides curves: a layout in which one chart has all layers, hyperparameters, histograms."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from lightning_normreg import _metrics
from lightning_normreg._metrics import Curve

SUB_RUN = "normreg"

CHARTS: dict[str, tuple[Curve, ...]] = {
    "effective learning rate": (_metrics.EFFECTIVE_LR,),
    "rotation per step, and at equilibrium": (_metrics.ROTATION, _metrics.EQUILIBRIUM_ROTATION),
    "unit norm": (_metrics.UNIT_NORM_RMS,),
    "effective learning rate, layers that are not scale-invariant": (_metrics.EFFECTIVE_LR_NOT_INVARIANT,),
}
"""Charts with a line of each layer."""
MARGINS: dict[str, Curve] = {
    "effective learning rate over its first value, all layers": _metrics.EFFECTIVE_LR,
    "rotation per step, all layers": _metrics.ROTATION,
    "rotation over its prediction, layers that have one": _metrics.EQUILIBRIUM_RATIO,
    "unit norm, all layers": _metrics.UNIT_NORM_RMS,
}
"""Charts of the median over layers, with a margin from the minimum to the maximum."""


def layout(prefix: str = _metrics.PREFIX, logger_prefix: str = "") -> dict[str, dict[str, list[Any]]]:
    """The layout, as ``SummaryWriter.add_custom_scalars`` takes it."""
    start = "^" + re.escape(
        logger_prefix
    )  # TensorBoard reads the tags of lines as regexes, those of margins as they are
    charts: dict[str, list[Any]] = {}
    for title, curves in CHARTS.items():
        charts[title] = ["Multiline", [start + re.escape(_metrics.tag(curve, "", prefix)) for curve in curves]]
    for title, curve in MARGINS.items():
        tags = [f"{logger_prefix}{_metrics.summary_tag(curve, s, prefix)}" for s in ("median", "min", "max")]
        charts[title] = ["Margin", tags]
    return {"normalization": charts}


def write_beside(logger: Any, prefix: str, hyperparameters: Mapping[str, str | float]) -> None:
    """Write layout and hyperparameters beside a TensorBoard logger's own run; any other logger is left alone.

    In a sub-run of their own: a second layout in one run replaces the first, which may be the user's, while TensorBoard
    merges the layouts of different runs; and of hyperparameters the first in a run are the only ones that are shown.
    So the row of this run has the user's, too.
    """
    experiment = getattr(logger, "experiment", None)
    directory = getattr(experiment, "log_dir", None)
    if callable(getattr(experiment, "add_custom_scalars", None)) and isinstance(directory, str):
        shown = {k: v for k, v in getattr(logger, "hparams", {}).items() if isinstance(v, (str, int, float))}
        with SummaryWriter(str(Path(directory) / SUB_RUN)) as writer:
            writer.add_custom_scalars(layout(prefix, tag_prefix(logger)))
            writer.add_hparams({**shown, **hyperparameters}, {}, run_name=".")


def tag_prefix(logger: Any) -> str:
    """What a logger puts in front of every tag."""
    prefix = getattr(logger, "_prefix", "")
    return f"{prefix}{logger.LOGGER_JOIN_CHAR}" if prefix else ""


def takes_histograms(logger: Any) -> bool:
    """Whether a logger has histograms as TensorBoard has them."""
    return callable(getattr(getattr(logger, "experiment", None), "add_histogram", None))


def write_histograms(logger: Any, values: Mapping[str, Tensor], step: int) -> None:
    """One histogram for each tag, of its finite values."""
    for tag, numbers in values.items():
        finite = numbers[numbers.isfinite()]
        if takes_histograms(logger) and finite.numel():
            logger.experiment.add_histogram(f"{tag_prefix(logger)}{tag}", finite, step)
