"""Sharded models are asked in place, in real processes: the labels of the definition, and no trace."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("in_place_processes.py")


@cache
def found(world: int) -> list[dict[str, Any]]:
    """What each process found."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(SCRIPT), str(world), folder]
        done = subprocess.run(command, check=False, timeout=580, capture_output=True, text=True, cwd=SCRIPT.parents[2])
        assert not done.returncode, done.stderr[-3000:]
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "world, strategy, count",
    [
        (2, "fsdp2", 40),
        (2, "fsdp2 whole", 2),
        (2, "fsdp2, transformers", 12),
        (2, "fsdp1", 9),
        (4, "hsdp", 6),
        (2, "fsdp2, same samples", 6),
        (2, "tp, same samples", 6),
    ],
)
def test_verdicts_are_those_made_by_hand(world: int, strategy: str, count: int) -> None:
    """On every process, with samples of its own on each; weights and buffers keep their bits.

    With the same samples on each, eps shares are those of a private copy, to the roundoff of float32.
    """
    for results in found(world):
        assert len(results[strategy]) == count
        for name, result in results[strategy].items():
            wrong = {p: (result["expected"].get(p, "none"), a) for p, a in result["labels"].items()}
            assert {p: pair for p, pair in wrong.items() if pair[0] != pair[1]} == {}, name
            assert result["kept"], name
            for expected, share in result["shares"]:
                assert share == pytest.approx(expected, abs=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "world, strategy",
    [
        (2, "fsdp2"),
        (2, "fsdp2 in bfloat16"),
        (2, "fsdp1"),
        (2, "fsdp1 in bfloat16"),
        (2, "tp"),
        (4, "hsdp"),
    ],
)
@pytest.mark.parametrize("raises", [False, True])
def test_nothing_is_left_of_it(world: int, strategy: str, raises: bool) -> None:
    """Weights, buffers, attributes, generators, gradients; also after an exception in the middle of the forward pass.

    The next training step is, bit for bit, that of a module that was never asked.
    """
    for results in found(world):
        kept = results["kept"][f"{strategy}, {'raises' if raises else 'passes'}"]
        assert ("in the middle" in kept["why"]) == raises
        assert kept["labels"].get("first.weight") == (None if raises else "layer")
        assert all(kept[what] for what in ("bits", "states", "gradients", "step")), kept


@pytest.mark.slow
@pytest.mark.parametrize("world, strategies", [(2, ["fsdp2", "tp", "fsdp1"]), (4, ["hsdp"])])
def test_symmetries_are_those_of_one_device(world: int, strategies: list[str]) -> None:
    """The same basis, in the same order, with the same blocks; nothing is left of the points in the weights."""
    for results in found(world):
        assert [*results["symmetries"]] == strategies
        for strategy in strategies:
            for name, result in results["symmetries"][strategy].items():
                assert result["equal"], (strategy, name)
                assert result["kept"], (strategy, name)
                mine, one = result["shares"]  # in units of about 1; float32 leaves 1e-7 times the number of its sums
                assert mine == pytest.approx(one, abs=1e-5), (strategy, name)
