"""The three figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from examples.van_laarhoven.grid import OPTIMIZERS, Optimizer
from examples.van_laarhoven.measured import Measured

Recipes = Mapping[tuple[Optimizer, bool], Measured]
TITLES = {"sgd": "SGD", "adam": "Adam"}


def draw(recipes: Recipes, folder: Path) -> None:
    """Write all of them."""
    for name, figure in (("error", error_over_grid), ("decay", error_over_decay), ("time", over_time)):
        figure(recipes).savefig(folder / f"{name}.png", dpi=90)


def error_over_grid(recipes: Recipes) -> Figure:
    """Mean error of each cell; diagonals of constant effective rate; which cells had time to settle."""
    figure, panels = _panels(recipes)
    errors = [m.error.mean(axis=0) for m in recipes.values()]
    low, high = min(e.min() for e in errors), max(e.max() for e in errors)
    for axes, m in panels:
        error, settled = m.error.mean(axis=0), m.long_enough()
        image = axes.imshow(error, norm=LogNorm(low, high), cmap="viridis_r", origin="lower", aspect="auto")
        for (row, column), value in np.ndenumerate(error):
            dark = value > np.sqrt(low * high)
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=8, color="w" if dark else "k")
            if settled[row, column] and not m.projected:
                axes.plot(column + 0.38, row + 0.35, ".", color="w" if dark else "k", markersize=4)
        if not m.projected:
            rows, columns = error.shape
            for total in range(1, rows + columns - 1):
                x = np.array([max(0.5, total - rows + 0.5), min(columns - 0.5, total + 0.5)])
                axes.plot(x, total - x, "--", color="k", linewidth=0.5, alpha=0.6)
        axes.axvline(0.5, color="w", linewidth=3)
        axes.set_xlim(-0.5, error.shape[1] - 0.5)
        axes.set_ylim(-0.5, error.shape[0] - 0.5)
        axes.set_xticks(range(len(m.decays)), [f"{d:.2g}" for d in m.decays], fontsize=8)
        axes.set_yticks(range(len(m.lrs)), [f"{lr:.2g}" for lr in m.lrs])
        axes.set(xlabel="decay", ylabel="learning rate")
    bar = figure.colorbar(image, ax=[axes for axes, _ in panels], label="test error [%]", shrink=0.6)
    _plain_numbers(bar.ax.yaxis)
    return figure


def error_over_decay(recipes: Recipes) -> Figure:
    """Mean error and its standard error over decay, a line for each learning rate."""
    figure, panels = _panels(recipes, sharey=True)
    for axes, m in panels:
        error, seeds = m.error.mean(axis=0), len(m.error)
        bars = m.error.std(axis=0, ddof=1) / seeds**0.5 if seeds > 1 else np.zeros_like(error)
        for k, (lr, color) in enumerate(zip(m.lrs, _colors(len(m.lrs)), strict=True)):
            axes.errorbar(range(len(m.decays)), error[k], bars[k], color=color, label=f"lr {lr:.2g}", capsize=2)
        axes.set_xticks(range(len(m.decays)), [f"{d:.2g}" for d in m.decays], fontsize=8)
        axes.set(xlabel="decay", ylabel="test error [%]", yscale="log")
        _plain_numbers(axes.yaxis)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small", ncols=2)
    return figure


def over_time(recipes: Recipes) -> Figure:
    """Norm and effective rate of the middle learning rate, a line for each decay."""
    figure = Figure(figsize=(9, 6.4), layout="constrained")
    for row, optimizer in zip(figure.subplots(len(OPTIMIZERS), 2), OPTIMIZERS, strict=True):
        m = recipes[optimizer, False]
        k = len(m.lrs) // 2
        shown = slice(None, m.constant), slice(m.constant - 1, None)
        for axes, values in zip(row, (m.norm, m.effective_lr), strict=True):
            mean = np.exp(np.log(np.maximum(values[:, k], 1e-30)).mean(axis=0))
            for curve, decay, color in zip(mean, m.decays, ["k", *_colors(len(m.decays) - 1)], strict=True):
                for part, style in zip(shown, ("-", ":"), strict=True):
                    label = f"decay {decay:.2g}" if style == "-" else None
                    axes.plot(m.logged[part], curve[part], style, color=color, label=label, linewidth=1.3)
            axes.set(xlabel="step", yscale="log", title=f"{TITLES[optimizer]}, lr {m.lrs[k]:.2g}")
            _plain_numbers(axes.yaxis)
            axes.grid(alpha=0.3)
        row[0].set_ylabel("norm of a filter")
        row[1].set_ylabel(f"effective rate lr/‖w‖{'²' if m.power == 2 else ''}")
        row[1].legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _panels(recipes: Recipes, **settings: Any) -> tuple[Figure, list[tuple[Any, Measured]]]:
    """A panel for each recipe: optimizers down, without and with projection across."""
    figure = Figure(figsize=(9, 6.8), layout="constrained")
    axes = figure.subplots(len(OPTIMIZERS), 2, **settings).flat
    panels = list(zip(axes, recipes.values(), strict=True))
    for panel, m in panels:
        panel.set_title(f"{TITLES[m.optimizer]}, {'projected: ‖w‖ = 1' if m.projected else 'plain'}", fontsize=10)
    return figure, panels


def _plain_numbers(axis: Any) -> None:
    """Ticks of a logarithmic axis at 1, 2, 5, 10 and so on, written out."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _colors(number: int) -> Any:
    return colormaps["viridis"](np.linspace(0.0, 0.9, number))
