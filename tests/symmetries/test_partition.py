"""The search for blocks against a slow twin that tries every run."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_normreg._symmetries._partition import FLOOR, finest_partition

TOL = 1e-6


def slow_runs(sums, squares):
    """From each slice on, the first run that vanishes in every draw, by trying all."""
    floor = FLOOR * TOL * squares.mean(1).sqrt()
    runs, at, count = [], 0, sums.shape[1]
    while at < count:
        for stop in range(at + 1, count + 1):
            small = sums[:, at:stop].sum(1).abs() <= TOL * squares[:, at:stop].sum(1).sqrt() + floor
            if bool(small.all()):
                runs.append((at, stop))
                at = stop
                break
        else:
            at += 1
    return runs


def table(sizes, seed, draws=4):
    """Random sums in which runs of the given sizes vanish; a negative size is a run that does not."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for size in sizes:
        part = torch.randn(draws, abs(size), generator=generator, dtype=torch.float64)
        if size > 0:
            part -= part.mean(1, keepdim=True)
        parts.append(part)
    sums = torch.cat(parts, 1)
    return sums, 1 + torch.rand(sums.shape, generator=generator, dtype=torch.float64)


@given(st.lists(st.integers(-4, 6).filter(bool), min_size=1, max_size=12), st.integers(0, 10**6))
def test_blocks_are_those_of_the_slow_search(sizes, seed):
    """Runs of any sizes, next to slices that are in none, are found as by trying all."""
    sums, squares = table(sizes, seed)
    found = finest_partition(sums, squares, TOL)
    assert found.runs == slow_runs(sums, squares)
    assert sum(stop - start for start, stop in found.runs) == sum(size for size in sizes if size > 0)


def test_slices_without_a_signal_are_left_out():
    """They are counted neither as invariant nor as not."""
    sums, squares = table([1, 1, 1, 1], 0)
    squares[:, 1:3] = 0
    found = finest_partition(sums, squares, TOL)
    assert found.live.tolist() == [0, 3]
    assert found.runs == [(0, 1), (1, 2)]


@pytest.mark.parametrize("sizes", [[1] * 50_000, [-50_000], [50] * 1000, [-20_000, *[64] * 400]], ids=len)
@pytest.mark.parametrize("tol", [1e-6, 1e-3])
def test_a_vocabulary_takes_no_time(sizes, tol):
    """50 000 slices, with or without blocks and at either threshold, take seconds, where trying all takes hours."""
    sums, squares = table(sizes, 1)
    start = time.perf_counter()
    found = finest_partition(sums, squares, tol)
    assert time.perf_counter() - start < 10
    assert len(found.runs) == sum(size > 0 for size in sizes)
