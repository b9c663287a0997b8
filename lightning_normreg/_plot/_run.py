"""Curves of one run: as a monitor keeps them, and as what is drawn of them, lines of layers and summaries over layers.

Those of past runs are read back from what loggers wrote: TensorBoard's event files, or the table of a CSVLogger.
"""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from lightning_normreg import _metrics
from lightning_normreg._compat import optional_import
from lightning_normreg._metrics import Curve
from lightning_normreg._weights import check_globs, match

if TYPE_CHECKING:
    import pandas as pd

    Source: TypeAlias = "str | os.PathLike[str] | pd.DataFrame | Sequence[pd.DataFrame]"

TABLE = "metrics.csv"
_EVENTS = "tfevents"


class History:
    """Columns of a run of any length: when full, every second row goes, and from then on every second is kept.

    >>> history = History(limit=4)
    >>> for step in range(9):
    ...     history.add({"step": step})
    >>> history.to_frame()["step"].tolist()
    [0, 4, 8]
    """

    def __init__(self, limit: int = 10_000) -> None:
        self._columns: dict[str, array[float]] = {}
        self._length = 0
        self._limit = limit
        self._stride = 1
        self._seen = 0

    def __len__(self) -> int:
        return self._length

    def add(self, row: Mapping[str, float]) -> None:
        """Append a row, unless it falls between two that are kept."""
        if self._seen % self._stride == 0:
            for tag in [tag for tag in row if tag not in self._columns]:
                self._columns[tag] = array("d", [nan]) * self._length
            for tag, column in self._columns.items():
                column.append(row.get(tag, nan))
            self._length += 1
        self._seen += 1
        if self._length > self._limit:
            self._columns = {tag: column[::2] for tag, column in self._columns.items()}
            self._length = -(-self._length // 2)
            self._stride *= 2

    def to_frame(self) -> pd.DataFrame:
        frame: pd.DataFrame = optional_import("pandas").DataFrame(self._columns)
        return frame.astype({tag: int for tag in ("step", "epoch") if tag in frame})


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

    def beside(self, plan: pd.DataFrame) -> LoggedRun:
        """The run with what was planned for its layers."""
        pairs = ((_metrics.UNIT_NORM_RMS, _metrics.PLANNED_NORM), (_metrics.ROTATION, _metrics.PLANNED_ROTATION))
        names = {
            _metrics.tag(measured, layer, ""): _metrics.tag(planned, layer, "")
            for measured, planned in pairs
            for layer in self.layers(measured)
        }
        found = plan.set_index("step")[[tag for tag in names if tag in plan]].rename(columns=names)
        if found.empty:
            raise ValueError(f"`plan` must be one of the model of {self.name!r}, but has none of its layers.")
        return LoggedRun(self.name, self.table.drop(columns=found.columns, errors="ignore").join(found, how="outer"))

    def chosen(self, layers: Iterable[str]) -> LoggedRun:
        """The run with the curves of these layers only."""
        wanted = set(layers)
        split = [(column, str(column).partition("/")) for column in self.table.columns]
        kept = [column for column, (key, _, layer) in split if layer in wanted or key == _metrics.SUMMARY_GROUP]
        return LoggedRun(self.name, self.table[kept])


def runs_of(source: Source | Mapping[str, Source], argument: str = "runs") -> list[LoggedRun]:
    """The runs of what an argument was given."""
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
        frames: list[Any] = list(source) if isinstance(source, (list, tuple)) else [source]
        if not all(isinstance(frame, pandas.DataFrame) for frame in frames):
            raise TypeError(
                f"`{argument}` must be a folder, a data frame, a list of one run's data frames, or a mapping from "
                f"names to these, got {source!r}. Use {{'first': folder, 'second': other}} for several runs."
            )
        with_step = [frame for frame in frames if "step" in frame.columns]
        tables = _by_step(pandas.concat(with_step, ignore_index=True)) if with_step else {}
        if not tables:
            raise ValueError(
                f"`{argument}` must have curves of this package, but the data frame has none. Use history() of a "
                "monitor; where that is empty because a strategy trained in processes of its own, use the logger's "
                "folder, trainer.log_dir."
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


def read_runs(path: str | os.PathLike[str]) -> dict[str, pd.DataFrame]:
    """By name the curves of the run in a folder, an event file or a CSV file; else of all runs beneath the folder.

    The name of a run is its path, with the prefix where there are several. There is one row for each step, and one
    column for each tag of the table of curves, without any prefix. A ``ValueError`` says that there is no such path, no
    log in it, none of our curves in the logs, or that a file cannot be read.
    """
    place = Path(path)
    if not place.exists():
        raise ValueError(f"There is no {str(path)!r}. Give the folder that a logger wrote: lightning_logs/version_0.")
    found = _named(str(path), _read_file(place) if place.is_file() else _read_folder(place))
    beneath = () if found else {Path(folder) for folder, _, _ in os.walk(place)} - {place}
    for folder in sorted(beneath, key=_natural):
        found |= _named(str(folder), _read_folder(folder))
    if found:
        return found
    if place.is_file() or any(_EVENTS in file or file == TABLE for _, _, files in os.walk(place) for file in files):
        raise ValueError(
            f"{str(path)!r} has logs, but no curves of this package. "
            "Train with Trainer(callbacks=[WeightNormMonitor(), EffectiveLRMonitor()]), or by lightning-normreg fit."
        )
    raise ValueError(
        f"{str(path)!r} has no logs: neither an event file of TensorBoard nor a {TABLE}, also beneath it. "
        "Use the folder that a TensorBoardLogger or CSVLogger wrote, such as lightning_logs/version_0."
    )


def _by_step(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The columns of a table that are curves of ours, a row for each ``step``, whose last value counts, by prefix."""
    found: dict[str, dict[str, str]] = {}
    for column in frame.columns:
        parts = _metrics.split_tag(str(column))
        if parts:
            found.setdefault(parts[0], {})[column] = parts[1]
    tables = {}
    for prefix, names in found.items():
        numbers = frame[["step", *names]].apply(optional_import("pandas").to_numeric, errors="coerce")
        rows = numbers.dropna(subset="step").groupby("step").last().dropna(how="all")
        table = rows.rename(columns=names).T.groupby(level=0, sort=False).last().T  # old and new tags of one curve
        if len(table):
            tables[prefix] = table
    return tables


def _read_folder(folder: Path) -> dict[str, pd.DataFrame]:
    """TensorBoard's log first: it has kept the order of the layers, which a CSVLogger sorts by name."""
    files = [entry.name for entry in folder.iterdir() if entry.is_file()]
    events = _read_events(folder) if any(_EVENTS in file for file in files) else {}
    return events or (_read_table(folder / TABLE) if TABLE in files else {})


def _read_file(file: Path) -> dict[str, pd.DataFrame]:
    if _EVENTS in file.name:
        return _read_events(file)
    if file.suffix == ".csv":
        return _read_table(file)
    raise ValueError(f"{str(file)!r} is neither an event file of TensorBoard nor a CSV file. Use the folder it is in.")


def _read_events(path: Path) -> dict[str, pd.DataFrame]:
    module = optional_import("tensorboard.backend.event_processing.event_accumulator")
    # 0: all points; of what is not a curve as little as possible.
    sizes = dict.fromkeys(module.DEFAULT_SIZE_GUIDANCE, 1) | {module.SCALARS: 0}
    try:
        log: Any = module.EventAccumulator(str(path), size_guidance=sizes).Reload()
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as TensorBoard's log: {error}") from error
    pandas = optional_import("pandas")
    tags = [tag for tag in log.Tags()["scalars"] if _metrics.split_tag(tag)]
    # Of a resumed run the last value of a step counts.
    curves = {tag: pandas.Series({e.step: e.value for e in log.Scalars(tag)}, dtype=float) for tag in tags}
    return _by_step(pandas.DataFrame(curves, columns=tags).rename_axis("step").reset_index())


def _read_table(file: Path) -> dict[str, pd.DataFrame]:
    pandas = optional_import("pandas")
    try:
        frame = pandas.read_csv(file)
    except (OSError, ValueError) as error:  # pandas' and Unicode's errors are ValueErrors
        raise ValueError(f"{str(file)!r} cannot be read as a table of CSVLogger: {error}") from error
    if "step" not in frame.columns:
        if any(_metrics.split_tag(str(column)) for column in frame.columns):
            raise ValueError(f"{str(file)!r} has no column 'step'. Use the metrics.csv of a CSVLogger as it is.")
        return {}
    return _by_step(frame[sorted(frame.columns, key=_natural)])


def _named(path: str, tables: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    return {path if len(tables) == 1 else f"{path} ({prefix or 'no prefix'})": t for prefix, t in tables.items()}


def _natural(name: object) -> list[tuple[int, str]]:
    """Sort key by which layers.2 comes before layers.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(name))]
