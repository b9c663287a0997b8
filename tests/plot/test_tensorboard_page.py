"""A real TensorBoard over the logs of the demo's network: what it serves, and what a browser shows of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread
from pytorch_lightning import seed_everything
from pytorch_lightning.loggers import TensorBoardLogger

from lightning_normreg import EffectiveLRMonitor, WeightNormMonitor
from lightning_normreg.demos import DemoConvNet, DigitsDataModule
from tests.harness import trainer

LAYERS = [f"block{n}.conv.weight" for n in (1, 2, 3, 4)]
PATIENCE = 60  # seconds; each of the programs takes some four
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pd.DataFrame]:
    """The folder of a run, and what the monitors remember of it."""
    seed_everything(0, verbose=False)
    logger = TensorBoardLogger(tmp_path_factory.mktemp("page"))
    monitors = WeightNormMonitor(histograms=True), EffectiveLRMonitor()
    fitted = trainer(*monitors, logger=logger, max_epochs=6, log_every_n_steps=5, limit_val_batches=0)
    fitted.fit(DemoConvNet(), DigitsDataModule())
    logger.experiment.close()
    norms, rates = (monitor.history().drop(columns="epoch").set_index("step") for monitor in monitors)
    return Path(logger.log_dir), norms.join(rates)


@pytest.fixture(scope="module")
def server(run: tuple[Path, pd.DataFrame]) -> Iterator[str]:
    """Address of a TensorBoard that listens to this machine only, and is stopped whatever happens."""
    words = ["--logdir", str(run[0]), "--host", "127.0.0.1", "--port", "0", "--load_fast", "false"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", *words, "--reload_interval", "1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    alarm = threading.Timer(PATIENCE, process.kill)  # ends the loop over its output
    alarm.start()
    try:
        assert process.stderr is not None
        said = next((line for line in process.stderr if "http://127.0.0.1:" in line), "")
        assert said, "TensorBoard did not start"
        address = "http://127.0.0.1:" + said.partition("http://127.0.0.1:")[2].partition("/")[0]
        deadline = time.monotonic() + PATIENCE / 2
        while len(get(address, "data/runs")) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        yield address
    finally:
        alarm.cancel()
        process.kill()
        process.communicate()


def get(address: str, path: str, **query: str) -> Any:
    """An answer of the server."""
    with urllib.request.urlopen(f"{address}/{path}?{urllib.parse.urlencode(query)}", timeout=PATIENCE) as answer:
        return json.load(answer)


def served(address: str, regex: str) -> dict[str, dict[int, float]]:
    """Tag → step → value of what a chart's regex matches, by the request that the chart makes."""
    found = get(address, "data/plugin/custom_scalars/scalars", run=".", tag=regex)
    assert found["regex_valid"]
    return {tag: {step: value for _, step, value in points} for tag, points in found["tag_to_events"].items()}


@pytest.mark.slow
def test_charts_are_served_the_logged_values(server: str, run: tuple[Path, pd.DataFrame]) -> None:
    """Each chart of the layout gets the curves of all its layers, the margins theirs; in float32."""
    (category,) = get(server, "data/plugin/custom_scalars/layout")["category"]
    charts = {chart["title"]: chart for chart in category["chart"]}
    _, logged = run
    keys = {
        "effective learning rate": {"effective_lr": LAYERS},
        "effective learning rate, layers that are not scale-invariant": {"effective_lr_not_invariant": ["head.weight"]},
        "unit norm": {"unit_norm_rms": [*LAYERS, "head.weight"]},
        "rotation per step, and at equilibrium": {
            "rotation": [*LAYERS, "head.weight"],
            "equilibrium_rotation": LAYERS,
        },
    }
    for title, expected in keys.items():
        tags = {f"weights/{key}/{layer}" for key, layers in expected.items() for layer in layers}
        # The chart joins its tags in this way.
        found = served(server, "|".join(f"({tag})" for tag in charts[title]["multiline"]["tag"]))
        assert set(found) == tags
        for tag in tags:
            assert found[tag] == pytest.approx(logged[tag].dropna().to_dict(), rel=6e-8)
    margins = [chart["margin"]["series"][0] for chart in category["chart"] if "margin" in chart]
    assert len(margins) == 4
    for series in margins:
        for name in (series["value"], series["lower"], series["upper"]):
            assert served(server, name)[name] == pytest.approx(logged[name].dropna().to_dict(), rel=6e-8)
    assert set(get(server, "data/plugin/histograms/tags")["."]) == {
        f"weights/unit_norms/{layer}" for layer in (*LAYERS, "head.weight")
    }


@pytest.mark.slow
def test_a_browser_shows_all_layers_in_one_chart(server: str, tmp_path: Path) -> None:
    """Columns of the first chart's pixels cross one line of each layer."""
    if CHROMIUM is None:
        pytest.skip("No Chromium on this machine: install the package chromium to see TensorBoard's page tested.")
    picture = tmp_path / "page.png"
    for budget in (20_000, 60_000):  # milliseconds of the page's own time; on a busy machine the first is too few
        subprocess.run(
            [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage",
             "--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,900",
             f"--virtual-time-budget={budget}", f"--screenshot={picture}", f"{server}/#custom_scalars"],
            check=True, timeout=2 * PATIENCE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        pixels = imread(picture)
        assert pixels.shape[:2] == (900, 1400)
        crossed = lines_crossed(pixels[150:345, 445:720])
        if crossed.any():
            break
    # They start at one point and may cross; at other places all of them can be told apart.
    assert (crossed == len(LAYERS)).sum() > 30


def lines_crossed(chart: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Lines in the saturated colour of a run that each column of pixels crosses."""
    saturated = chart[..., :3].max(axis=-1) - chart[..., :3].min(axis=-1) > 0.6
    starts = saturated[1:] & ~saturated[:-1]
    return starts.sum(axis=0)
