"""What monitors remember: few bytes, thinned when full."""

from __future__ import annotations

import math
import tracemalloc

from lightning_normreg._plot import History


def test_columns_come_and_go() -> None:
    """A tag that begins later, or is missing once, has no number there; steps stay whole numbers."""
    history = History()
    history.add({"step": 0, "epoch": 0, "a": 1.0})
    history.add({"step": 5, "epoch": 0, "b": 2.0})
    frame = history.to_frame()
    assert frame["step"].tolist() == [0, 5]
    assert frame["step"].dtype == int
    assert frame["a"][0] == 1.0
    assert math.isnan(frame["a"][1])
    assert math.isnan(frame["b"][0])
    assert len(history) == 2
    assert not History()


def test_a_row_takes_two_kilobytes() -> None:
    """Of 21 layers with all the curves that both monitors log by default: 8 bytes a number, with room to grow."""
    row = {f"weights/{curve}/layer{layer}.weight": 0.5 for curve in range(7) for layer in range(21)}
    row |= {f"weights/layers/{number}": 0.5 for number in range(12)}
    history = History()
    history.add({"step": 0, "epoch": 0, **row})
    tracemalloc.start()
    for step in range(1, 1001):
        history.add({"step": step, "epoch": 0, **row})
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size / 1000 <= 2000


def test_a_full_history_is_thinned_evenly() -> None:
    """Every second row goes, in all columns alike."""
    history = History(limit=6)
    for step in range(20):
        history.add({"step": step, "epoch": 0, "a": 10.0 * step})
    frame = history.to_frame()
    assert frame["step"].tolist() == [0, 4, 8, 12, 16]
    assert frame["a"].tolist() == [0.0, 40.0, 80.0, 120.0, 160.0]
