"""What inspect says that decay does, of checkpoints written by hand, on a chain of BatchNorms."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_normreg import cli, find_symmetries
from tests.cli.test_errors import refused
from tests.symmetries._symmetry_case import log_loss

THROUGH = "acts through 4.weight, 4.bias"


def chain() -> nn.Module:
    """Units 0.weight and 3.weight, the set {1.weight, 1.bias}, (4.weight, 4.bias) against 6.weight, inert biases."""
    torch.manual_seed(0)
    layers = [nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(6, 3)).train()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The present folder, with the file of symmetries."""
    monkeypatch.chdir(tmp_path)
    find_symmetries(chain(), torch.randn(8, 5), forward=log_loss, progress=False).save("found.json")
    return tmp_path


def write(path: str, make: Any, without: str = "", noted: bool = False, **settings: Any) -> None:
    """A checkpoint after one step, with decay of matrices."""
    model = chain()
    matrices, rest = ([p for p in model.parameters() if (p.ndim > 1) is matrix] for matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = make(groups, **settings)
    log_loss(model, torch.randn(8, 5)).backward()
    optimizer.step()
    state = {name: value for name, value in model.state_dict().items() if name != without}
    callbacks = {"NormSummary": {"symmetries": json.loads(Path("found.json").read_text())}} if noted else {}
    torch.save({"state_dict": state, "optimizer_states": [optimizer.state_dict()], "callbacks": callbacks}, path)


def told(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[dict[str, tuple[Any, Any]], str]:
    """Label and removability by name, and all sentences."""
    capsys.readouterr()
    cli.main(["inspect", *words, "--json"])
    report = json.loads(capsys.readouterr().out)
    return {r["parameter"]: (r["acts"], r["removable"]) for r in report["parameters"]}, " ".join(report["notes"])


@pytest.mark.parametrize("optimizer, settings", [("AdamW", {}), ("SGD", {"momentum": 0.5}), ("SGD", {"momentum": 0.9})])
def test_a_chain(here: Path, capsys: pytest.CaptureFixture[str], optimizer: str, settings: dict[str, Any]) -> None:
    """Of a file, or in the checkpoint; in the optimizer's own unit, which momentum does not change.

    Units are decayed to a schedule. The head's decay is that of the last gain and shift, which are not decayed and
    could grow to undo it: all three penalties are removable.
    """
    write("last.ckpt", getattr(torch.optim, optimizer), lr=0.1, **settings)
    write("noted.ckpt", getattr(torch.optim, optimizer), noted=True, lr=0.1, **settings)
    expected = {"0.weight": ("schedule", True), "3.weight": ("schedule", True), "6.weight": (THROUGH, True)}
    for words in (("last.ckpt", "--symmetries", "found.json"), ("noted.ckpt",)):
        labels, said = told(capsys, *words, "--optimizer", optimizer)
        assert {name: label for name, label in labels.items() if label[1] is not None} == expected
        assert labels["4.weight"] == ("not decayed", None)
        assert labels["0.bias"] == (None, None)  # it does not reach the loss
        assert "Decay of 0.1 on 3 tensors trains this network like decay of 0.1 on 2 tensors (4.weight, 4.bias)" in said


def test_columns(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two more in the table, and in CSV; none in the table where nothing is known."""
    monkeypatch.setenv("COLUMNS", "300")
    write("last.ckpt", torch.optim.AdamW, lr=0.1)
    for words, are_there in ((["--symmetries", "found.json"], True), ([], False)):
        cli.main(["inspect", "last.ckpt", "--optimizer", "AdamW", *words])
        table = capsys.readouterr().out
        assert ("what decay does" in table) is ("removable" in table) is (THROUGH in table) is are_there
    cli.main(["inspect", "last.ckpt", "--optimizer", "AdamW", "--symmetries", "found.json", "--csv"])
    out, err = capsys.readouterr()
    rows = {row["parameter"]: row for row in csv.DictReader(io.StringIO(out))}
    assert (rows["6.weight"]["acts"], rows["6.weight"]["removable"]) == (THROUGH, "True")
    assert "trains this network like" in err


def test_what_is_not_known_is_said(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Adam decays through its gradient; at a learning rate of 0 decay does nothing."""
    write("l2.ckpt", torch.optim.Adam, lr=0.1)
    write("end.ckpt", torch.optim.AdamW, lr=0.0)
    for path, optimizer, sentence in (
        ("l2.ckpt", "Adam", "What decay does to 0.weight, 3.weight, 6.weight is not known here: it acts through the"),
        ("end.ckpt", "AdamW", "At a learning rate of 0, as of 0.weight, 3.weight, 6.weight, decay does nothing"),
    ):
        labels, said = told(capsys, path, "--optimizer", optimizer, "--symmetries", "found.json")
        assert set(labels.values()) == {(None, None)}
        assert sentence in said


def test_symmetries_that_do_not_fit(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Given, they are refused, with the name of the flag; noted in the checkpoint, they do not stop the rest."""
    write("last.ckpt", torch.optim.AdamW, lr=0.1)
    write("stripped.ckpt", torch.optim.AdamW, without="0.bias", noted=True, lr=0.1)
    other = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).train()
    find_symmetries(nn.Sequential(nn.Identity(), other), torch.randn(8, 5), forward=log_loss).save("other.json")
    (here / "empty.json").write_text("{}")
    for file, why in (
        ("other.json", "must be those of this model, but it has no 1.0.bias"),
        ("empty.json", "must be as Symmetries.save writes them, but 'empty.json' is not"),
        ("none.json", "none.json"),
    ):
        said = refused(capsys, "inspect", "last.ckpt", "--symmetries", file)
        assert said.startswith("symmetries: ")
        assert why in said
    labels, notes = told(capsys, "stripped.ckpt", "--optimizer", "AdamW")
    assert set(labels.values()) == {(None, None)}
    assert "What decay does is not said: symmetries noted in the checkpoint are of weights not in it." in notes
