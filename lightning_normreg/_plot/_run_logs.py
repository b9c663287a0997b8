"""Curves of past runs, read back from what loggers wrote: TensorBoard's event files, or the table of a CSVLogger."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_normreg import _metrics
from lightning_normreg._compat import optional_import

if TYPE_CHECKING:
    import pandas as pd

TABLE = "metrics.csv"
_EVENTS = "tfevents"


def read_runs(path: str | os.PathLike[str]) -> dict[str, pd.DataFrame]:
    """Curves of the run in a folder, or of all runs beneath it where it has none itself.

    Args:
        path: The folder that a logger wrote, a folder of such folders, an event file, or a CSV file.

    Returns:
        For each run its name (the path, and the prefix where there are several) and its curves: one row for each step,
        one column for each tag of the table of curves, without any prefix.

    Raises:
        ValueError: If there is no such path, no log in it, none of our curves in the logs, or a file cannot be read.
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


def by_step(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
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
    return by_step(pandas.DataFrame(curves, columns=tags).rename_axis("step").reset_index())


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
    return by_step(frame[sorted(frame.columns, key=_natural)])


def _named(path: str, tables: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    return {path if len(tables) == 1 else f"{path} ({prefix or 'no prefix'})": t for prefix, t in tables.items()}


def _natural(name: object) -> list[tuple[int, str]]:
    """Sort key by which layers.2 comes before layers.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(name))]
