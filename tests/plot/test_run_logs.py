"""What was logged comes back: from TensorBoard's files and from CSV, wherever they lie."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter

from lightning_normreg import EffectiveLRMonitor, WeightNormMonitor, plot_curves
from lightning_normreg._plot import read_runs
from tests.harness import Net, loader, sgd, trainer
from tests.plot.harness import history


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pd.DataFrame]:
    """A folder with a run of each logger, and what the monitors remember of it."""
    folder = tmp_path_factory.mktemp("logs")
    monitors = WeightNormMonitor(histograms=True), EffectiveLRMonitor()
    loggers = [TensorBoardLogger(folder, "events", prefix="my-run"), CSVLogger(folder, "table", prefix="my-run")]
    trainer(*monitors, logger=loggers).fit(Net(sgd(weight_decay=0.1)), loader())
    norms, rates = (monitor.history().drop(columns="epoch").set_index("step") for monitor in monitors)
    both = norms.join(rates)
    return folder, both.rename(columns=lambda tag: tag.removeprefix("weights/"))


def written(folder: Path, tags: dict[str, list[tuple[int, float]]]) -> Path:
    """One event file."""
    with SummaryWriter(str(folder)) as writer:
        for tag, points in tags.items():
            for step, value in points:
                writer.add_scalar(tag, value, step)
    return folder


@pytest.mark.parametrize(
    "place, rel", [("events/version_0", 6e-8), ("table/version_0", 0.0), ("table/version_0/metrics.csv", 0.0)]
)
def test_curves_come_back(place: str, rel: float, logs: tuple[Path, pd.DataFrame]) -> None:
    """All of them, without any prefix; TensorBoard rounds to float32 (half an ulp, 2^-24), CSV not at all."""
    folder, expected = logs
    (found,) = read_runs(folder / place).values()
    assert set(found.columns) == set(expected.columns)
    assert found.index.tolist() == expected.index.tolist()
    for tag in expected.columns:
        assert found[tag].tolist() == pytest.approx(expected[tag].tolist(), rel=rel, abs=0.0)
    if "events" in place:
        assert list(found.columns) == list(expected.columns)  # the layers by depth


def test_a_folder_of_runs(logs: tuple[Path, pd.DataFrame]) -> None:
    """Each run beneath it, by its path; and an event file by itself."""
    folder, expected = logs
    assert list(read_runs(folder)) == [f"{folder}/events/version_0", f"{folder}/table/version_0"]
    (events,) = (folder / "events" / "version_0").glob("events.out.tfevents*")
    ((name, table),) = read_runs(events).items()
    assert name == str(events)
    assert len(table) == len(expected)
    titles = [axes.get_title() for axes in plot_curves(folder).axes]
    assert titles[:2] == ["events/version_0", "table/version_0"]


def test_histories_of_two_monitors_are_one_run() -> None:
    """Joined by the step."""
    whole = history(3)
    norms = whole.filter(regex="^step|^epoch|norm")
    rates = whole.drop(columns=[c for c in norms.columns if c not in ("step", "epoch")])
    both, one = plot_curves([norms, rates]), plot_curves(whole)
    for joined, single in zip(both.axes, one.axes, strict=True):
        assert joined.get_title() == single.get_title()
        pairs = zip(joined.lines, single.lines, strict=True)
        assert all(list(a.get_ydata()) == list(b.get_ydata()) for a, b in pairs)


def test_a_resumed_run_and_several_prefixes(tmp_path: Path) -> None:
    """Of steps that were run twice the second time counts; two loggers in one folder are two runs."""
    tag = "weights/effective_lr/a.weight"
    written(tmp_path, {tag: [(0, 1.0), (5, 2.0), (10, 3.0)]})
    written(tmp_path, {tag: [(10, 4.0), (15, 5.0)], f"other-{tag}": [(0, 7.0)]})
    written(tmp_path, {"generator/effective_lr/a.weight": [(0, 8.0)]})
    first, other, generator = (table["effective_lr/a.weight"].to_dict() for table in read_runs(tmp_path).values())
    assert (first, other, generator) == ({0: 1.0, 5: 2.0, 10: 4.0, 15: 5.0}, {0: 7.0}, {0: 8.0})
    assert list(read_runs(tmp_path)) == [f"{tmp_path} ({name})" for name in ("no prefix", "other", "generator")]


def test_logs_of_before_the_first_release(tmp_path: Path) -> None:
    """Their tags had another name for the rotation, and no prefix; resumed with the new ones they are one run."""
    written(tmp_path, {"angular_update/a.weight": [(0, 1.0)], "layers/angular_update_max": [(0, 1.5)]})
    written(tmp_path, {"weights/rotation/a.weight": [(5, 2.0)], "weights/layers/rotation_max": [(5, 2.5)]})
    (found,) = read_runs(tmp_path).values()
    assert found.to_dict() == {"rotation/a.weight": {0: 1.0, 5: 2.0}, "layers/rotation_max": {0: 1.5, 5: 2.5}}


def test_layers_of_a_table_are_in_natural_order(tmp_path: Path) -> None:
    """A CSVLogger sorts columns as text: 10 before 2."""
    names = [f"layers.{layer}.weight" for layer in (0, 1, 10, 11, 2)]
    pd.DataFrame({"step": [0], **{f"weights/weight_norm/{name}": [1.0] for name in names}}).to_csv(
        tmp_path / "metrics.csv"
    )
    (found,) = read_runs(tmp_path).values()
    assert [c.split(".")[1] for c in found.columns] == ["0", "1", "2", "10", "11"]


def test_more_points_than_tensorboard_samples(tmp_path: Path) -> None:
    """All of them, where TensorBoard itself would show 1000; the user's own tags are left out."""
    points = [(step, float(step)) for step in range(1500)]
    written(tmp_path, {"weights/weight_norm/a": points, "loss": points, "weights/layers/other_min": points})
    (found,) = read_runs(tmp_path).values()
    assert list(found.columns) == ["weight_norm/a"]
    assert found["weight_norm/a"].tolist() == [value for _, value in points]


def cut(folder: Path) -> Path:
    """An event file that ends within an event."""
    written(folder, {"weights/weight_norm/a": [(step, 1.0) for step in range(50)]})
    (file,) = folder.iterdir()
    file.write_bytes(file.read_bytes()[:-7])
    return folder


def test_a_run_that_was_killed_while_writing(tmp_path: Path) -> None:
    """What is whole is read."""
    (found,) = read_runs(cut(tmp_path)).values()
    assert len(found) == 49


def table(folder: Path, content: bytes) -> Path:
    """A CSV file."""
    (folder / "metrics.csv").write_bytes(content)
    return folder


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda f: f / "nothing", r"There is no .*nothing'. Give the folder"),
        (lambda f: f, r"has no logs: neither an event file of TensorBoard nor a metrics.csv"),
        (lambda f: written(f, {"loss": [(0, 1.0)]}), r"has logs, but no curves of this package. Train with"),
        (lambda f: table(f, b"step,loss\n1,2\n"), r"has logs, but no curves of this package"),
        (lambda f: table(f, b"weights/weight_norm/a\n2\n"), r"has no column 'step'"),
        (lambda f: table(f, b""), r"cannot be read as a table of CSVLogger: No columns"),
        (lambda f: table(f, b"\xff\xfe\x00weight_norm/a"), r"cannot be read as a table of CSVLogger"),
        (lambda f: Path(shutil.copy(__file__, f / "curves.txt")), r"is neither an event file of TensorBoard nor a CSV"),
        (lambda f: Path(shutil.copy(__file__, f / "x.tfevents.1")), r"has logs, but no curves|cannot be read"),
    ],
)
def test_errors(make: Any, message: str, tmp_path: Path) -> None:
    """What is wrong with which path, and what to do."""
    path = make(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        read_runs(path)
    assert str(tmp_path) in str(caught.value)
