"""Pictures of logged curves, and reading logs."""

from typing import TYPE_CHECKING

from lightning_normreg._plot._page import plot_curves as plot_curves
from lightning_normreg._plot._run import History as History
from lightning_normreg._plot._run import read_runs as read_runs
from lightning_normreg._plot._run import runs_of as runs_of
from lightning_normreg._plot._style import shortened as shortened

if TYPE_CHECKING:
    from lightning_normreg._plot._run import Source as Source
