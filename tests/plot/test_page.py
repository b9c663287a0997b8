"""What a page shows: every curve with its values, legibly."""

from __future__ import annotations

import io
import sys
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from lightning_normreg import plot_curves
from tests.plot.harness import drawn_texts, history, name_of, overlaps

LONG = "a_rather_long_name_of_a_package.backbone.stages.3.blocks.17.mlp.{}.projection.weight"


def long_names(layers: int) -> pd.DataFrame:
    """The names differ in the middle only."""
    names = {name_of(layer, layers): LONG.format(layer) for layer in range(layers)}
    rename = {c: c.replace(c.rpartition("/")[2], names.get(c.rpartition("/")[2], "")) for c in history(layers).columns}
    frame = history(layers)
    return frame.rename(columns={old: new for old, new in rename.items() if new.endswith("weight")})


def scaled(factor: float, power: float) -> pd.DataFrame:
    """Curves of another size and range."""
    frame = history(4)
    curves = [column for column in frame.columns if "/" in column]
    frame[curves] = factor * frame[curves] ** power
    frame["step"] *= 100_000
    return frame


PAGES: dict[str, Any] = {
    "one layer": lambda: history(1),
    "four layers": lambda: history(4),
    "twelve layers": lambda: history(12),
    "sixty layers": lambda: history(60),
    "two hundred layers": lambda: history(200, rows=20),
    "eight of two hundred": lambda: history(200, shown=range(0, 200, 28)),
    "summaries only": lambda: history(200, shown=range(0)),
    "one step": lambda: history(4, rows=1),
    "long names": lambda: long_names(6),
    "many decades": lambda: scaled(1e-7, 4),
    "hardly any change": lambda: scaled(1e4, 0.001),
    "norms only": lambda: history(4).filter(regex="step|norm_rms"),
    "three runs": lambda: {f"logs/decay_{n}/version_{n}": history(4, seed=n, lr=0.1**n) for n in range(3)},
    "three deep runs": lambda: {f"run {n}": history(40, seed=n, rows=20) for n in range(3)},
    "eight runs": lambda: {f"experiments/optimizer_{n}/lightning_logs/version_{n}": history(2) for n in range(8)},
    "runs that differ": lambda: {"all": history(5), "norms": history(3).filter(regex="step|norm_rms")},
}


def drawn(figure: Figure) -> list[tuple[str, Any]]:
    """The texts of a page, with their boxes."""
    with drawn_texts() as found:
        FigureCanvasAgg(figure).draw()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("page", list(PAGES))
def test_no_text_overlaps_and_every_axis_has_a_unit(page: str) -> None:
    """Also none runs out of the page."""
    figure = plot_curves(PAGES[page](), title=f"A page: {page}")
    texts = drawn(figure)
    assert overlaps(texts) == []
    width, height = figure.canvas.get_width_height()
    assert [t for t, box in texts if box.x0 < 0 or box.y0 < 0 or box.x1 > width or box.y1 > height] == []
    for axes in figure.axes:
        if axes.axison and axes.get_label() != "<colorbar>":
            assert axes.get_xlabel() == "step [optimizer steps]"
            label = axes.get_ylabel()
            assert label == "layer, by depth" or label.endswith("]")
        elif axes.axison:
            assert axes.get_ylabel() == "layer, by depth" or axes.get_ylabel().endswith("]")
    # What is read first: at least two numbers on each axis of steps and of values, where there is any extent.
    ticks = [axis.get_majorticklocs() for axes in figure.axes if axes.axison for axis in (axes.yaxis,)]
    limits = [sorted(axes.get_ylim()) for axes in figure.axes if axes.axison]
    if page not in ("one step", "one layer"):
        for found, (low, high) in zip(ticks, limits, strict=True):
            assert sum(low <= tick <= high for tick in found) >= 2


def test_the_overlap_test_can_fail() -> None:
    """Two texts at one place are found."""
    figure = Figure()
    figure.text(0.5, 0.5, "here")
    figure.text(0.5, 0.5, "there")
    assert overlaps(drawn(figure)) == [("here", "there")]


def lines(figure: Figure, title: str) -> dict[str, Any]:
    """Label → line of a panel."""
    (axes,) = [axes for axes in figure.axes if axes.get_title() == title]
    return {str(line.get_label()): line for line in axes.lines}


@pytest.mark.parametrize("layers", [4, 200])
def test_lines_are_the_logged_values(layers: int) -> None:
    """Every layer in every panel, from dark to light by depth."""
    frame = history(layers, rows=20)
    figure = plot_curves(frame)
    panels = {
        "effective learning rate": ("effective_lr", layers - 1),
        "unit norm": ("unit_norm_rms", layers),
        "rotation per step": ("rotation", layers),
        "rotation over its prediction": ("equilibrium_ratio", layers - 1),
    }
    for title, (key, count) in panels.items():
        (axes,) = [axes for axes in figure.axes if axes.get_title() == title]
        found = [line for line in axes.lines if len(line.get_xdata()) == len(frame)][:count]
        luminance = [np.dot([0.2126, 0.7152, 0.0722], to_rgb(line.get_color())) for line in found]
        assert luminance == sorted(luminance)
        for layer, line in enumerate(found):
            assert line.get_xdata().tolist() == frame["step"].tolist()
            assert line.get_ydata().tolist() == frame[f"weights/{key}/{name_of(layer, layers)}"].tolist()
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    deep = ["rotation per step", "effective learning rate over its first value"]
    assert [title for title in titles if title] == (deep if layers == 200 else [])


def test_the_prediction_and_its_band() -> None:
    """θ* of layers that share it is one line, 15 % wide on both sides; n* is dashed in the layer's colour."""
    frame = history(4)
    figure = plot_curves(frame)
    (axes,) = [axes for axes in figure.axes if axes.get_title() == "rotation per step"]
    target = frame["weights/equilibrium_rotation/block0.conv.weight"].to_numpy()
    assert axes.lines[-1].get_ydata() == pytest.approx(target)
    (band,) = axes.collections
    (path,) = band.get_paths()
    for sign in (-1, 1):
        edge = {(x, y) for x, y in path.vertices}
        assert all(
            min(abs(y / (t * (1 + sign * 0.15)) - 1) for x, y in edge if x == s) < 1e-12
            for s, t in zip(frame["step"], target, strict=True)
        )
    norms = lines(figure, "unit norm")
    dashed = [line for line in norms.values() if line.get_linestyle() == "--" and len(line.get_xdata())]
    (axes,) = [axes for axes in figure.axes if axes.get_title() == "unit norm"]
    assert len(axes.lines) == 4 + 3 + 2  # layers, their equilibria, and two entries of the legend
    assert dashed[0].get_ydata()[0] == pytest.approx(0.4)


def test_layers_without_curves_are_in_the_band() -> None:
    """Where eight of two hundred have curves, a band from the summaries' minimum to their maximum."""
    frame = history(200, shown=range(0, 200, 28))
    figure = plot_curves(frame)
    for title, summary in (
        ("unit norm", "unit_norm_rms"),
        ("rotation per step", "rotation"),
        ("effective learning rate, all layers", "effective_lr_ratio"),
    ):
        (axes,) = [axes for axes in figure.axes if axes.get_title() == title]
        (path,) = axes.collections[0].get_paths()
        for statistic, extreme in (("min", np.min), ("max", np.max)):
            expected = frame[f"weights/layers/{summary}_{statistic}"]
            assert extreme(path.vertices[:, 1]) == extreme(expected)
    assert "effective learning rate, all layers" not in [a.get_title() for a in plot_curves(history(4)).axes]


def test_runs_side_by_side_have_one_scale() -> None:
    """The column says which run, the row which quantity."""
    figure = plot_curves({f"logs/{lr}": history(3, lr=lr) for lr in (0.1, 0.001)})
    top = figure.axes[:2]
    assert [axes.get_title() for axes in top] == ["0.1", "0.001"]
    for row in range(4):
        left, right = figure.axes[2 * row : 2 * row + 2]
        assert left.get_ylabel() == right.get_ylabel()
        assert left.get_ylim() == right.get_ylim()
    low, high = top[0].get_ylim()
    rates = [history(3, lr=lr)["weights/effective_lr/block0.conv.weight"] for lr in (0.1, 0.001)]
    assert low < min(rate.min() for rate in rates)
    assert high > max(rate.max() for rate in rates)


def test_peaks_of_long_runs_are_kept() -> None:
    """Of 9000 logged steps, and in the heat map the geometric mean over neighbours."""
    frame = history(20, rows=9000)
    column = f"weights/rotation/{name_of(3, 20)}"
    frame.loc[4567, column] = 1.5
    figure = plot_curves(frame)
    (axes,) = [axes for axes in figure.axes if axes.get_title() == "rotation per step"]
    line = axes.lines[3]
    assert len(line.get_xdata()) <= 1000
    assert line.get_ydata().max() == 1.5
    assert line.get_ydata().min() == frame[column].min()
    (heat,) = [axes for axes in figure.axes if axes.get_title(loc="left") == "rotation per step"]
    values = heat.collections[0].get_array()
    assert values.shape == (20, 500)
    expected = np.exp(np.log(frame[column].to_numpy()).reshape(500, 18).mean(axis=1))
    assert values[3].tolist() == pytest.approx(expected.tolist(), rel=1e-12)


def test_zeros_and_infinities_are_left_out() -> None:
    """A warm-up starts at learning rate 0, a broken run ends at NaN; the rest is drawn."""
    frame = history(3)
    rate = "weights/effective_lr/block0.conv.weight"
    frame.loc[0, rate] = 0.0
    frame.loc[frame.index[-2:], rate] = [np.inf, np.nan]
    figure = plot_curves(frame)
    axes = figure.axes[0]
    assert axes.get_yscale() == "log"
    assert axes.lines[0].get_ydata().tolist() == frame[rate].tolist()[:-2]
    low, _ = axes.get_ylim()
    assert low > 0
    assert figure._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]


def test_a_deep_model_that_does_not_move() -> None:
    """Nothing is positive: linear axes, and no heat map of it; beside a run that moves, an empty one."""
    still = history(20, rows=3)
    curves = [column for column in still.columns if "/" in column and "norm" not in column]
    still[curves] = 0.0
    figure = plot_curves(still)
    assert {axes.get_title(): axes.get_yscale() for axes in figure.axes}["rotation per step"] == "linear"
    assert not any(axes.get_title(loc="left") for axes in figure.axes)
    figure = plot_curves({"still": still, "moving": history(20, rows=3)})
    assert overlaps(drawn(figure)) == []
    labelled = [axes for axes in figure.axes if axes.get_ylabel() == "layer, by depth" and axes.get_xlabel()]
    assert [len(axes.collections) for axes in labelled] == [0, 1, 0, 1]


def test_chosen_layers() -> None:
    """By globs; of a model with no scale-invariant layer the rates that there are."""
    figure = plot_curves(history(5), layers=["block1.*", "*3.conv*"])
    assert list(lines(figure, "effective learning rate")) == ["block1.conv.weight", "block3.conv.weight"]
    figure = plot_curves(history(5), layers=["block4.*"])
    assert figure.axes[0].get_title() == "effective learning rate, not scale-invariant"


@pytest.mark.parametrize(
    "runs, layers, error, message",
    [
        (
            lambda: pd.DataFrame({"step": [1], "loss": [2.0]}),
            None,
            ValueError,
            r"`runs` must have curves .* use the logger's folder",
        ),
        (pd.DataFrame, None, ValueError, r"`runs` must have curves of this package"),
        (lambda: history(2).filter(regex="step|weight_norm"), None, ValueError, r"must have a curve that a page shows"),
        (lambda: dict.fromkeys("abcdefghi", history(2)), None, ValueError, r"at most 8 to fit on a page, got 9"),
        (lambda: [1.0], None, TypeError, r"`runs` must be a folder, a data frame"),
        (lambda: history(2), ["conv9*"], ValueError, r"`layers` must match .* Near misses: 'block0.conv.weight'"),
        (lambda: history(2), "conv", TypeError, r"`layers` must be a list of globs"),
    ],
)
def test_errors(runs: Any, layers: Any, error: type[Exception], message: str) -> None:
    """Each names the argument, the rule, the remedy."""
    with pytest.raises(error, match=message):
        plot_curves(runs(), layers=layers)


@pytest.mark.parametrize("missing", ["matplotlib", "matplotlib.figure", "pandas"])
def test_without_the_extra(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line that installs it."""
    frame = history(2)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ModuleNotFoundError, match=r'is not installed. .*"lightning-normreg\[plot\]"'):
        plot_curves(frame)


def test_vector_graphics_stay_small() -> None:
    """Heat maps are pixels in them."""
    buffer = io.BytesIO()
    plot_curves(history(60)).savefig(buffer, format="svg")
    assert buffer.getvalue().startswith(b"<?xml")
    assert len(buffer.getvalue()) < 3e6
