"""Heat maps of layers × steps, for models with more layers than lines can tell apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_normreg import _metrics
from lightning_normreg._compat import optional_import
from lightning_normreg._metrics import Curve
from lightning_normreg._plot._run import LoggedRun
from lightning_normreg._plot._style import Depth, axis_label, set_log_ticks, spread, step_axis

if TYPE_CHECKING:
    import pandas as pd

DEEP = 16
"""Layers from which on a page has heat maps."""
COLUMNS = 500
"""Steps in a heat map; of more the geometric mean over neighbours is shown."""


@dataclass(frozen=True)
class HeatMap:
    """One picture of layers × steps."""

    title: str
    curve: Curve  # one row of each layer
    relative: bool = False  # divided by its first positive value

    @property
    def label(self) -> str:
        label = axis_label(self.curve)
        return f"{label.partition(' [')[0]} over its first [1]" if self.relative else label

    def table(self, run: LoggedRun) -> pd.DataFrame:
        """Positive values, a row for each step."""
        found: pd.DataFrame = optional_import("pandas").DataFrame(run.lines(self.curve)).sort_index()
        found = found[found > 0]
        if self.relative and len(found):
            found = found / found.bfill().iloc[0]
        return found


HEAT_MAPS = (
    HeatMap("rotation per step", _metrics.ROTATION),
    HeatMap("effective learning rate over its first value", _metrics.EFFECTIVE_LR, relative=True),
)


def heat_maps_of(runs: Sequence[LoggedRun]) -> list[HeatMap]:
    return [h for h in HEAT_MAPS if any(len(run.layers(h.curve)) > DEEP and _has_any(h.table(run)) for run in runs)]


def draw_heat_map(figure: Any, row: Sequence[Any], heat_map: HeatMap, runs: Sequence[LoggedRun], depth: Depth) -> None:
    """Draw one heat map of each run, with one colour bar for all."""
    colors = optional_import("matplotlib.colors")
    tables = [heat_map.table(run) for run in runs]
    extremes = [(table.min().min(), table.max().max()) for table in tables if _has_any(table)]
    low, high = min(e[0] for e in extremes), max(e[1] for e in extremes)
    if heat_map.relative:
        high = max(high, 1 / low, 1.01)
        low = 1 / high
    scale = colors.LogNorm(low, max(high, low * 1.01))
    colours = "RdBu_r" if heat_map.relative else "magma"
    for axes, table in zip(row, tables, strict=True):
        if _has_any(table):
            _draw(axes, table, scale, colours)
        named = axes is row[0] or list(table.columns) != list(tables[0].columns)
        places = spread(len(table.columns))
        names = [depth.labels[table.columns[place]] for place in places] if named else [""] * len(places)
        axes.set_yticks(places, names, fontsize="x-small")
        axes.set_ylabel("layer, by depth")
        step_axis(axes)
    mappable = optional_import("matplotlib.cm").ScalarMappable(scale, colours)
    bar = figure.colorbar(mappable, ax=list(row), label=heat_map.label, fraction=0.03, pad=0.01)
    set_log_ticks(bar.ax.yaxis, scale.vmin, scale.vmax)
    bar.minorticks_off()


def _has_any(table: pd.DataFrame) -> bool:
    return bool(table.notna().to_numpy().any())


def _draw(axes: Any, table: pd.DataFrame, scale: Any, colours: str) -> None:
    numpy = optional_import("numpy")
    stride = -(-len(table) // COLUMNS)
    if stride > 1:
        groups = numpy.arange(len(table)) // stride
        middles = table.index.to_series().groupby(groups).mean()
        table = numpy.exp(numpy.log(table).groupby(groups).mean()).set_index(middles)
    steps = table.index.to_numpy(float)
    half = numpy.diff(steps) / 2
    first, last = (half[0], half[-1]) if len(half) else (0.5, 0.5)
    edges = numpy.concatenate([[steps[0] - first], steps[:-1] + half, [steps[-1] + last]])
    rows = numpy.arange(len(table.columns) + 1) - 0.5
    axes.pcolormesh(edges, rows, table.T, norm=scale, cmap=colours, rasterized=True)
    axes.invert_yaxis()
