"""Pictures of curves, from the history of a monitor or from the logs of past runs."""

from lightning_normreg._plot._page import plot_curves as plot_curves
