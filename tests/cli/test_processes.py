"""The command line as a user calls it, in a process of its own."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_normreg import cli

ROOT = Path(__file__).parents[2]
FAST = ["--trainer.max_epochs=2", "--trainer.enable_progress_bar=false"]


def run(
    *args: str, folder: Path, program: tuple[str, ...] = ("-m", "lightning_normreg")
) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder, with its output as text."""
    return subprocess.run([sys.executable, *program, *args], cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    """Trains, shows every layer, saves the picture, and says how to see more."""
    done = run("demo", *FAST, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    for layer in ("block1.conv.weight", "block4.conv.weight", "head.weight"):
        assert layer in done.stdout
    picture = tmp_path / "lightning_logs" / "version_0" / "curves.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "tensorboard --logdir lightning_logs/version_0" in done.stdout.replace(f"{tmp_path}/", "")


@pytest.mark.slow
def test_demo_of_the_transformer_uses_its_context(tmp_path: Path) -> None:
    """As it is called, for two epochs: its validation loss is below the entropy of a character given the one before.

    That is from the counts of all pairs in the text, the best that can be done with one character.
    """
    done = run("demo", "--model", "transformer", *FAST, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    text = "\n".join(topics.values())
    pairs, firsts = Counter(pairwise(text)), Counter(text[:-1])
    entropy = -sum(n * math.log(n / firsts[pair[0]]) for pair, n in pairs.items()) / (len(text) - 1)
    (logged,) = (tmp_path / "lightning_logs").iterdir()
    events = EventAccumulator(str(logged))
    events.Reload()
    assert events.Scalars("val_loss")[-1].value < entropy


@pytest.mark.slow
def test_demo_with_projection(tmp_path: Path) -> None:
    """The example's YAML holds every filter at norm 1 from the first step on."""
    done = run("demo", "--config", str(ROOT / "examples" / "projection.yaml"), *FAST, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if "conv.weight" in line]
    assert len(rows) == 4
    assert all("1 → 1" in row and "0.2 → 0.2" in row for row in rows)


@pytest.mark.slow
def test_fit_asks_for_a_model(tmp_path: Path) -> None:
    """A forgotten flag trains nothing by mistake."""
    done = run("fit", folder=tmp_path)
    assert done.returncode == 2
    assert "model" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_fit_with_any_model_and_callbacks_by_short_name(tmp_path: Path) -> None:
    """LightningCLI finds the callbacks by their class name."""
    done = run(
        "fit",
        "--model=lightning_normreg.demos.DemoConvNet",
        "--data=lightning_normreg.demos.DigitsDataModule",
        "--trainer.callbacks+=EffectiveLRMonitor",
        "--trainer.callbacks.every_n_steps=5",
        "--trainer.accelerator=cpu",
        "--trainer.logger.class_path=CSVLogger",
        "--trainer.logger.save_dir=logs",
        "--trainer.max_epochs=1",
        folder=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    (table,) = tmp_path.rglob("metrics.csv")
    assert "weights/effective_lr/block1.conv.weight" in table.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "args, message",
    [
        (["demo", "--model.lr=fast"], "lr"),
        (["demo", "--model.learning_rate=0.1"], "learning_rate"),
    ],
)
def test_wrong_arguments_exit_with_2(args: list[str], message: str, tmp_path: Path) -> None:
    """The key is named, nothing is trained."""
    done = run(*args, folder=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.parametrize("args", [["--help"], ["demo", "--help"]])
def test_help(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Both helps name the program as it is called."""
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.main(args)
    out: Any = capsys.readouterr().out
    assert out.startswith(f"usage: {' '.join(['lightning-normreg', *args[:-1]])}")
    assert "lightning-normreg demo" in " ".join(out.split())


EXAMPLES = {
    "add_to_trainer.py": "weights/rotation/net.0.weight",
    "adamw_decay_groups.py": "gamma      decay 0",
    "bare_loop.py": "norms of the first layer: 1.000000 to 1.000000",
    "fabric_loop.py": "  14  rotation of the first layer 0.",
}


@pytest.mark.slow
@pytest.mark.parametrize("script", list(EXAMPLES))
def test_example_scripts_run(script: str, tmp_path: Path) -> None:
    """As they stand in the repository."""
    done = run(program=(str(ROOT / "examples" / script),), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert EXAMPLES[script] in done.stdout


def test_every_example_is_run() -> None:
    """None is left out."""
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(EXAMPLES)
