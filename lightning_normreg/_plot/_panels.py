"""What a page can show of a run: lines of layers over steps, and heat maps of layers × steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_normreg import _metrics
from lightning_normreg._compat import optional_import
from lightning_normreg._metrics import EQUILIBRIUM_TOLERANCE, Curve
from lightning_normreg._plot._run import LoggedRun
from lightning_normreg._plot._style import Depth, axis_label, log_axis, set_log_ticks, spread, step_axis

if TYPE_CHECKING:
    import pandas as pd

MANY_TARGETS = 4
"""Predictions that differ between layers up to which each has a line of its own."""
POINTS = 1000
"""Points of a line above which it is drawn as its extremes."""
PREDICTED = "tab:red"
BAND = f"±{EQUILIBRIUM_TOLERANCE:.0%}"
DEEP = 16
"""Layers from which on a page has heat maps."""
COLUMNS = 500
"""Steps in a heat map; of more the geometric mean over neighbours is shown."""


@dataclass(frozen=True)
class Panel:
    """One picture of all layers."""

    title: str
    curve: Curve  # one line of each layer
    target: Curve | None = None  # what the lines are expected to come to
    tolerance: float = 0.0  # relative width of the band around the target
    constant: float | None = None  # a target that is a number
    planned: Curve | None = None  # what a plan has for the lines
    of_summary: bool = False  # shows the summary alone, because that is of another quantity

    @property
    def label(self) -> str:
        return "η / $n^p$ over its first value [1]" if self.of_summary else axis_label(self.curve)

    def is_of(self, run: LoggedRun) -> bool:
        if self.of_summary:
            return run.summary(self.curve) is not None and run.is_partial(_metrics.ROTATION)
        compared = self.curve is not _metrics.EFFECTIVE_LR and run.summary(self.curve) is not None
        return bool(run.layers(self.curve)) or compared


PANELS = (
    Panel("effective learning rate", _metrics.EFFECTIVE_LR),
    Panel("effective learning rate, all layers", _metrics.EFFECTIVE_LR, of_summary=True),
    Panel("unit norm", _metrics.UNIT_NORM_RMS, _metrics.EQUILIBRIUM_NORM, planned=_metrics.PLANNED_NORM),
    Panel(
        "rotation per step",
        _metrics.ROTATION,
        _metrics.EQUILIBRIUM_ROTATION,
        EQUILIBRIUM_TOLERANCE,
        planned=_metrics.PLANNED_ROTATION,
    ),
    Panel("rotation over its prediction", _metrics.EQUILIBRIUM_RATIO, None, EQUILIBRIUM_TOLERANCE, constant=1.0),
)
NOT_INVARIANT = Panel("effective learning rate, not scale-invariant", _metrics.EFFECTIVE_LR_NOT_INVARIANT)


def panels_of(runs: Sequence[LoggedRun]) -> list[Panel]:
    found = [panel for panel in PANELS if any(panel.is_of(run) for run in runs)]
    if not any(run.layers(_metrics.EFFECTIVE_LR) for run in runs) and any(NOT_INVARIANT.is_of(run) for run in runs):
        found.insert(0, NOT_INVARIANT)
    return found


def draw(axes: Any, panel: Panel, run: LoggedRun, depth: Depth) -> None:
    shown: list[pd.Series[float]] = []
    if panel.of_summary or (panel.curve is not _metrics.EFFECTIVE_LR and run.is_partial(panel.curve)):
        shown += _draw_summary(axes, run.summary(panel.curve))
    if not panel.of_summary:
        lines = run.lines(panel.curve)
        _draw_lines(axes, lines, set(run.layers(_metrics.EFFECTIVE_LR_NOT_INVARIANT)), depth)
        shown += lines.values()
    shown += _draw_target(axes, panel, run, depth)
    planned = {} if panel.planned is None else run.lines(panel.planned)
    for layer, values in planned.items():
        axes.plot(values.index, values, color=depth[layer], linewidth=0.9, linestyle="-.")
    if planned:
        axes.plot([], [], color="0.3", linewidth=0.9, linestyle="-.", label="planned")
    shown += planned.values()
    positive = [part for values in shown if len(part := values[values > 0])]
    if positive:
        log_axis(axes, min(part.min() for part in positive), max(part.max() for part in positive))
    step_axis(axes)


def _draw_lines(axes: Any, lines: Mapping[str, pd.Series[float]], dotted: set[str], depth: Depth) -> None:
    """One line of each layer; dotted those that are not scale-invariant."""
    thin = 1.3 if len(lines) <= 12 else 0.8 if len(lines) <= 60 else 0.5
    for layer, values in lines.items():
        points = _extremes(values)
        axes.plot(
            points.index,
            points,
            color=depth[layer],
            linestyle=":" if layer in dotted else "-",
            linewidth=thin,
            marker="." if len(values) < 3 else "",
            label=depth.labels[layer] if depth.is_listed else "",
        )
    if dotted & lines.keys():
        axes.plot([], [], color="0.3", linestyle=":", label="not scale-invariant")


def _draw_summary(axes: Any, summary: pd.DataFrame | None) -> list[pd.Series[float]]:
    if summary is None:
        return []
    axes.fill_between(summary.index, summary["min"], summary["max"], color="0.85", label="all layers, min to max")
    axes.plot(summary.index, summary["median"], color="0.45", linewidth=1.3, label="all layers, median")
    return [summary[name] for name in _metrics.STATISTICS]


def _draw_target(axes: Any, panel: Panel, run: LoggedRun, depth: Depth) -> list[pd.Series[float]]:
    """What is predicted, with its band."""
    if panel.constant is not None:
        low, high = panel.constant * (1 - panel.tolerance), panel.constant * (1 + panel.tolerance)
        axes.axhline(panel.constant, color=PREDICTED, linestyle="--", linewidth=1, zorder=4)
        axes.axhspan(low, high, color=PREDICTED, alpha=0.2, linewidth=0, zorder=3, label=f"prediction {BAND}")
        return [optional_import("pandas").Series([low, high])]
    lines = {} if panel.target is None else run.lines(panel.target)
    if not lines or panel.target is None:
        return []
    name = f"at equilibrium, {panel.target.symbol}"
    if not panel.tolerance:  # each layer has its own
        for layer, values in lines.items() if depth.is_listed else ():
            points = _extremes(values)
            axes.plot(points.index, points, color=depth[layer], linewidth=0.9, linestyle="--")
        if depth.is_listed:
            axes.plot([], [], color="0.3", linewidth=0.9, linestyle="--", label=name)
        return list(lines.values()) if depth.is_listed else []
    table = optional_import("pandas").DataFrame(lines)
    rounded = table.map(lambda value: float(f"{value:.4g}")).T.drop_duplicates().index
    middles = [table[layer].dropna() for layer in rounded]
    bands = [(values, values) for values in middles]
    if len(middles) > MANY_TARGETS:
        middles, bands = [table.median(axis=1)], [(table.min(axis=1), table.max(axis=1))]
    for low, high in bands:
        bounds = low * (1 - panel.tolerance), high * (1 + panel.tolerance)
        axes.fill_between(low.index, *bounds, color=PREDICTED, alpha=0.2, linewidth=0, zorder=3, label=f"{name} {BAND}")
    for values in middles:
        axes.plot(values.index, values, color=PREDICTED, linestyle="--", linewidth=1, zorder=4)
    return [part * (1 + sign * panel.tolerance) for pair in bands for part, sign in zip(pair, (-1, 1), strict=True)]


def _extremes(values: pd.Series[float]) -> pd.Series[float]:
    """The smallest and the largest of every so many points, so that no peak is lost."""
    if len(values) <= POINTS:
        return values
    stride = -(-len(values) // (POINTS // 2))
    numbers = values.to_numpy()
    parts = [(start, numbers[start : start + stride]) for start in range(0, len(values), stride)]
    places = {start + int(place) for start, part in parts for place in (part.argmin(), part.argmax())}
    return values.iloc[sorted(places)]


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
            _draw_cells(axes, table, scale, colours)
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


def _draw_cells(axes: Any, table: pd.DataFrame, scale: Any, colours: str) -> None:
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
