"""``lightning-normreg demo`` with either model, in a few steps. Whole runs are in test_processes.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import yaml

from lightning_normreg import cli
from lightning_normreg.demos import DemoTransformer
from tests.cli.test_errors import refused

FEW = ["--trainer.max_steps=2", "--trainer.limit_val_batches=0", "--trainer.enable_progress_bar=false"]
SMALL = ["--data.batch_size=4", "--data.context=16", "--model.width=16"]


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal of the usual width, whoever runs the tests: no name is folded in it."""
    monkeypatch.setenv("COLUMNS", "80")


def rows(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, list[str]]:
    """Cells of the table by layer."""
    cli.main(["demo", *FEW, *words])
    lines = [line for line in capsys.readouterr().out.splitlines() if "│" in line]
    cells = [[cell.strip() for cell in line.split("│")] for line in lines]
    return {layer: values for layer, *values in cells}


@pytest.mark.parametrize("words", [["--model", "transformer"], ["--model=transformer"]])
def test_the_transformer(words: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All its matrices are in the table, and a set, which alone is scale-invariant; other options are as ever."""
    found = rows(capsys, *words, *SMALL, "--model.lr=0.02")
    matrices = {name for name, p in DemoTransformer(width=16).named_parameters() if p.ndim > 1}
    assert found.keys() == {*matrices, "residual_stream"}
    assert "→" in found.pop("residual_stream")[1]
    assert {cells[1] for cells in found.values()} == {"not scale-invariant"}
    (config,) = folder.rglob("config.yaml")
    assert yaml.safe_load(config.read_text())["model"]["lr"] == 0.02
    assert (config.parent / "curves.png").exists()


def test_the_default_is_the_convnet(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It has a name too, and a file of its arguments still goes with ``--model``."""
    Path("arguments.yaml").write_text("lr: 0.125")
    for words in ([], ["--model", "convnet", "--model=arguments.yaml"]):
        assert "block1.conv.weight" in rows(capsys, *words)
    rates = [yaml.safe_load(path.read_text())["model"]["lr"] for path in sorted(folder.rglob("config.yaml"))]
    assert rates == [0.05, 0.125]


def test_a_layer_with_any_curve_is_in_the_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Here the two monitors watch one weight each."""
    watched = {"WeightNormMonitor": "head.weight", "EffectiveLRMonitor": "block2.conv.weight"}
    callbacks = [{"class_path": name, "init_args": {"include": [layer]}} for name, layer in watched.items()]
    Path("monitors.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    found = rows(capsys, "--config=monitors.yaml")
    assert found.keys() == {"head.weight", "block2.conv.weight"}
    assert [bool(cell) for cell in found["head.weight"]] == [True, True, False]
    assert [bool(cell) for cell in found["block2.conv.weight"]] == [False, True, True]


@pytest.mark.slow
def test_a_demo_is_repeated_from_its_configuration(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights are the same bit by bit; what is saved holds the Trainer's settings."""
    cli.main(["demo", *FEW, "--trainer.gradient_clip_val=0.5", "--seed_everything=17"])
    (first,) = folder.rglob("config.yaml")
    cli.main(["demo", f"--config={first}"])
    saved, again = (torch.load(path, weights_only=True) for path in sorted(folder.rglob("*.ckpt")))
    assert saved["global_step"] == again["global_step"] == 2
    assert all(torch.equal(weight, again["state_dict"][name]) for name, weight in saved["state_dict"].items())


@pytest.mark.parametrize(
    "words, given", [(["--model=resnet"], "resnet"), (["--model", "gpt-2"], "gpt-2"), (["--model"], "")]
)
def test_a_wrong_model(words: list[str], given: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The choices are named, in one line, and nothing is trained."""
    said = refused(capsys, "demo", *words)
    assert said == f"--model: must be one of convnet, transformer, got {given!r}.\n"
    assert not Path("lightning_logs").exists()


def test_a_python_without_the_text(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is said in words, not by a traceback."""
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert "pydoc_data.topics, the text of TextDataModule" in refused(capsys, "demo", "--model=transformer", *FEW)


@pytest.mark.parametrize("missing", ["sklearn", "matplotlib", "pandas"])
def test_without_the_extra(
    missing: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line says what to install."""
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit, match=r"^2$"):
        cli.main(["demo"])
    expected = f'error: {missing} is not installed. Install it by: pip install "lightning-normreg[demo]"\n'
    assert capsys.readouterr().err == expected
    assert not Path("lightning_logs").exists()
