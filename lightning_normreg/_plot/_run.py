"""Curves of one run as what is drawn of them: lines of layers, and summaries over layers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from lightning_normreg import _metrics
from lightning_normreg._compat import optional_import
from lightning_normreg._metrics import Curve
from lightning_normreg._plot._run_logs import by_step, read_runs
from lightning_normreg._weights import check_globs, match

if TYPE_CHECKING:
    import pandas as pd

    Source: TypeAlias = "str | os.PathLike[str] | pd.DataFrame | Sequence[pd.DataFrame]"


@dataclass(frozen=True)
class LoggedRun:
    name: str  # what stands above it
    table: pd.DataFrame  # a row for each step, a column for each tag without prefix, in the order of the layers

    def layers(self, curve: Curve) -> list[str]:
        """Layers that have a curve, by depth."""
        tags = (str(column).partition("/") for column in self.table.columns)
        return [layer for key, _, layer in tags if key == curve.key]

    def lines(self, curve: Curve) -> dict[str, pd.Series[float]]:
        """The finite values of each layer over its steps."""
        found = {layer: self.table[_metrics.tag(curve, layer, "")] for layer in self.layers(curve)}
        finite = {layer: values[values.abs() < float("inf")] for layer, values in found.items()}
        return {layer: values for layer, values in finite.items() if len(values)}

    def summary(self, curve: Curve) -> pd.DataFrame | None:
        """Minimum, median and maximum over layers where they were logged."""
        tags = [_metrics.summary_tag(curve, statistic, "") for statistic in _metrics.STATISTICS]
        if not curve.summary or not set(tags) <= set(self.table.columns):
            return None
        found = self.table[tags].dropna()
        found.columns = optional_import("pandas").Index(_metrics.STATISTICS)
        return found if len(found) else None

    def is_partial(self, curve: Curve) -> bool:
        """Whether the summary is over more layers than those that have curves."""
        summary = self.summary(curve)
        tags = [_metrics.tag(curve, layer, "") for layer in self.layers(curve)]
        if summary is None:
            return False
        if not tags:
            return True
        shown = self.table.loc[summary.index, tags]
        # A log may keep seven digits.
        wider = (summary["max"] > shown.max(axis=1) * (1 + 1e-5)) | (summary["min"] < shown.min(axis=1) * (1 - 1e-5))
        return bool(wider.any())

    def chosen(self, layers: Iterable[str]) -> LoggedRun:
        """The run with the curves of these layers only."""
        wanted = set(layers)
        split = [(column, str(column).partition("/")) for column in self.table.columns]
        kept = [column for column, (key, _, layer) in split if layer in wanted or key == _metrics.SUMMARY_GROUP]
        return LoggedRun(self.name, self.table[kept])


def runs_of(source: Source | Mapping[str, Source]) -> list[LoggedRun]:
    if isinstance(source, Mapping):
        found = []
        for name, part in source.items():
            same = runs_of(part)
            found += [LoggedRun(str(name) if len(same) == 1 else f"{name} {run.name}", run.table) for run in same]
        return found
    if isinstance(source, (str, os.PathLike)):
        tables = read_runs(source)
    else:
        pandas = optional_import("pandas")
        frames: list[Any] = [source] if isinstance(source, pandas.DataFrame) else list(source)
        if not all(isinstance(frame, pandas.DataFrame) for frame in frames):
            raise TypeError(
                f"`runs` must be a folder, a data frame, a list of one run's data frames, or a mapping from names to "
                f"these, got {source!r}. Use {{'first': folder, 'second': other}} for several runs."
            )
        with_step = [frame for frame in frames if "step" in frame.columns]
        tables = by_step(pandas.concat(with_step, ignore_index=True)) if with_step else {}
        if not tables:
            raise ValueError(
                "`runs` must have curves of this package, but the data frame has none. Use history() of a monitor; "
                "where that is empty because a strategy trained in processes of its own, use the logger's folder, "
                "trainer.log_dir."
            )
    return [LoggedRun(name, table) for name, table in tables.items()]


def all_layers(runs: Iterable[LoggedRun]) -> list[str]:
    """Every layer that has a curve, by depth."""
    split = [str(column).partition("/") for run in runs for column in run.table.columns]
    return list(dict.fromkeys(layer for key, _, layer in split if key != _metrics.SUMMARY_GROUP))


def choose(runs: list[LoggedRun], globs: Sequence[str] | None) -> list[LoggedRun]:
    """The runs with the layers that match one of the globs; all of them where there is none."""
    if globs is None:
        return runs
    check_globs("layers", globs)
    names: dict[str, list[str]] = {name: [] for name in all_layers(runs)}
    return [run.chosen({layer for glob in globs for layer in match(glob, names, "layers")}) for run in runs]
