"""One TensorBoard layout for all monitors, in which one chart shows the curves of all layers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from lightning_normreg import _metrics
from lightning_normreg._metrics import SUMMARY_GROUP, Curve

CHARTS: dict[str, Curve] = {
    "effective learning rate": _metrics.EFFECTIVE_LR,
    "rotation per step": _metrics.ANGULAR_UPDATE,
    "unit norm": _metrics.UNIT_NORM_RMS,
    "effective learning rate, layers that are not scale-invariant": _metrics.EFFECTIVE_LR_NOT_INVARIANT,
}


def layout(prefix: str = "") -> dict[str, dict[str, list[Any]]]:
    """The layout, as ``SummaryWriter.add_custom_scalars`` takes it. TensorBoard reads every tag as a regex.

    Args:
        prefix: What the logger puts in front of every tag.
    """
    start = re.escape(prefix)
    layers = {title: ["Multiline", [f"^{start}{curve.key}/"]] for title, curve in CHARTS.items()}
    over = {
        f"{title}, over layers": [
            "Margin",
            [f"^{start}{SUMMARY_GROUP}/{curve.summary}_{s}$" for s in ("median", "min", "max")],
        ]
        for title, curve in CHARTS.items()
        if curve.summary
    }
    return {"normalization": layers | over}


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
