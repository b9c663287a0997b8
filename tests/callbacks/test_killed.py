"""SIGKILL in the middle of an epoch, and the rest of the run from the last checkpoint: bit for bit the whole run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.callbacks.killed import BATCHES, EPOCHS

SCRIPT = Path(__file__).with_name("killed.py")
SAVED = 8
"""Steps in the last checkpoint; the run was killed after nine."""


def load(path: Path) -> Any:
    """What a rank has written."""
    return torch.load(path, weights_only=True)


def same_weights(one: Any, other: Any) -> bool:
    """Bit for bit, buffers included."""
    return one["state"].keys() == other["state"].keys() and all(
        torch.equal(value, other["state"][name]) for name, value in one["state"].items()
    )


@pytest.mark.slow
@pytest.mark.pitfall(19)
@pytest.mark.parametrize("devices", [1, 2])
def test_killed_and_resumed(devices: int, tmp_path: Path) -> None:
    """Weights, and every value logged from the checkpoint on, in all ranks, with means of the cut epoch.

    The loader's order depends on seed and epoch, and it goes on where it was. A plain loader starts the epoch over; a
    run with monitors is still the run without.
    """
    command = [sys.executable, str(SCRIPT), str(devices), str(tmp_path)]
    subprocess.run(command, check=True, timeout=240, capture_output=True, cwd=SCRIPT.parent.parent.parent)
    assert not list(tmp_path.glob("killed*"))  # it did not come to its end
    for rank in range(devices):
        whole, resumed = load(tmp_path / f"whole-{rank}.pt"), load(tmp_path / f"all-{rank}.pt")
        assert same_weights(whole, resumed)
        assert [h[-1]["step"] for h in whole["histories"]] == [EPOCHS * BATCHES - 1] * 3
        for before, after in zip(whole["histories"], resumed["histories"], strict=True):
            assert after == [row for row in before if row["step"] >= SAVED]
        rows = [row for row in whole["rows"] if row[0] >= SAVED]
        assert rows == [row for row in resumed["rows"] if row[0] >= SAVED]
        # With two processes the momentum is scheduled, so that predictions were given up before the checkpoint.
        assert any("weights/equilibrium_ratio/net.0.weight" in row for _, row in rows) == (devices == 1)
        assert {step for step, _ in rows} == set(range(SAVED, EPOCHS * BATCHES))
        # The mean of the second epoch has its first two steps from before, and one of them was never seen again.
        assert any(row["step"] == 2 * BATCHES - 1 for row in resumed["histories"][0])
    if devices == 1:
        assert same_weights(load(tmp_path / "monitors-0.pt"), load(tmp_path / "none-0.pt"))
