"""Means over an epoch against pandas."""

from __future__ import annotations

import math

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_normreg.callbacks._epoch_means import EpochMeans

ROWS = st.lists(st.dictionaries(st.sampled_from("abc"), st.floats(-1e6, 1e6)), min_size=1, max_size=8)


@given(ROWS, st.integers(0, 8))
def test_means_are_those_of_pandas_and_survive_a_checkpoint(rows: list[dict[str, float]], at: int) -> None:
    """Tags come and go between rows; whatever was added before a checkpoint counts after it."""
    means = EpochMeans()
    for row in rows[:at]:
        means.update(row)
    resumed = EpochMeans()
    resumed.add_sums(means.sums())
    for row in rows[at:]:
        resumed.update(row)
    expected = pd.DataFrame(rows).mean().dropna().to_dict()
    found = resumed.compute() if resumed.update_called else {}
    assert found.keys() == expected.keys()
    # Sums of up to 8 numbers up to 1e6 in float64, in whatever order.
    assert found == pytest.approx(expected, abs=8 * 8e6 * 2.3e-16)


def test_a_value_that_is_no_number_stays_none() -> None:
    """It is not dropped: a mean of the others would look healthy."""
    means = EpochMeans()
    means.update({"a": 1.0, "b": 1.0})
    means.update({"a": math.nan})
    assert math.isnan(means.compute()["a"])
    assert means.compute()["b"] == 1
    means.reset()
    assert means.sums() == {}
