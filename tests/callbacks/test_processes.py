"""Two processes: forked and spawned, averaged after the step, with the optimizer's state spread over them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

SCRIPT = Path(__file__).with_name("processes.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the runs have left."""
    found = tmp_path_factory.mktemp("processes")
    command = [sys.executable, str(SCRIPT), str(found)]
    subprocess.run(command, check=True, timeout=240, capture_output=True, cwd=SCRIPT.parent.parent.parent)
    return found


def ranks(folder: Path, name: str) -> list[Any]:
    """What both ranks saw."""
    return [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1)]


def off(weight: Tensor) -> float:
    """Distance of the layer, which is one unit of eight neurons, from its radius √8."""
    return abs(weight.double().norm().item() / 8**0.5 - 1)


@pytest.mark.slow
@pytest.mark.pitfall(15)
@pytest.mark.parametrize("name", ["fork", "spawn", "zero"])
def test_ranks_log_the_same(folder: Path, name: str) -> None:
    """The same keys and values on both, at every step and at the epoch's end, to loggers that listen on every rank."""
    first, second = ranks(folder, name)
    assert first["rows"] == second["rows"]
    assert len(first["rows"]) == 8 + 1
    assert first["metrics"] == second["metrics"]
    assert {"weights/effective_lr/layer.weight", "weights/unit_norm_rms/head.weight"} <= set(first["metrics"])
    assert all(torch.equal(value, second["weights"][key]) for key, value in first["weights"].items())
    assert off(first["weights"]["layer.weight"]) < 1e-6
    for path in (folder / name).rglob("metrics.csv"):
        assert "weights/effective_lr/layer.weight" in path.read_text().splitlines()[0]
    assert list((folder / name).rglob("events.out*"))


@pytest.mark.slow
@pytest.mark.pitfall(26)
def test_an_empty_history_says_why(folder: Path) -> None:
    """The callback of the main process has seen nothing, because the fit ran in others."""
    assert (
        "has logged nothing in this process. If a fit did log, it ran in processes" in (folder / "said.txt").read_text()
    )


@pytest.mark.slow
@pytest.mark.pitfall(10)
def test_an_optimizer_spread_over_processes_is_the_same_optimizer(folder: Path) -> None:
    """ZeroRedundancyOptimizer with AdamW gives the weights and the curves of AdamW.

    Bit for bit: each rank steps its share, and hands it to the others. What would need the state of all of them, the
    measured exponent, has no curve, on either rank.
    """
    (plain, _), (spread, _) = ranks(folder, "fork"), ranks(folder, "zero")
    assert plain["rows"] == spread["rows"]
    assert all(torch.equal(value, spread["weights"][key]) for key, value in plain["weights"].items())


@pytest.mark.slow
@pytest.mark.pitfall(10, 20)
def test_weights_that_ranks_average_after_the_step_are_projected_again(folder: Path) -> None:
    """Local SGD: the average of two points on the sphere lies inside; at the end of the batch it is back.

    That ranks differ in between, and that the average was off, shows that there was something to do.
    """
    (before, after), (_, other) = (found["seen"] for found in ranks(folder, "local"))
    assert max(off(weight) for weight in before) > 1e-4
    assert max(off(weight) for weight in after) < 1e-6
    apart = [not torch.equal(one, two) for one, two in zip(after, other, strict=True)]
    assert any(apart)
    assert not all(apart[2:])
