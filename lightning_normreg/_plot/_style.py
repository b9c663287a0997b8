"""Colours by depth, names that fit, and ticks that can be read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lightning_normreg._compat import optional_import
from lightning_normreg._metrics import Curve

LEGEND_LAYERS = 12
"""Layers up to which each has an entry in the legend; more have a colour bar."""
LAYER_TICKS = 9


class Depth:
    """Colours of all layers of a page, from dark for the first to light for the last."""

    def __init__(self, layers: Sequence[str]) -> None:
        self.layers = list(layers)
        colours = optional_import("matplotlib").colormaps["viridis"]
        last = max(len(layers) - 1, 1)
        # The lightest tenth cannot be seen on white.
        self._colours = {layer: colours(0.9 * place / last) for place, layer in enumerate(layers)}
        self.labels = dict(zip(layers, short_names(layers), strict=True))

    def __getitem__(self, layer: str) -> Any:
        return self._colours[layer]

    @property
    def is_listed(self) -> bool:
        """Whether each layer has an entry in the legend."""
        return len(self.layers) <= LEGEND_LAYERS

    def colour_bar(self, figure: Any, axes: Sequence[Any]) -> None:
        """Say which colour is which depth, beside some axes."""
        colors = optional_import("matplotlib.colors")
        colour_map = colors.ListedColormap([self[layer] for layer in self.layers])
        scale = colors.Normalize(-0.5, len(self.layers) - 0.5)
        mappable = optional_import("matplotlib.cm").ScalarMappable(scale, colour_map)
        bar = figure.colorbar(mappable, ax=list(axes), label="layer, by depth", fraction=0.03, pad=0.01)
        places = spread(len(self.layers))
        bar.set_ticks(places, labels=[self.labels[self.layers[place]] for place in places], fontsize="x-small")
        bar.minorticks_off()
        bar.ax.invert_yaxis()


def spread(count: int) -> list[int]:
    """At most nine places of a list, evenly from the first to the last.

    >>> spread(3), spread(200)
    ([0, 1, 2], [0, 25, 50, 75, 100, 124, 149, 174, 199])
    """
    shown = min(count, LAYER_TICKS)
    return [round(i * (count - 1) / max(shown - 1, 1)) for i in range(shown)]


def shortened(name: str, length: int) -> str:
    """A name without its middle, where it is too long.

    >>> shortened("encoder.layers.11.attention.value.weight", 30)
    'encoder.layers…on.value.weight'
    """
    if len(name) <= length:
        return name
    head = (length - 1) // 2
    return f"{name[:head]}…{name[head + 1 - length :]}"


def short_names(names: Sequence[str], separator: str = ".") -> list[str]:
    """Names without the parts that all of them begin with, and without their middle.

    >>> short_names(["model.net.0.weight", "model.net.10.weight"])
    ['0.weight', '10.weight']
    >>> short_names(["logs/a/version_0", "logs/b/version_0"], "/")
    ['a/version_0', 'b/version_0']
    """
    parts = [name.split(separator) for name in names]
    shared = 0
    while len(parts) > 1 and all(p[: shared + 1] == parts[0][: shared + 1] and len(p) > shared + 1 for p in parts):
        shared += 1
    rest = [separator.join(p[shared:]) for p in parts]
    length = 30
    while len({shortened(name, length) for name in rest}) < len(set(rest)):
        length += 10  # they differ in the middle
    return [shortened(name, length) for name in rest]


def axis_label(curve: Curve) -> str:
    """Symbol and unit, with powers set as such.

    >>> from lightning_normreg._metrics import EFFECTIVE_LR
    >>> axis_label(EFFECTIVE_LR)
    'η / $n^p$ [lr / $w^p$]'
    """
    return re.sub(r"\b(\w\^\w)\b", r"$\1$", f"{curve.symbol} [{curve.unit}]")


def step_axis(axes: Any) -> None:
    """Few ticks, in thousands where there are so many."""
    ticker = optional_import("matplotlib.ticker")
    axes.set_xlabel("step [optimizer steps]")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))


def log_axis(axes: Any, low: float, high: float) -> None:
    """Logarithmic from one positive value to another, with ticks at plain numbers, some for any range."""
    axes.set_yscale("log")
    margin = max((high / low) ** 0.05, 1.02)
    axes.set_ylim(low / margin, high * margin)
    set_log_ticks(axes.yaxis, low / margin, high * margin)
    axes.grid(alpha=0.3, which="major")


def one_scale(row: Sequence[Any]) -> None:
    """Give logarithmic axes the same range."""
    logarithmic = [axes for axes in row if axes.get_yscale() == "log"]
    limits = [limit for axes in logarithmic for limit in axes.get_ylim()]
    for axes in logarithmic:
        low, high = min(limits), max(limits)
        axes.set_ylim(low, high)
        set_log_ticks(axes.yaxis, low, high)


def set_log_ticks(axis: Any, low: float, high: float) -> None:
    ticker = optional_import("matplotlib.ticker")
    span = high / low
    digits = (1, 2, 3, 5) if span < 20 else (1, 2, 5) if span < 300 else (1,)
    axis.set_major_locator(ticker.MaxNLocator(5) if span < 4 else ticker.LogLocator(subs=digits, numticks=9))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:.4g}"))
    axis.set_minor_locator(ticker.NullLocator())
