"""What was logged, bounded in memory, as a table."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from math import nan
from typing import TYPE_CHECKING

from lightning_normreg._compat import optional_import

if TYPE_CHECKING:
    import pandas as pd


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
