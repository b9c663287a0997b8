"""One TensorBoard layout for all monitors, in which one chart shows the curves of all layers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from lightning_normreg import _metrics
from lightning_normreg._metrics import Curve

CHARTS: dict[str, tuple[Curve, ...]] = {
    "effective learning rate": (_metrics.EFFECTIVE_LR,),
    "rotation per step, and at equilibrium": (_metrics.ANGULAR_UPDATE, _metrics.EQUILIBRIUM_ROTATION),
    "unit norm": (_metrics.UNIT_NORM_RMS,),
    "effective learning rate, layers that are not scale-invariant": (_metrics.EFFECTIVE_LR_NOT_INVARIANT,),
}
"""Charts with a line of each layer."""
MARGINS: dict[str, Curve] = {
    "effective learning rate over its first value, all layers": _metrics.EFFECTIVE_LR,
    "rotation per step, all layers": _metrics.ANGULAR_UPDATE,
    "rotation over its prediction, all layers": _metrics.EQUILIBRIUM_RATIO,
    "unit norm, all layers": _metrics.UNIT_NORM_RMS,
}
"""Charts of the median over layers, with a margin from the minimum to the maximum."""


def layout(prefix: str = "") -> dict[str, dict[str, list[Any]]]:
    """The layout, as ``SummaryWriter.add_custom_scalars`` takes it.

    TensorBoard reads the tags of lines as regexes, and those of margins as they are.

    Args:
        prefix: What the logger puts in front of every tag.
    """
    start = re.escape(prefix)
    lines = {title: ["Multiline", [f"^{start}{c.key}/" for c in curves]] for title, curves in CHARTS.items()}
    margins = {
        title: ["Margin", [f"{prefix}{_metrics.summary_tag(curve, s)}" for s in ("median", "min", "max")]]
        for title, curve in MARGINS.items()
    }
    return {"normalization": lines | margins}


def write_layout(logger: Any) -> None:
    """Write the layout beside a TensorBoard logger's own run; any other logger is left alone.

    In a sub-run of its own, because a second layout in one run replaces the first, and that may be the user's;
    TensorBoard merges the layouts of different runs.
    """
    experiment = getattr(logger, "experiment", None)
    directory = getattr(experiment, "log_dir", None)
    if callable(getattr(experiment, "add_custom_scalars", None)) and isinstance(directory, str):
        prefix = getattr(logger, "_prefix", "")
        with SummaryWriter(str(Path(directory) / "normreg_layout")) as writer:
            writer.add_custom_scalars(layout(f"{prefix}{logger.LOGGER_JOIN_CHAR}" if prefix else ""))
