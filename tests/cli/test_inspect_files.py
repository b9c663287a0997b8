"""Files that are no checkpoints, damaged ones, and those that would run code: words, exit code 2, nothing run."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_normreg import cli
from tests.cli.test_errors import refused

MARK = "marker"


class Evil:
    """What runs a command as soon as it is unpickled by ordinary means."""

    def __init__(self, call: Callable[..., Any], argument: str) -> None:
        self.call, self.argument = call, argument

    def __reduce__(self) -> Any:
        return self.call, (self.argument,)


ATTACKS = {
    "os.system": Evil(os.system, f"touch {MARK}"),
    "exec": Evil(exec, f"open({MARK!r}, 'w').close()"),
    "eval": Evil(eval, f"open({MARK!r}, 'w').close()"),
}


def content(**more: Any) -> dict[str, Any]:
    """Of a good checkpoint."""
    net = nn.Linear(40, 3)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(1, 40)).sum().backward()
    optimizer.step()
    return {"state_dict": net.state_dict(), "optimizer_states": [optimizer.state_dict()]} | more


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The present folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("where", ["hyper-parameter", "state", "bare pickle", "old format", "with a model"])
@pytest.mark.parametrize("attack", list(ATTACKS))
def test_nothing_in_a_file_is_run(
    attack: str, where: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where the environment asks torch to load without care. Loaded carelessly, the same file leaves its mark."""
    evil = ATTACKS[attack]
    if where == "bare pickle":
        Path("evil.ckpt").write_bytes(pickle.dumps(evil))
    elif where == "state":
        torch.save(content(optimizer_states=[{"state": {0: evil}, "param_groups": []}]), "evil.ckpt")
    else:
        torch.save(content(hyper_parameters=evil), "evil.ckpt", _use_new_zipfile_serialization=where != "old format")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    words = ["--model=DemoConvNet", "--data=DigitsDataModule", "--ckpt_path"] if where == "with a model" else []
    said = refused(capsys, "inspect", *words, "evil.ckpt")
    assert not Path(MARK).exists()
    assert "ckpt_path: 'evil.ckpt'" in said
    named = {"os.system": "system", "exec": "exec", "eval": "eval"}[attack]
    assert named in said or where == "bare pickle"
    with open("evil.ckpt", "rb") as file:
        if where == "bare pickle":
            pickle.load(file)
        else:
            torch.load(file, weights_only=False)
    assert Path(MARK).exists()


def good() -> bytes:
    """A good checkpoint's bytes."""
    buffer = io.BytesIO()
    torch.save(content(), buffer)
    return buffer.getvalue()


def flipped(data: bytes) -> bytes:
    """With one bit of the largest tensor changed."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        info = max(archive.infolist(), key=lambda i: i.file_size if "/data/" in i.filename else 0)
        stored = archive.read(info)
    start = data.index(stored)
    return data[: start + 8] + bytes([data[start + 8] ^ 1]) + data[start + 9 :]


FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "empty"),
    "cut off": (lambda: good()[:-200], "no checkpoint, or a damaged one"),
    "cut short": (lambda: good()[:500], "no checkpoint, or a damaged one"),
    "one bit": (lambda: flipped(good()), "damaged: the checksum of"),
    "text": (lambda: b"model: DemoConvNet\n", "no checkpoint, or a damaged one"),
    "zeros": (lambda: bytes(5000), "no checkpoint, or a damaged one"),
}


@pytest.mark.parametrize("kind", list(FILES))
def test_damaged_files(kind: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever is wrong with it, in a line."""
    write, words = FILES[kind]
    Path("file.ckpt").write_bytes(write())
    said = refused(capsys, "inspect", "file.ckpt")
    assert f"ckpt_path: 'file.ckpt' is {words}" in said
    assert len(said) < 400


def test_every_cut_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that was written half never gives a number."""
    data = good()
    for length in range(1, len(data), 97):
        Path("file.ckpt").write_bytes(data[:length])
        refused(capsys, "inspect", "file.ckpt")


def test_plain_types_are_asked_for(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A Namespace among the hyper-parameters: what is in the way is named, and how to get rid of it; which works."""
    torch.save(content(hyper_parameters=argparse.Namespace(lr=1)), "run.ckpt")
    said = refused(capsys, "inspect", "run.ckpt")
    assert "argparse.Namespace" in said
    assert "weights_only=False" in said
    command = said.partition("as plain types: ")[2].strip().removesuffix(".").replace("path,", "'run.ckpt',")
    exec(" ".join(command.split()), {"torch": torch})
    cli.main(["inspect", "plain.ckpt"])
    assert "torch.optim.AdamW" in capsys.readouterr().out


@pytest.mark.parametrize(
    "made, said",
    [
        ([1, 2], "holds a list"),
        ({"epoch": 3, "weights": 4}, "its keys are 'epoch', 'weights'"),
        ({}, "its keys are none"),
        ({"state_dict": {"w": torch.ones(2, 2)}, "optimizer_states": [{"master": 1}]}, "is no state of a torch optim"),
        ({"state_dict": {"weight": torch.ones(2, 2)},
          "optimizer_states": [{"state": {}, "param_groups": [{"params": [0], "lr": "fast"}]}]}, "could not convert"),
        ({"state_dict": {"weight": torch.ones(2, 2)},
          "optimizer_states": [{"state": {0: 5}, "param_groups": [{"params": [0], "lr": [1]}]}]}, "ckpt_path: "),
    ],
)  # fmt: skip
def test_other_content(made: Any, said: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Plain types in the wrong places."""
    torch.save(made, "file.ckpt")
    assert said in refused(capsys, "inspect", "file.ckpt")


DEMO = ["--seed_everything=0", "--model=DemoConvNet", "--data=DigitsDataModule"]


@pytest.mark.parametrize(
    "words, said",
    [
        (["none.ckpt"], "ckpt_path: there is no file 'none.ckpt'"),
        (["."], "ckpt_path: '.' is a folder"),
        ([], "ckpt_path: nothing to inspect"),
        (["run.ckpt", "--optimizer=Adamax"], "optimizer: the optimizer cannot be Adamax"),
        (["run.ckpt", "--optimizer=SGD,SGD"], "optimizer: the checkpoint has 1 optimizers, got 2 classes"),
        (["run.ckpt", "--json", "--csv"], "json: it cannot be had together with --csv"),
        (["run.ckpt", "--save=verdict.json"], "save: which units are scale-invariant is not known"),
        (["run.ckpt", "--invariance=none.json"], "invariance: "),
        (["run.ckpt", "--jsn"], "--jsn"),
        ([*DEMO, "--ckpt_path=run.ckpt"], "it does not go with the model"),
        ([*DEMO, "--ckpt_path=none.ckpt"], "there is no file 'none.ckpt'"),
        ([*DEMO, "--invariance=run.yaml"], "invariance: "),
    ],
)  # fmt: skip
def test_arguments(words: list[str], said: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each error names the key and the remedy."""
    torch.save(content(), "run.ckpt")
    assert said in refused(capsys, "inspect", *words)
    assert not Path("verdict.json").exists()
