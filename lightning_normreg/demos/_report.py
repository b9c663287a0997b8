"""The table that the first run ends with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from lightning_normreg import _metrics
from lightning_normreg._metrics import Curve

if TYPE_CHECKING:
    import pandas as pd

SHOWN: dict[str, Curve] = {
    "unit norm": _metrics.UNIT_NORM_RMS,
    "effective learning rate": _metrics.EFFECTIVE_LR,
    "rotation per step": _metrics.ROTATION,
}


def first_and_last_table(history: pd.DataFrame) -> Table:
    """Per layer the first and the last value of each curve."""
    table = Table(title="What the run did to each layer, first → last logged step")
    table.add_column("layer")
    for title in SHOWN:
        table.add_column(title, justify="right")
    start = _metrics.tag(_metrics.UNIT_NORM_RMS, "")
    for column in history.columns[history.columns.str.startswith(start)]:
        layer = column.removeprefix(start)
        table.add_row(layer, *(_first_last(history, curve, layer) for curve in SHOWN.values()))
    return table


def _first_last(history: pd.DataFrame, curve: Curve, layer: str) -> str:
    column = _metrics.tag(curve, layer)
    if column not in history:
        return "not scale-invariant"
    values = history[column].dropna()
    return f"{values.iloc[0]:.3g} → {values.iloc[-1]:.3g}"
