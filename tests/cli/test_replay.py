"""``--rotation.replay RUN``: the rotations in a folder of logs on another run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.harness import fit, logged

WEIGHT = "weights/rotation/hidden.weight"
TOLERANCE = 2e-7
"""Radians: what storing a weight in float32 rounds the angle of a step by."""


@pytest.fixture(autouse=True)
def _seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning warns where no test of this process has set a seed before."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")


def other(run: Path, *args: str) -> Path:
    """A run with another optimizer and learning rate."""
    return fit({"optimizer": {"class_path": "SGD", "init_args": {"lr": 0.1}}}, f"--rotation.replay={run}", *args,
               "--rotation.include=[hidden.weight]")  # fmt: skip


@pytest.mark.slow
def test_a_run_turns_as_another_one_did(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By its CSV file; over its share of a run of another length where that is asked for; else that is refused."""
    first = fit({"optimizer": {"class_path": "AdamW", "init_args": {"lr": 0.01}}})
    turned = logged(first, WEIGHT)
    assert len(turned) == 12
    assert logged(other(first), WEIGHT) == pytest.approx(turned, rel=1e-5, abs=TOLERANCE)
    longer = logged(other(first, "--trainer.max_epochs=4", "--rotation.replay_over=share"), WEIGHT)
    assert len(longer) == 24
    assert [longer[0], longer[-1]] == pytest.approx([turned[0], turned[-1]], rel=1e-5, abs=TOLERANCE)
    with pytest.raises(SystemExit, match=r"^2$"):
        other(first, "--trainer.max_epochs=4")
    said = capsys.readouterr().err.partition("\nerror: ")[2]
    assert said.startswith("rotation: `replay` must be as long as the run with replay_over='steps', but its last step")
    assert len([*folder.glob("lightning_logs/*/metrics.csv")]) == 3  # before the first step, so nothing is logged


def test_a_run_without_curves(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Is refused with the key."""
    first = fit({"optimizer": {"class_path": "SGD", "init_args": {"lr": 0.1}}}, "--monitor=false")
    with pytest.raises(SystemExit, match=r"^2$"):
        other(first)
    assert "error: rotation: `replay` must be the log of a run." in capsys.readouterr().err
