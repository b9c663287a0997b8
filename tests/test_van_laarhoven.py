"""The experiment: its statistics against planted answers, its reader of CIFAR-10, and its resumption."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import signal
import struct
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from examples.van_laarhoven.__main__ import main
from examples.van_laarhoven.cifar10 import read_archive
from examples.van_laarhoven.data import load
from examples.van_laarhoven.estimates import (
    Array,
    Interval,
    along,
    along_less_across,
    along_over_across,
    collapse,
    components,
    exponent,
    jackknife,
    mean_interval,
    permutation_p,
)
from examples.van_laarhoven.grid import CIFAR10, DIGITS, TINY, Cell, Settings
from examples.van_laarhoven.measured import Measured
from examples.van_laarhoven.model import MOMENTUM
from examples.van_laarhoven.store import Store
from examples.van_laarhoven.train import CURVES
from examples.van_laarhoven.trends import (
    Trend,
    flat_along_diagonals,
    levelling,
    no_effect_under_projection,
    norm_growth,
)
from lightning_normreg.functional import project_

ROOT = Path(__file__).parent.parent
SEEDS, LRS, DECAYS, NOISE = 4, 5, 5, 0.1


def noisy(means: Array, draw: np.random.Generator) -> Array:
    """Cells with these means; each seed moves all of its cells together, far more than noise does."""
    seeds = draw.normal(0, 1, (SEEDS, 1, 1))
    return means + seeds + draw.normal(0, NOISE, (SEEDS, *means.shape))


def diagonal(along_too: float = 0.0) -> Array:
    """Logarithms of errors that depend on i + j, and by as much as asked on i − j too."""
    i, j = np.indices((LRS, DECAYS))
    return np.sin(0.8 * (i + j)) + along_too * np.sin(0.8 * (i - j))


def test_variance_of_the_cells_without_the_noise() -> None:
    """Over many grids the estimate has the planted variance as its mean; of cells that are all alike it is 0.

    The estimate's standard deviation is at most 2·NOISE²/√df + 2·NOISE·√variance/√(n·df), with df > 60 degrees of
    freedom over the lines of 200 grids; four of those of their mean are 0.004.
    """
    draw = np.random.default_rng(0)
    for means in (diagonal(1.0), np.zeros((LRS, DECAYS))):
        planted = components(along(np.broadcast_to(means, (SEEDS, LRS, DECAYS)))).variance
        found = [components(along(noisy(means, draw))).variance for _ in range(200)]
        assert np.mean(found) == pytest.approx(planted, abs=0.004)


def test_variance_of_one_line_by_hand() -> None:
    """Cells of means 1, 3, 5, two seeds 10 apart, and a residual of ±1 in the first two cells."""
    line = np.array([[2.0, 2.0, 5.0], [10.0, 14.0, 15.0]])
    found = components([line])
    # Means 6, 8, 10: 2·(4 + 0 + 4)/2 = 8. Residuals of the first seed: −4, −6, −5 less the seed's −5: 1, −1, 0.
    assert found == pytest.approx((8.0, 2.0, 2))
    assert found.variance == pytest.approx(3.0)


def test_flat_along_diagonals_is_found() -> None:
    """Errors of i + j alone have the ratio 0, within noise, and no shuffled grid is as flat."""
    grid = noisy(diagonal(), np.random.default_rng(1))
    found = jackknife(along_over_across, grid)
    assert abs(found.value) < 0.05
    assert found.high < 0.5
    assert along_less_across(grid, 0.5).high < 0
    assert permutation_p(grid) < 0.05


@pytest.mark.parametrize("transpose", [False, True], ids=["decay alone", "learning rate alone"])
def test_an_effect_of_one_axis_alone_is_no_diagonal(transpose: bool) -> None:
    """It changes errors along diagonals as much as across, and is no rarer among shuffled grids."""
    means = np.broadcast_to(np.sin(0.8 * np.arange(LRS)), (LRS, DECAYS))
    grid = noisy(means.T if transpose else means, np.random.default_rng(2))
    assert jackknife(along_over_across, grid).value == pytest.approx(1, abs=0.1)
    assert along_less_across(grid, 0.5).high > 0
    assert permutation_p(grid) > 0.005  # 0.005 is what one in two hundred seeds would give


def covered(estimate: Callable[[np.random.Generator], Any], truth: float, times: int = 400) -> float:
    """Share of intervals that hold the truth."""
    draw = np.random.default_rng(3)
    return float(np.mean([truth in estimate(draw) for _ in range(times)]))


def test_coverage_of_the_exponent() -> None:
    """95 % of the intervals hold the planted exponent: of 400, within four standard errors of 1.1 %."""
    x = np.geomspace(1, 1000, 8)

    def fit(draw: np.random.Generator) -> Any:
        return exponent(
            x, 3.0 * x**0.25 * np.exp(draw.normal(0, 0.05, (SEEDS, len(x))) + draw.normal(0, 1, (SEEDS, 1)))
        )

    assert covered(fit, 0.25) == pytest.approx(0.95, abs=0.044)
    assert covered(fit, 0.3) < 0.1


@pytest.mark.parametrize("part", [0.3, 1.0])
def test_coverage_of_the_ratio_of_variances(part: float) -> None:
    """95 % of the jackknife's intervals hold the planted ratio, within four standard errors of 1.1 %."""
    means = diagonal(part)
    truth = along_over_across(np.broadcast_to(means, (SEEDS, LRS, DECAYS)))
    share = covered(lambda draw: jackknife(along_over_across, noisy(means, draw)), truth)
    assert share == pytest.approx(0.95, abs=0.044)


@pytest.mark.slow
def test_false_alarms_where_nothing_has_an_effect() -> None:
    """Intervals end below 0 in 2.5 % of grids of noise, where the truth is 0: of 400, within four standard errors."""
    draw = np.random.default_rng(7)
    nothing, kept = np.zeros((LRS, DECAYS)), np.ones((LRS, DECAYS), dtype=np.bool_)
    flat = [along_less_across(noisy(nothing, draw), 0.5).high < 0 for _ in range(400)]
    collapsed = [collapse(noisy(nothing, draw), noisy(nothing, draw), kept, 0.25)[1].high < 0 for _ in range(400)]
    assert np.mean(flat) < 0.025 + 0.031
    assert np.mean(collapsed) < 0.025 + 0.031


def test_collapse_of_the_spread_over_decays() -> None:
    """A planted collapse is found, an equal spread is not called one, and cells that are left out do not count."""
    draw = np.random.default_rng(4)
    means = np.broadcast_to(np.linspace(0, 2, DECAYS), (LRS, DECAYS))
    kept = np.ones((LRS, DECAYS), dtype=np.bool_)

    def collapsed(plain: Array, projected: Array) -> tuple[Interval, Interval]:
        return collapse(noisy(plain, draw), noisy(projected, draw), kept, 0.25)

    assert all(found.high < limit for found, limit in zip(collapsed(means, 0 * means), (0.05, 0), strict=True))
    ratio, rule = collapsed(means, means)
    assert 1 in ratio
    assert rule.low > 0
    kept[:, -1] = False
    assert collapsed(means, 5.0 * (np.arange(DECAYS) == DECAYS - 1) + 0 * means)[1].high < 0


def test_too_few_seeds_have_no_interval() -> None:
    """One seed says nothing of the mean, two nothing of a ratio."""
    assert mean_interval([1.0]).high == np.inf
    assert jackknife(along_over_across, noisy(diagonal(), np.random.default_rng(5))[:2]).high == np.inf


# --- the rules, on made results ---

STEPS, LOGGED = 400, list(range(0, 400, 10))


def made(error: Callable[[Cell], float], norm: Callable[[Cell, Array], Array]) -> dict[Cell, Any]:
    """Results of a whole grid with these errors and norms, whose gradient at norm 1 is 1."""
    draw = np.random.default_rng(6)
    results = {}
    for cell in DIGITS.cells():
        norms = norm(cell, np.array(LOGGED) + 1.0) * np.exp(draw.normal(0, 0.002, len(LOGGED)))
        power = 2 if cell.optimizer == "sgd" else 1
        curves = {"unit_norm_rms": norms, "weight_norm": norms, "effective_lr": cell.lr / norms**power}
        curves |= {"gradient_norm": 1 / norms, "rotation": norms}
        assert set(curves) == set(CURVES)
        results[cell] = {
            "error": error(cell) * np.exp(draw.normal(0, 0.05)),
            "steps": STEPS,
            "logged": LOGGED,
            "entries": [100],
            "curves": {key: [list(values)] for key, values in curves.items()},
        }
    return results


def constant_noise(cell: Cell, step: Array) -> Array:
    """What SGD's norms do under constant noise: N⁴ goes from 1 to lr/decay; without decay, N⁴ = 1 + 400·lr²·step."""
    if not cell.decay:
        return (1 + 400 * cell.lr**2 * step) ** 0.25
    settled = cell.lr / cell.decay
    return (settled + (1 - settled) * np.exp(-40 * cell.lr * cell.decay * step)) ** 0.25


def by_rate(cell: Cell) -> float:
    """An error that depends on lr·decay alone, but on the learning rate alone under projection."""
    rate = cell.lr if cell.projected else cell.lr * cell.decay
    return float(10 * np.exp(np.sin(np.log(rate + 1e-9))))


def by_decay(cell: Cell) -> float:
    """An error that depends on the decay alone, projected or not."""
    return float(10 * np.exp(np.sin(np.log(cell.decay + 1e-9))))


def judged(results: dict[Cell, Any]) -> list[Trend]:
    """The four trends of SGD."""
    plain, projected = (Measured(DIGITS, results, "sgd", p) for p in (False, True))
    return [
        flat_along_diagonals(plain),
        no_effect_under_projection(plain, projected),
        norm_growth(plain),
        levelling(plain),
    ]


def test_trends_that_are_there_are_reported() -> None:
    """All four; fitted exponents are the planted 1/4 and 1/2, but for what is left of the start, e^(−6) at most."""
    trends = judged(made(by_rate, constant_noise))
    assert [t.appeared for t in trends] == [True] * 4
    told = [s for s in trends[3].sentences if "Exponent" in s]
    fitted = [float(s.rpartition(": ")[2].split(" [")[0]) for s in told]
    assert fitted == pytest.approx([1 / 4, 1 / 2, 1 / 2, 1 / 4], abs=0.005)


def test_trends_that_are_not_there_are_reported_as_such() -> None:
    """Errors that follow decay, and norms that do without decay what they should do with it, and the reverse."""

    def reverse(cell: Cell, step: Array) -> Array:
        return 1 + 0 * step if not cell.decay else step**0.25

    trends = judged(made(by_decay, reverse))
    assert [t.appeared for t in trends] == [False] * 4


# --- CIFAR-10 ---

NAMES = [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]


class Python2Pickler(pickle._Pickler):  # type: ignore[misc, name-defined]
    """Writes what Python 2 wrote: protocol 2, its strings, and NumPy's old module."""

    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_string(self, value: Any) -> None:
        """A byte string."""
        data = value.encode("latin-1") if isinstance(value, str) else value
        self.write(b"T" + struct.pack("<i", len(data)) + data)
        self.memoize(value)

    dispatch[bytes] = dispatch[str] = save_string


def python2(value: Any) -> bytes:
    """A pickle as in the archive."""
    stream = io.BytesIO()
    Python2Pickler(stream, protocol=2).dump(value)
    return stream.getvalue().replace(b"cnumpy._core.multiarray", b"cnumpy.core.multiarray")


def batch(number: int) -> dict[str, Any]:
    """Two images of a batch, whose first values and labels are its number."""
    images = np.full((2, 3072), 7, dtype=np.uint8)
    images[:, 0] = number
    return {"batch_label": f"batch {number}", "labels": [number, 9], "data": images, "filenames": ["a.png", "b.png"]}


def archive(path: Path, contents: dict[str, bytes]) -> tuple[Path, str]:
    """A gzipped tar file, and its md5."""
    with tarfile.open(path, "w:gz") as tar:
        for name, data in contents.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path, hashlib.md5(path.read_bytes()).hexdigest()


def whole() -> dict[str, bytes]:
    """All batches."""
    return {name: python2(batch(k)) for k, name in enumerate(NAMES)}


def test_archive_is_read(tmp_path: Path) -> None:
    """The five training batches in order, and the test batch; channels, rows and columns as they should be."""
    contents = whole()
    assert b"cnumpy.core.multiarray\n_reconstruct" in contents["test_batch"]
    found = read_archive(*archive(tmp_path / "a", contents))
    assert found.train_images.shape == (10, 3, 32, 32)
    assert found.train_images[:, 0, 0, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert found.train_labels.tolist() == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9]
    assert found.test_images[:, 0, 0, 0].tolist() == [5, 5]
    assert found.test_labels.tolist() == [5, 9]
    assert set(found.train_images[:, 1:].unique().tolist()) == {7}


class Malicious:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", [2, 4])
def test_nothing_in_the_archive_is_executed(protocol: int, tmp_path: Path) -> None:
    """Not even with the right md5; a plain load of the same bytes does execute it."""
    mark = tmp_path / "executed"
    evil = pickle.dumps({"data": Malicious(mark), "labels": []}, protocol)
    with pytest.raises(ValueError, match=r"which CIFAR-10 has no use for. Download https"):
        read_archive(*archive(tmp_path / "a", whole() | {"data_batch_3": evil}))
    assert not mark.exists()
    pickle.loads(evil)
    assert mark.exists()


@pytest.mark.parametrize(
    "spoil, match",
    [
        ({"data_batch_2": b"no pickle"}, "must hold a batch of images in data_batch_2"),
        ({"test_batch": python2(batch(11))}, "labels 0 to 9"),
        ({"test_batch": python2(batch(1) | {"data": np.zeros((2, 3071), dtype=np.uint8)})}, r"got uint8 \(2, 3071\)"),
        ({"test_batch": None}, "must hold the file cifar-10-batches-py/test_batch"),
    ],
)
def test_archives_that_are_not_the_one(spoil: dict[str, Any], match: str, tmp_path: Path) -> None:
    """Each error says what is wrong, and where the right one is."""
    contents = {name: data for name, data in (whole() | spoil).items() if data is not None}
    with pytest.raises(ValueError, match=match + ".*Download https"):
        read_archive(*archive(tmp_path / "a", contents))


def test_files_that_are_no_archive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Missing, of another md5, or no tar file with the right one; the command says so without a traceback."""
    path = tmp_path / "cifar-10-python.tar.gz"
    with pytest.raises(SystemExit, match="2"):
        main(["--data", "cifar10", "--archive", str(path)])
    assert "which is no file. Download https" in capsys.readouterr().err
    path.write_bytes(b"cut off")
    with pytest.raises(SystemExit, match="2"):
        main(["--data", "cifar10", "--archive", str(path)])
    assert "must have the md5 c58f30108f718f92721af3b95e74349a" in capsys.readouterr().err
    with pytest.raises(ValueError, match="must be a gzipped tar file"):
        read_archive(path, hashlib.md5(b"cut off").hexdigest())


def test_a_network_for_the_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of the archive are standardized and go through the network; labels are redrawn only if asked for."""
    from examples.van_laarhoven import data
    from examples.van_laarhoven.model import ConvNet

    path, md5 = archive(tmp_path / "a", whole())
    monkeypatch.setattr(data, "read_archive", lambda path: read_archive(path, md5))
    images = load(CIFAR10, 0, path)
    scaled, labels = images.batch(labels_of_all := images.train_labels.new_tensor(range(10)))
    assert labels.tolist() == images.train_labels[labels_of_all].tolist()
    assert scaled[0, :, 5, 5].tolist() == pytest.approx([(7 - 125.3) / 63.0, (7 - 123.0) / 62.1, (7 - 113.9) / 66.7])
    assert ConvNet(images.shape, CIFAR10.widths)(scaled).shape == (10, 10)


# --- the run ---

COMMAND = [sys.executable, "-m", "examples.van_laarhoven", "--tiny", "--epochs", "1"]


def finished(folder: Path) -> dict[str, tuple[int, str]]:
    """Finished cells, when each was written, and what is in it."""
    return {p.name: (p.stat().st_mtime_ns, p.read_text()) for p in (folder / "cells").glob("[!.]*.json")}


@pytest.mark.slow
def test_killed_half_way_it_loses_no_finished_cell(tmp_path: Path) -> None:
    """Started again it runs the others alone, and reports."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run: dict[str, Any] = {"cwd": ROOT, "env": environment, "stderr": subprocess.PIPE, "text": True}
    command = [*COMMAND, "--out", str(tmp_path / "out"), "--seeds", "1", "--jobs", "1", "--backend", "sequential"]
    killed = subprocess.Popen(command, start_new_session=True, **run)
    deadline = time.monotonic() + 120
    while len(finished(tmp_path / "out")) < 5 and time.monotonic() < deadline and killed.poll() is None:
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    _, said = killed.communicate()
    before = finished(tmp_path / "out")
    total = 24
    assert 5 <= len(before) < total, said
    (tmp_path / "out" / "cells" / ".half.json.123").write_text('{"error": 1')  # a draft that was being written
    again = subprocess.run(command, check=True, **run)
    assert f"{len(before)}/{total}" in again.stderr
    after = finished(tmp_path / "out")
    assert len(after) == total
    assert {name: after[name] for name in before} == before
    for name in ("report.md", "error.png", "decay.png", "time.png"):
        assert (tmp_path / "out" / name).stat().st_size > 1000


@pytest.mark.slow
def test_processes_and_one_after_the_other_give_the_same(tmp_path: Path) -> None:
    """A cell is what its settings say, whatever ran it and in whatever order."""
    from examples.van_laarhoven.sweep import sweep
    from examples.van_laarhoven.train import run_cell

    settings = Settings(
        **(vars(TINY) | {"epochs": 1, "seeds": (3,), "lrs_sgd": (0.1,), "decays_sgd": (), "lrs_adam": ()})
    )
    store = Store(tmp_path, settings)
    sweep(settings, store, jobs=2)
    kept = store.load(settings.cells())
    assert len(kept) == 2
    for cell, result in kept.items():
        again = run_cell(cell, settings)
        assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in result.items() if k != "seconds"}


def test_projection_and_the_measured_rate() -> None:
    """Projected filters have norm 1 at every logged step, and lr/‖w‖^p is the learning rate itself."""
    from examples.van_laarhoven.train import run_cell

    for optimizer in ("sgd", "adam"):
        result = run_cell(Cell(optimizer, True, 0.02, 0.01, 0), TINY)  # type: ignore[arg-type]
        assert np.array(result["curves"]["unit_norm_rms"]) == pytest.approx(1, abs=1e-5)
        constant = [k for k, step in enumerate(result["logged"]) if step < 0.75 * result["steps"]]
        assert np.array(result["curves"]["effective_lr"])[:, constant] == pytest.approx(0.02, rel=1e-4)


@pytest.mark.parametrize("name", ["dask", "ray"])
def test_engines_that_are_not_installed(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command that installs them is said."""
    monkeypatch.setattr("examples.van_laarhoven.__main__.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        main(["--backend", name])
    assert f"`--backend {name}` needs a package: pip install '{name}" in capsys.readouterr().err


def diffusion(decay: float, lr: float, seed: int, nesterov: bool) -> float:
    """How fast 64 projected rows of 100 turn away from where they were, under white noise, by torch's SGD."""
    draw = torch.Generator().manual_seed(seed)
    weight = nn.Parameter(torch.randn(64, 100, generator=draw, dtype=torch.float64))
    project_(weight.data, 1.0)
    optimizer = torch.optim.SGD([weight], lr, momentum=MOMENTUM, nesterov=nesterov, weight_decay=decay)
    cosines, start = [], weight.detach().clone()
    for step in range(4000):
        noise = torch.randn(weight.shape, generator=draw, dtype=torch.float64)
        weight.grad = noise - (noise * weight.detach()).sum(dim=1, keepdim=True) * weight.detach()
        optimizer.step()
        project_(weight.data, 1.0)
        if step % 400 == 399:
            cosines.append((weight.detach() * start).sum(dim=1).mean().item())
            start = weight.detach().clone()
    return -float(np.log(np.mean(cosines[1:])))


@pytest.mark.slow
@pytest.mark.parametrize("nesterov", [True, False])
def test_gain_of_projected_momentum(nesterov: bool) -> None:
    """Decay raises the rate of projected SGD as said: diffusion is proportional to the square of the rate.

    With Nesterov momentum as the experiment says, without as NormProjection does.

    Each diffusion is a mean over 64·99·9 squared displacements, so the root of their ratio has a standard error of
    √(1/57000) = 0.4 %. A block of 400 steps lacks the end of the memory, 10 steps or 14, which is 0.5 % of the root.
    """
    lr, decay = 1e-4, 30.0
    made_up = Measured.__new__(Measured)
    made_up.rate = np.array([[lr * decay]])
    found = (diffusion(decay, lr, 0, nesterov) / diffusion(0.0, lr, 1, nesterov)) ** 0.5
    gain = float(made_up.gain()[0, 0]) if nesterov else 1 / (1 - lr * decay / (1 - MOMENTUM) ** 2)
    assert found == pytest.approx(gain, rel=0.022)
    assert found > 1.3


def test_a_folder_of_other_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is refused, with the difference; more seeds are no difference."""
    Store(tmp_path, TINY)
    Store(tmp_path, Settings(**(vars(TINY) | {"seeds": (0, 1, 2)})))
    assert main(["--tiny", "--epochs", "3", "--out", str(tmp_path)]) == 2
    assert "whose cells have epochs 2, now 3. Use another folder" in capsys.readouterr().err
