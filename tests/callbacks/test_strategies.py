"""Every strategy gives the numbers of a single device, in real processes.

``python -m tests.callbacks.test_strategies`` prints the table of differences.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

SCRIPT = Path(__file__).with_name("strategies.py")
STRATEGIES = {"ddp": 2, "fsdp": 2, "fsdp1": 2, "tp": 2, "fsdp+tp": 4, "hsdp": 4}


class Config(NamedTuple):
    """What is trained: optimizer, units, whether norms are held, and the type."""

    optimizer: str
    unit: str
    project: str
    bits: str


CONFIGS = [
    Config("adamw", "auto", "project", "32"),
    Config("sgd", "neuron", "project", "64"),
    Config("sgd", "layer", "free", "32"),
]
TRIED = {"fsdp": 3, "fsdp1": 1, "fsdp+tp": 1}  # how many of these, to save time; else two
RUNS = [(strategy, config) for strategy in STRATEGIES for config in CONFIGS[: TRIED.get(strategy, 2)]]
RUNS.append(("fsdp1", CONFIGS[1]._replace(bits="32")))  # Lightning's FSDPStrategy computes in float32
TURNED = Config("adamw", "auto", "rotate", "32")
RUNS += [(strategy, TURNED) for strategy in STRATEGIES]
RUNS += [("fsdp", Config("sgd", "neuron", "rotate-mean", "64")), ("tp", Config("sgd", "layer", "rotate", "32"))]
OBSERVED = Config("adamw", "auto", "observe", "32")
RUNS += [("fsdp", OBSERVED), ("fsdp1", OBSERVED)]
ASKED = Config("adamw", "auto", "asked", "32")  # without a verdict: on a copy, or in place
RUNS += [(strategy, ASKED) for strategy in STRATEGIES]
LOGGED = 5  # of 12 steps: the first one, and every third
# After 12 steps; sums over another order of 4 to 144 terms, carried on by the optimizer.
TOLERANCE = {"32": 1e-5, "64": 1e-12}


@cache
def run(strategy: str, config: Config) -> list[dict[str, Any]]:
    """What each rank ends with."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(SCRIPT), strategy, *config[:3], folder, config.bits]
        root = SCRIPT.parent.parent.parent
        subprocess.run(command, check=True, timeout=240, capture_output=True, cwd=root)
        return [json.loads((Path(folder) / f"{r}.json").read_text()) for r in range(STRATEGIES.get(strategy, 1))]


def differences(strategy: str, config: Config) -> tuple[float, float]:
    """Largest relative difference to a single device: of the logged values, and of the weights, as norms."""
    (reference,), (found, *others) = run("single", config), run(strategy, config)
    for other in others:  # as text, because the history has NaN where a curve has no value
        assert json.dumps(other["history"]) == json.dumps(found["history"]), "ranks differ"
    # When observed, for 33 of 36 steps, the first logged step is the one after that.
    rows = 2 if config.project == "observe" else LOGGED
    assert len(found["history"]) == len(reference["history"]) == 2 * rows
    values = []
    for row, expected in zip(found["history"], reference["history"], strict=True):
        assert row.keys() == expected.keys()
        for tag, value in expected.items():
            if math.isfinite(value):
                # A cosine near 0 is a cancelled sum, whose error is relative to 1.
                size = 1.0 if tag.startswith("weights/gradient_alignment") else abs(value)
                values.append(abs(row[tag] - value) / max(size, 1e-30))
            else:
                assert not math.isfinite(row[tag])
    weights = []
    for name, expected in reference["weights"].items():
        one, other = (torch.tensor(w, dtype=torch.float64) for w in (expected, found["weights"][name]))
        weights.append(float((one - other).norm() / one.norm()))
    return max(values), max(weights)


@pytest.mark.slow
@pytest.mark.pitfall(11, 12, 13, 14, 15, 21)
@pytest.mark.parametrize(
    "strategy, config", RUNS, ids=lambda value: value if isinstance(value, str) else "-".join(value)
)
def test_the_numbers_are_those_of_a_single_device(strategy: str, config: Config) -> None:
    """Every logged value and every weight, with uneven and empty shards, after a validation that unshards the root."""
    values, weights = differences(strategy, config)
    assert values < TOLERANCE[config.bits]
    assert weights < TOLERANCE[config.bits]


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy, config",
    [r for r in RUNS if r[1].project == "project"],
    ids=lambda v: v if isinstance(v, str) else "-".join(v),
)
def test_norms_and_radii_are_those_of_a_single_device(strategy: str, config: Config) -> None:
    """What a table shows of held weights, from every process: norms before the last projection, and radii."""
    (reference,), found = run("single", config), run(strategy, config)
    assert len(reference["held"]) >= 2
    for process in found:
        assert process["held"].keys() == reference["held"].keys()
        for name, numbers in reference["held"].items():
            assert process["held"][name] == pytest.approx(numbers, rel=TOLERANCE[config.bits]), name


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "tp", "fsdp+tp", "hsdp"])
def test_collectives_do_not_grow_with_the_number_of_layers(strategy: str) -> None:
    """One all-reduce for each dimension of the mesh that a tensor is spread over, whatever is measured of all layers.

    Along a dimension that weights are only copied along, as in "hsdp", there is none.

    A logged step has one, for norms, gradients and rotations together; a projected step one more, where a unit is
    spread over processes, and none for rows under row sharding. Every third step the projection also looks whether the
    norms are still where it has put them. The first projection asks for norms five times: which are off, by what
    factor, before, to project, and after.
    """
    dimensions = 2 if strategy == "fsdp+tp" else 1
    logged, steps, looked = LOGGED, 12, 4
    (first, *_) = run(strategy, CONFIGS[0])
    assert first["collectives"] == dimensions * (logged + looked + steps + 5)
    if strategy in ("fsdp", "hsdp"):
        (first, *_) = run(strategy, CONFIGS[1])
        assert first["collectives"] == logged + looked + 4
    if strategy == "fsdp":
        (first, *_) = run(strategy, CONFIGS[2])
        assert first["collectives"] == logged


@pytest.mark.slow
@pytest.mark.pitfall(19)
def test_a_sharded_run_resumes(tmp_path: Path) -> None:
    """Under FSDP2, from a distributed checkpoint: weights and curves bit for bit, with radii of the first run."""
    command = [sys.executable, str(SCRIPT.with_name("sharded_resume.py")), str(tmp_path)]
    subprocess.run(command, check=True, timeout=240, capture_output=True, cwd=SCRIPT.parent.parent.parent)
    for rank in (0, 1):
        whole, resumed = json.loads((tmp_path / f"{rank}.json").read_text())
        assert resumed[0] == whole[0]
        for before, after in zip(whole[1:], resumed[1:], strict=True):
            assert len(after) == 6
            assert json.dumps(after) == json.dumps(before[6:])  # as text, because of NaN


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "tp", "fsdp+tp"])
def test_a_controlled_step_has_one_reduction(strategy: str) -> None:
    """For each dimension of the mesh, also where it looks whether norms are still held, which it knows already.

    The first projection asks four times, as it announces no factors.
    """
    dimensions = 2 if strategy == "fsdp+tp" else 1
    (first, *_) = run(strategy, TURNED)
    assert first["collectives"] == dimensions * (LOGGED + 12 + 4)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_decay_does_is_said_alike(strategy: str) -> None:
    """Symmetries asked on a copy or in place: the labels of a single device, on every process."""
    ((expected,),) = (result["acts"] for result in run("single", ASKED))
    assert {"schedule", "acts itself"} <= set(expected.values())
    for result in run(strategy, ASKED):
        assert result["acts"] == [expected]


def main() -> None:
    """The table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("strategy", "optimizer", "unit", "projection", "bits", "logged values", "weights", "all-reduces")
    for strategy, config in RUNS:
        values, weights = differences(strategy, config)
        count = run(strategy, config)[0]["collectives"]
        table.add_row(strategy, *config, f"{values:.1e}", f"{weights:.1e}", str(count))
    Console().print(table)


if __name__ == "__main__":
    main()
