"""What the first run ends with: a table, a picture, and where to look further."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from lightning_normreg import _metrics
from lightning_normreg._history import optional_import
from lightning_normreg._metrics import Curve

if TYPE_CHECKING:
    import pandas as pd

SHOWN: dict[str, Curve] = {
    "unit norm": _metrics.UNIT_NORM_RMS,
    "effective learning rate": _metrics.EFFECTIVE_LR,
    "rotation per step": _metrics.ANGULAR_UPDATE,
}


def layers(history: pd.DataFrame) -> list[str]:
    """Names of the layers in a history, in its order."""
    names = [column.partition("/") for column in history.columns]
    return list(dict.fromkeys(name for key, _, name in names if key == _metrics.UNIT_NORM_RMS.key))


def summary_table(history: pd.DataFrame) -> Table:
    """Per layer the first and the last value of each curve."""
    table = Table(title="What the run did to each layer, first → last logged step")
    table.add_column("layer")
    for title in SHOWN:
        table.add_column(title, justify="right")
    for layer in layers(history):
        table.add_row(layer, *(_first_last(history, curve, layer) for curve in SHOWN.values()))
    return table


def _first_last(history: pd.DataFrame, curve: Curve, layer: str) -> str:
    column = _metrics.tag(curve, layer)
    if column not in history:
        return "not scale-invariant"
    values = history[column].dropna()
    return f"{values.iloc[0]:.3g} → {values.iloc[-1]:.3g}"


def save_picture(history: pd.DataFrame, path: Path, titles: Sequence[str] = tuple(SHOWN)) -> None:
    """Draw the curves of all layers over the steps."""
    figure_type = optional_import("matplotlib.figure").Figure
    figure = figure_type(figsize=(4.2 * len(titles), 3.6), layout="constrained")
    for axes, title in zip(figure.subplots(1, len(titles), squeeze=False)[0], titles, strict=True):
        for number, layer in enumerate(layers(history)):
            column = _metrics.tag(SHOWN[title], layer)
            if column in history:
                values = history[["step", column]].dropna()
                axes.plot(values.iloc[:, 0], values.iloc[:, 1], color=f"C{number}", label=layer, linewidth=1.2)
        curve = SHOWN[title]
        axes.set(title=title, xlabel="optimizer step", ylabel=f"{curve.symbol} [{curve.unit}]", yscale="log")
        axes.grid(alpha=0.3, which="both")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize="small")
    figure.savefig(path, dpi=120)
