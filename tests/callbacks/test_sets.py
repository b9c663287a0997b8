"""Several tensors that are scale-invariant together are one unit: its curves, and what holds and turns it."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_normreg import EffectiveLRMonitor, WeightNormMonitor
from lightning_normreg.steps import StepDispatcher
from tests.callbacks.sets import ANGLE, STREAM, Stream, expected, fitted, flat, writers

pytestmark = pytest.mark.filterwarnings("ignore:The Trainer has no logger")  # the history is read instead

ROOT = Path(__file__).parent.parent.parent
TOLERANCE = {"32": 1e-5, "64": 1e-12}
"""Of sums over 8 to 1000 terms in another order. Rotations of single tensors are 0.01, measured to 1e-6."""
LARGE = 1000
STRATEGIES = {"fsdp": 2, "tp": 2, "hsdp": 4, "fsdp+tp": 4}


@cache
def run(strategy: str, control: str, bits: str) -> list[dict[str, Any]]:
    """What each rank ends with."""
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.callbacks.sets", strategy, control, bits, folder]
        subprocess.run(command, check=True, timeout=240, capture_output=True, cwd=ROOT)
        return [json.loads((Path(folder) / f"{r}.json").read_text()) for r in range(STRATEGIES[strategy])]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("bits", TOLERANCE)
def test_curves_are_those_of_the_concatenation(bits: str, seed: int) -> None:
    """Norm, effective learning rate, rotation, and what the members have of them, at each step."""
    torch.manual_seed(seed)
    model = Stream().to(torch.float64 if bits == "64" else torch.float32)
    monitors = [EffectiveLRMonitor(), WeightNormMonitor()]
    fitted(model, *monitors)
    rows = [monitor.history().to_dict("records") for monitor in monitors]
    assert len(rows[0]) == len(model.steps) == 4
    for step, *logged in zip(model.steps, *rows, strict=True):
        values = logged[0] | logged[1]
        for tag, value in expected(step, writers()).items():
            assert values[tag] == pytest.approx(value, rel=TOLERANCE[bits]), tag
        assert sum(v for tag, v in values.items() if "/set_share/" in tag) == pytest.approx(1, rel=TOLERANCE[bits])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gradients_of_a_set_are_those_of_the_concatenation(seed: int) -> None:
    """Their norm before clipping; and across the set, to rounding, as it is scale-invariant, with members that are not.

    A cosine near 0 is a cancelled sum of 2000 terms, whose error is relative to 1.
    """
    torch.manual_seed(seed)
    model = Stream().double()
    monitor = EffectiveLRMonitor(gradient=True)
    fitted(model, monitor, gradient_clip_val=0.1)
    for (before, _), found, row in zip(model.steps, model.gradients, monitor.history().to_dict("records"), strict=True):
        w, g = flat(before, writers()), flat(found, writers())
        assert row[f"weights/gradient_norm/{STREAM}"] == pytest.approx(float(g.norm()), rel=1e-12)
        cosine = float((w @ g).abs() / w.norm() / g.norm())
        assert row[f"weights/gradient_alignment/{STREAM}"] == pytest.approx(cosine, abs=1e-13)
        assert cosine < 1e-12
        assert row["weights/gradient_alignment/net.embed.weight"] > 1e-3


class Reads(TorchDispatchMode):
    """Counts the entries of large tensors that operations take."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, then go on."""
        sizes = [t.numel() for t in tree_leaves(args) if isinstance(t, Tensor) and t.numel() >= LARGE]
        self.entries += 0 if func.is_view else sum(sizes)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("watch", [EffectiveLRMonitor, WeightNormMonitor])
def test_curves_of_sets_read_no_weight_again(watch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many entries of large tensors are read with sets as without: these are all that is in the set."""
    found = []
    for symmetries in (None, "auto"):
        reads = Reads()
        for name in ("enter", "leave"):
            plain = getattr(StepDispatcher, name)

            def counting(self: Any, *args: Any, plain: Any = plain, reads: Reads = reads) -> Any:
                with reads:
                    return plain(self, *args)

            monkeypatch.setattr(StepDispatcher, name, counting)
        model = Stream(width=32, words=32)
        assert min(model.get_parameter(name).numel() for name in writers()) >= LARGE
        monitor = watch(symmetries=symmetries)
        fitted(model, monitor)
        found.append(reads.entries)
        monkeypatch.undo()
        assert any(STREAM in tag for tag in monitor.history()) == (symmetries == "auto")
    assert found[0] == found[1] > 0


@pytest.mark.slow
@pytest.mark.parametrize("bits", TOLERANCE)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sharded_curves_are_those_of_the_concatenation(strategy: str, bits: str) -> None:
    """Members spread in different ways, or on every process: put together around each step, and alike on all ranks."""
    first, *others = run(strategy, "free", bits)
    assert all(json.dumps(other) == json.dumps(first) for other in others)
    assert len(first["history"]) == 4
    for values, step in zip(first["history"], first["expected"], strict=True):
        for tag, value in step.items():
            assert values[tag] == pytest.approx(value, rel=TOLERANCE[bits]), tag


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy, control", [("fsdp", "project"), ("tp", "rotate"), ("hsdp", "rotate"), ("fsdp+tp", "project")]
)
def test_sharded_sets_are_held_and_turned(strategy: str, control: str) -> None:
    """At the norm of the start; by the angle, as the weights themselves say."""
    first, *_ = run(strategy, control, "64")
    assert first["norms"] == pytest.approx([first["norms"][0]] * 4, rel=1e-14)
    rotations = [step[f"weights/rotation/{STREAM}"] for step in first["expected"]]
    if control == "rotate":
        assert rotations == pytest.approx([ANGLE] * 4, rel=1e-10)
    logged = [values[f"weights/rotation/{STREAM}"] for values in first["history"]]
    assert logged == pytest.approx(rotations, rel=1e-10)
