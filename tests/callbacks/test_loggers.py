"""Every logger gets the same values: TensorBoard's, CSV, W&B offline, a user's own, one that is strict."""

from __future__ import annotations

import csv
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch.loggers as other_namespace
import numpy as np
import pytest
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from pytorch_lightning.loggers.logger import Logger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_normreg import EffectiveLRMonitor, NormSummary, WeightNormMonitor
from tests.harness import Net, RecordingLogger, loader, sgd, trainer

Curves = dict[str, list[tuple[int, float]]]


def fit(*loggers: Logger) -> Curves:
    """What a logger of our own gets beside others; half of it at every step, half at the end of an epoch."""
    recording = RecordingLogger()
    monitors = [EffectiveLRMonitor(gradient=True, scale_exponent=True), WeightNormMonitor(logging_interval="epoch")]
    run = trainer(*monitors, NormSummary(), logger=[*loggers, recording], max_epochs=2)
    run.fit(Net(sgd(weight_decay=0.1)), loader())
    tags = {tag for _, row in recording.rows for tag in row}
    assert {"weights/effective_lr/up.weight", "weights/weight_norm/up.weight", "weights/layers/rotation_max"} <= tags
    assert len(recording.curves("weights/effective_lr/up.weight")) == 12
    assert len(recording.curves("weights/weight_norm/up.weight")) == 2
    return {tag: recording.curves(tag) for tag in tags}


def of_table(path: Path) -> Curves:
    """What a CSV file has."""
    found: Curves = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            for tag, value in row.items():
                if value and tag not in ("step", "epoch"):
                    found.setdefault(tag, []).append((int(row["step"]), float(value)))
    return found


def of_events(folder: str) -> Curves:
    """What TensorBoard has, which keeps float32."""
    events = EventAccumulator(folder).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag != "epoch"]
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}


def test_several_loggers_at_once(tmp_path: Path) -> None:
    """Each has every value, to its last bit, or to float32's; with a logger of the other namespace among them."""
    table, other = CSVLogger(tmp_path, "mine"), other_namespace.CSVLogger(str(tmp_path), "other")
    board = TensorBoardLogger(str(tmp_path))
    expected = fit(table, other, board)
    assert of_table(Path(table.log_dir) / "metrics.csv") == expected
    assert of_table(Path(other.log_dir) / "metrics.csv") == expected
    narrow = {tag: [(step, float(np.float32(v))) for step, v in points] for tag, points in expected.items()}
    assert of_events(board.log_dir) == narrow
    # The table of NormSummary is text, which only TensorBoard's takes.
    assert EventAccumulator(board.log_dir).Reload().Tags()["tensors"] == ["norm_summary/text_summary"]


class Strict(RecordingLogger):
    """Takes plain floats at whole steps, as a database might."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Lightning's own entry, the epoch, is an integer."""
        wrong = {tag: v for tag, v in metrics.items() if type(v) is not float and tag != "epoch"}
        if wrong or type(step) is not int:
            raise TypeError(f"no floats: {wrong}, at {step!r}")
        super().log_metrics(metrics, step)


class Own(Logger):
    """What Lightning asks of a logger, and no more."""

    name = "own"
    version = 0

    def __init__(self) -> None:
        super().__init__()
        self.curves: Curves = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Keep them."""
        for tag, value in metrics.items():
            self.curves.setdefault(tag, []).append((int(step or 0), value))

    def log_hyperparams(self, params: Any) -> None:
        """Nothing."""


def test_loggers_of_a_users_own() -> None:
    """One that takes nothing but floats, and a plain one."""
    own = Own()
    assert fit(Strict(), own) == own.curves


def records(path: Path) -> Iterator[bytes]:
    """Those of a file of W&B: blocks of 32 KiB, in which each piece has its length and which part of a record it is."""
    data, place, record = path.read_bytes(), 7, b""
    while place < len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


@pytest.mark.slow
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that would be synced has every value, over the step that Lightning gives."""
    wandb = pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")
    from wandb.proto import wandb_internal_pb2

    for folder in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{folder}_DIR", str(tmp_path / folder))
    settings = wandb.Settings(console="off", x_disable_stats=True, x_disable_meta=True, disable_git=True)
    logger = WandbLogger(save_dir=tmp_path, offline=True, settings=settings)
    try:
        expected = fit(logger)
        summary = dict(logger.experiment.summary)
    finally:
        wandb.finish()
        wandb.teardown()  # only then the file is whole
    found: Curves = {}
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    for data in records(path):
        history = wandb_internal_pb2.Record.FromString(data).history
        row = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in history.item}
        for tag in row.keys() & expected.keys():
            found.setdefault(tag, []).append((row["trainer/global_step"], row[tag]))
    assert found == expected
    assert {tag: summary[tag] for tag in expected} == {tag: points[-1][1] for tag, points in expected.items()}
