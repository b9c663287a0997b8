"""What was logged, bounded in memory, as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_normreg._compat import optional_import

if TYPE_CHECKING:
    import pandas as pd


class History:
    """Rows of a run of any length: when full, every second row goes, and from then on every second is kept.

    >>> history = History(limit=4)
    >>> for step in range(9):
    ...     history.add({"step": step})
    >>> [row["step"] for row in history.rows]
    [0, 4, 8]
    """

    def __init__(self, limit: int = 10_000) -> None:
        self.rows: list[dict[str, float]] = []
        self._limit = limit
        self._stride = 1
        self._seen = 0

    def add(self, row: dict[str, float]) -> None:
        """Append a row, unless it falls between two that are kept."""
        if self._seen % self._stride == 0:
            self.rows.append(row)
        self._seen += 1
        if len(self.rows) > self._limit:
            self.rows = self.rows[::2]
            self._stride *= 2

    def to_frame(self) -> pd.DataFrame:
        """The rows as a data frame, one column per tag."""
        frame: pd.DataFrame = optional_import("pandas").DataFrame(self.rows)
        return frame
