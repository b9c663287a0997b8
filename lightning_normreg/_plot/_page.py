"""One page of pictures: panels of one run, or of several side by side."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from types import MethodType
from typing import TYPE_CHECKING, Any

from lightning_normreg._compat import optional_import
from lightning_normreg._plot._panels import Panel, draw, draw_heat_map, heat_maps_of, panels_of
from lightning_normreg._plot._run import LoggedRun, all_layers, choose, runs_of
from lightning_normreg._plot._style import Depth, one_scale, short_names

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from lightning_normreg._plot._run import Source

MANY_RUNS = 8
HEIGHT, WIDTH, HEAT_HEIGHT = 2.9, 4.6, 2.6
"""Of a panel, in inches."""


def plot_curves(
    runs: Source | Mapping[str, Source],
    *,
    layers: Sequence[str] | None = None,
    title: str | None = None,
    plan: pd.DataFrame | None = None,
) -> Figure:
    """Draw the curves of all layers on one page, of one run or of several side by side.

    Effective learning rate, unit norm and rotation of each layer over the steps, coloured by depth; dashed what decay
    settles at, with the band of ±15 % that counts as equilibrium (Muon's is 35 %); the rotation over its prediction.
    Of more than 16 layers also heat maps of layers × steps. Where only some layers have curves, and for the others
    there are summaries, a grey band from the smallest to the largest value of all layers.

    Args:
        runs: What :meth:`~EffectiveLRMonitor.history` of a monitor returns, or a list of those of one run's monitors;
            or the folder of a TensorBoardLogger or CSVLogger, or a folder of such folders, each of which is a run; or
            for several runs a mapping from their names to any of these. At most 8 runs.
        layers: Globs over parameter names; only the layers that match one are drawn. Summaries stay.
        title: Of the page.
        plan: What was planned for norms and rotations, by :meth:`Plan.to_frame`: drawn beside what was measured.

    Returns:
        The figure, for ``savefig``; a notebook shows it. pyplot does not know of it.

    Raises:
        TypeError: If ``runs`` or ``layers`` is something else.
        ValueError: If there are no curves, no logs, a glob matches nothing, or the plan has none of the layers.
        ModuleNotFoundError: If pandas or matplotlib is not installed.

    Examples:
        >>> import pandas as pd
        >>> history = pd.DataFrame({"step": [0, 10], "effective_lr/conv.weight": [0.1, 0.2]})
        >>> figure = plot_curves(history, title="doubled")
        >>> [axes.get_ylabel() for axes in figure.axes]
        ['η / $n^p$ [lr / $w^p$]']
        >>> figure.axes[0].lines[0].get_ydata().tolist()
        [0.1, 0.2]
    """
    optional_import("pandas")
    found = runs_of(runs)
    found = choose(found if plan is None else [run.beside(plan) for run in found], layers)
    if len(found) > MANY_RUNS:
        raise ValueError(f"`runs` must be at most {MANY_RUNS} to fit on a page, got {len(found)}. Name fewer folders.")
    panels, heat_maps = panels_of(found), heat_maps_of(found)
    if not panels:
        raise ValueError(
            "`runs` must have a curve that a page shows: effective_lr, unit_norm_rms, rotation or "
            "equilibrium_ratio. Log with WeightNormMonitor and EffectiveLRMonitor."
        )
    several = len(found) > 1
    columns = len(found) if several else 2 if len(panels) == 4 else min(len(panels), 3)
    rows = len(panels) if several else -(-len(panels) // columns)
    size = (max(columns, 2) * WIDTH, rows * HEIGHT + len(heat_maps) * HEAT_HEIGHT + 0.8)
    figure: Figure = optional_import("matplotlib.figure").Figure(figsize=size, layout="constrained", dpi=120)
    heights = [HEIGHT] * rows + [HEAT_HEIGHT] * len(heat_maps)
    grid = figure.add_gridspec(len(heights), columns, height_ratios=heights)
    depth = Depth(all_layers(found))
    lines = (_side_by_side if several else _one_run)(figure, grid, panels, found, depth)
    for place, heat_map in enumerate(heat_maps, rows):
        spans = [grid[place, c] for c in range(columns)] if several else [grid[place, :]]
        row = [figure.add_subplot(span) for span in spans]
        draw_heat_map(figure, row, heat_map, found, depth)
        row[0].set_title(heat_map.title, loc="left", fontsize="medium")
    if not depth.is_listed:
        depth.colour_bar(figure, lines)
    _legend(figure, lines, depth, size[0])
    if title:
        figure.suptitle(title)
    setattr(figure, "_repr_png_", MethodType(_png, figure))  # noqa: B010, for notebooks, where mypy knows no such method
    return figure


def _one_run(figure: Any, grid: Any, panels: Sequence[Panel], runs: Sequence[LoggedRun], depth: Depth) -> list[Any]:
    """Panels in reading order."""
    found = []
    for place, panel in enumerate(panels):
        axes = figure.add_subplot(grid[place // grid.ncols, place % grid.ncols])
        draw(axes, panel, runs[0], depth)
        axes.set_title(panel.title, fontsize="medium")
        axes.set_ylabel(panel.label)
        found.append(axes)
    return found


def _side_by_side(
    figure: Any, grid: Any, panels: Sequence[Panel], runs: Sequence[LoggedRun], depth: Depth
) -> list[Any]:
    """A column for each run, a row for each panel, with one scale."""
    found = []
    names = short_names([run.name for run in runs], "/")
    for row, panel in enumerate(panels):
        drawn = []
        for column, (run, name) in enumerate(zip(runs, names, strict=True)):
            axes = figure.add_subplot(grid[row, column])
            axes.set_title(name if row == 0 else "", fontsize="medium")
            axes.set_ylabel(f"{panel.title}\n{panel.label}", fontsize="small")
            if panel.is_of(run):
                draw(axes, panel, run, depth)
                drawn.append(axes)
            else:
                axes.set_axis_off()
                axes.text(0.5, 0.5, f"{panel.title}: not logged", ha="center", fontsize="small")
            found.append(axes)
        one_scale(drawn)
    return found


def _legend(figure: Any, axes: Sequence[Any], depth: Depth, width: float) -> None:
    """Everything that has a label, once, layers first."""
    entries: dict[str, Any] = {}
    for each in axes:
        for handle, label in zip(*each.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        places = {label: place for place, label in enumerate(depth.labels.values())}
        entries = dict(sorted(entries.items(), key=lambda entry: places.get(entry[0], len(places))))
        characters = max(len(label) for label in entries) + 6
        columns = max(1, min(len(entries), int(width * 14 / characters)))
        figure.legend(entries.values(), entries, loc="outside lower center", ncols=columns, fontsize="small")


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
