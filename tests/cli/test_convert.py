"""``plan --as``: there and back, the package's own numbers, and schedules run for real."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_normreg import cli
from lightning_normreg.functional import (
    equilibrium_rotation,
    matched_lr,
    suggest_decay,
    suggest_projection,
    with_decay,
    without_decay,
)
from tests.cli.test_errors import refused

ROUNDING = 1e-12
UNITS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "SGD": (["--gradient_norm=0.1"], {"gradient_norm": 0.1}),
    "SGD momentum": (
        ["--gradient_norm=0.1", "--momentum=0.9", "--dampening=0.1"],
        {"gradient_norm": 0.1, "momentum": 0.9, "dampening": 0.1},
    ),
    "SGD nesterov": (
        ["--gradient_norm=0.1", "--momentum=0.8", "--nesterov=true"],
        {"gradient_norm": 0.1, "momentum": 0.8},
    ),
    "AdamW": (["--entries=576", "--betas=[0.8, 0.95]"], {"entries": 576, "betas": (0.8, 0.95)}),
    "Adam": (["--entries=576", "--gradient_norm=0.1"], {"entries": 576, "gradient_norm": 0.1}),
    "RMSprop": (["--entries=576", "--gradient_norm=0.1"], {"entries": 576, "gradient_norm": 0.1}),
    "Muon": (["--shape=[64, 128]", "--momentum=0.9"], {"shape": (64, 128), "momentum": 0.9}),
    "lion": (["--entries=576"], {"entries": 576}),
    "adamp.AdamP": (["--entries=576", "--nesterov=false"], {"entries": 576}),
}
FAMILIES = {
    "SGD": "sgd",
    "SGD momentum": "sgd",
    "SGD nesterov": "nesterov",
    "AdamW": "adam_decoupled",
    "Adam": "adam_l2",
    "RMSprop": "rmsprop_l2",
    "Muon": "muon",
    "lion": "lion",
    "adamp.AdamP": "adamp",
}


def convert(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """What ``--json`` gives, also kept in a file for the way back."""
    cli.main(["plan", *words, "--json"])
    text = capsys.readouterr().out
    Path("recipe.json").write_text(text)
    found: dict[str, Any] = json.loads(text)
    return found


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("radius", [None, 0.7])
@pytest.mark.parametrize("key", list(UNITS))
def test_projection_and_back(key: str, radius: float | None, capsys: pytest.CaptureFixture[str]) -> None:
    """The functions' numbers to the last digit, and the recipe again, from the file and from the numbers alone."""
    words, settings = UNITS[key]
    lr, decay, name = 1e-3, 0.02, key.split(maxsplit=1)[0]
    given = [f"--optimizer={name}", *words]
    more = [] if radius is None else [f"--radius={radius}"]
    found = convert(capsys, "--as=projection", f"--lr={lr}", f"--weight_decay={decay}", *given, *more)
    family: Any = FAMILIES[key]
    expected = suggest_projection(family, radius=radius, lr=lr, weight_decay=decay, **settings)
    assert (found["radius"], found["lr"], found["weight_decay"]) == (*expected, 0.0)
    back = convert(capsys, "--as=decay", "--recipe=recipe.json")
    assert (back["lr"], back["weight_decay"]) == pytest.approx((lr, decay), rel=ROUNDING)
    assert (back["form"], back.get("radius")) == ("decay", None)
    numbers = [f"--radius={found['radius']!r}", f"--lr={found['lr']!r}", f"--decayed_lr={lr!r}"]
    alone = convert(capsys, "--as=decay", *given, *numbers)
    assert alone["weight_decay"] == pytest.approx(decay, rel=ROUNDING)
    radius_lr = {"radius": found["radius"], "lr": found["lr"], "decayed_lr": lr}
    assert alone["weight_decay"] == suggest_decay(family, **radius_lr, **settings)


@pytest.mark.parametrize(
    "name, words, sums",
    [
        ("SGD", [], {}),
        ("SGD", ["--momentum=0.9", "--dampening=0.2"], {"momentum": 0.9, "dampening": 0.2}),
        ("sgd_decoupled", ["--momentum=0.9"], {"momentum": 0.9}),
        ("AdamW", ["--betas=[0.8, 0.9]"], {}),
        ("Muon", ["--momentum=0.9"], {}),
    ],
)
def test_schedule_and_back(
    name: str, words: list[str], sums: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Every rate, momentum and scale as the functions give them; then the constant rate again."""
    family: Any = {"SGD": "sgd", "AdamW": "adam_decoupled", "Muon": "muon"}.get(name, name)
    lr, decay, steps = 0.05, 0.01, 300
    given = ["--as=schedule", f"--optimizer={name}", f"--lr={lr}", f"--weight_decay={decay}", f"--steps={steps}"]
    found = convert(capsys, *given, *words)
    expected = without_decay(family, [lr] * steps, decay, **sums)
    assert (found["lr"], found["scales"], found["weight_decay"]) == (expected.lrs, expected.scales, 0.0)
    if name == "sgd_decoupled":
        assert found["settings"]["momentum"] == expected.momenta
    back = convert(capsys, "--as=decay", "--recipe=recipe.json")
    assert back["lr"] == pytest.approx([lr] * steps, rel=ROUNDING)
    assert back["weight_decay"] == decay
    if sums:
        assert back["settings"]["momentum"] == pytest.approx(0.9, rel=ROUNDING)


@pytest.mark.parametrize("key", ["SGD momentum", "AdamW", "Adam", "Muon", "lion"])
def test_angle_and_back(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The rotation at equilibrium to the last digit, and the recipe again; fit's YAML is read as the same angle."""
    words, settings = UNITS[key]
    given = [f"--optimizer={key.split(maxsplit=1)[0]}", "--lr=0.001", "--weight_decay=0.02", *words]
    found = convert(capsys, "--as=angle", *given)
    family: Any = FAMILIES[key]
    assert found["lr"] == equilibrium_rotation(family, lr=1e-3, weight_decay=0.02, **settings)
    back = convert(capsys, "--as=decay", "--recipe=recipe.json")
    assert (back["lr"], back["weight_decay"]) == pytest.approx((1e-3, 0.02), rel=ROUNDING)
    if key == "AdamW":
        cli.main(["plan", "--as=angle", *given])
        Path("fit.yaml").write_text(capsys.readouterr().out.partition("For fit --config:\n")[2])
        assert yaml.safe_load(Path("fit.yaml").read_text())["rotation"] == {"angle": "lr"}
        again = convert(capsys, "--as=decay", "--recipe=fit.yaml", "--decayed_lr=0.001")
        assert again["weight_decay"] == pytest.approx(0.02, rel=ROUNDING)


def test_a_decay_for_a_schedule_without_one(capsys: pytest.CaptureFixture[str]) -> None:
    """From flags: a constant rate without decay as one with, of a decay that is asked for."""
    found = convert(capsys, "--as=decay", "--optimizer=SGD", "--lr=0.1", "--weight_decay=0.5", "--steps=3")
    assert found["lr"] == with_decay("sgd", [0.1] * 3, 0.5).lrs


CONFIG: dict[str, Any] = {
    "model": "DemoConvNet",
    "optimizer": {"class_path": "SGD", "init_args": {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-3}},
    "lr_scheduler": {"class_path": "CosineAnnealingLR", "init_args": {"T_max": 10}},
}


@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("nested", [True, False])
def test_from_a_yaml(interval: str, nested: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """The schedule is followed step by step or epoch by epoch, and a run by what is printed turns as with decay.

    In float64, on a loss whose gradients are perpendicular to the weight: directions agree to rounding.
    """
    config = CONFIG | {"lr_interval": interval}
    Path("fit.yaml").write_text(yaml.safe_dump({"fit": config} if nested else config))
    steps = 20
    found = convert(capsys, "--as=schedule", "--recipe=fit.yaml", f"--steps={steps}", "--steps_per_epoch=2")
    time = [t if interval == "step" else t // 2 for t in range(steps)]
    rates = [0.1 * (1 + math.cos(math.pi * t / 10)) / 2 for t in time]
    # The schedule's recursion loses digits where it passes 0.
    assert found["lr"] == pytest.approx(without_decay("sgd", rates, 5e-3, momentum=0.9).lrs, rel=1e-9, abs=1e-12)
    ends = []
    for lrs, decay in ((rates, 5e-3), (found["lr"], found["weight_decay"])):
        weight = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
        optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, weight_decay=decay)
        for lr in lrs:
            optimizer.param_groups[0]["lr"] = lr
            optimizer.zero_grad()
            (weight[0] * weight[2] / weight.square().sum()).backward()
            optimizer.step()
        ends.append((weight / weight.norm()).detach())
    # 20 steps of a float64 recursion, and the 1e-12 above.
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-10)


def test_yaml_that_is_printed_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    """What people are told to write in fit's YAML is the converted recipe, and is converted back."""
    words = ["--optimizer=AdamW", "--lr=1e-3", "--weight_decay=0.1", "--entries=576"]
    cli.main(["plan", "--as=projection", *words])
    out = capsys.readouterr().out
    printed = out.partition("For fit --config:\n")[2]
    Path("fit.yaml").write_text(printed)
    radius = suggest_projection("adam_decoupled", lr=1e-3, weight_decay=0.1, entries=576).radius
    assert yaml.safe_load(printed)["projection"]["radius"] == radius
    assert f"{radius:.6g}" in out
    back = convert(capsys, "--as=decay", "--recipe=fit.yaml", "--entries=576")
    assert back["weight_decay"] == pytest.approx(0.1, rel=ROUNDING)
    assert "turns by 0.003245 rad per step" in out  # √(2ηλ(1 − β)/(1 + β))
    assert "half-way to in 3466 steps" in out  # ln 2 / (2ηλ)


def test_the_next_step_from_another_norm(capsys: pytest.CaptureFixture[str]) -> None:
    """Off equilibrium the rate is matched to the norm that the weight has."""
    found = convert(
        capsys, "--as=projection", "--optimizer=AdamW", "--lr=1e-3", "--weight_decay=0.1", "--entries=9",
        "--radius=2", "--norm=5",
    )  # fmt: skip
    assert found["matched_lr"] == matched_lr(1e-3, 0.1, norm=2.0, decayed_norm=5.0, exponent=1)


SGD = ["--optimizer=SGD", "--lr=0.1", "--weight_decay=0.01"]


@pytest.mark.parametrize(
    "words, said",
    [
        (["--as=projection", *SGD[1:]], "optimizer: it is needed"),
        (["--as=projection", *SGD[:2]], "weight_decay: it is needed"),
        (["--as=schedule", *SGD], "steps: it is needed"),
        (["--as=schedule", *SGD, "--steps=0"], "steps: it must be positive, got 0"),
        (["--as=projection", *SGD], "as: `gradient_norm` must be given"),
        (["--as=projection", *SGD, "--gradient_norm=-1"], "as: `gradient_norm` must be positive"),
        (["--as=projection", "--optimizer=Adafactor", *SGD[1:]], "has no equilibrium norm"),
        (["--as=projection", "--optimizer=Adagrad", *SGD[1:]], "the equilibrium of 'Adagrad'"),
        (["--as=projection", "--optimizer=AdmW", *SGD[1:]], "the equilibrium of 'AdmW'"),
        (["--as=projection", *SGD, "--decayed_lr=1"], "decayed_lr: it means nothing with --as projection"),
        (["--as=schedule", *SGD, "--radius=1"], "radius: it means nothing with --as schedule"),
        (["--as=schedule", "--optimizer=Adam", *SGD[1:], "--steps=3"], "has no exact conversion"),
        (["--as=schedule", "--optimizer=nesterov", *SGD[1:], "--steps=3"], "only approximate"),
        (["--as=schedule", "--optimizer=SGD", "--lr=9", "--weight_decay=1", "--steps=3"], "overshooting 0"),
        (["--as=decay", *SGD[:2]], "with --radius, of a schedule"),
        (["--as=decay", *SGD, "--radius=1"], "weight_decay: that is what is looked for"),
        (["--as=projection", *SGD, "--gradient_norm=1", "--momentum=0.9", "--norm=1"], "norm: it goes with"),
        (["--as=decay", "--recipe=none.json"], "recipe: "),
        (["--as=decay", "--recipe=list.yaml"], "must hold a mapping"),
        (["--as=projection", "--recipe=fit.yaml"], "recipe: it has an lr_scheduler"),
        (["--as=projection", "--recipe=fit.yaml", "--lr=1"], "it says lr itself"),
        (["--as=schedule", "--recipe=fit.yaml", "--steps=9"], "--steps_per_epoch"),
        (["--as=schedule", "--recipe=cycle.yaml", "--steps=9"], "changes the momentum too"),
        (["--as=schedule", "--recipe=empty.yaml", "--steps=9"], "optimizer: there is none"),
        (["--as=nothing"], '"as"'),
        (["--as=decay", "--recipe=angle.json"], "Give it by --decayed_lr"),
        (["--as=angle", "--recipe=fit.yaml", "--steps=9", "--steps_per_epoch=3"], "--rotation.angle equilibrium"),
        (["--as=angle", *SGD, "--radius=1"], "radius: it means nothing with --as angle"),
        (["--as=gains"], "as: gains are found by asking the model"),
        ([], "nothing to plan"),
    ],
)
def test_errors(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The key and the remedy."""
    Path("list.yaml").write_text("[1]")
    Path("angle.json").write_text('{"form": "angle", "optimizer": "SGD", "lr": 0.01}')
    Path("empty.yaml").write_text("model: DemoConvNet")
    Path("fit.yaml").write_text(yaml.safe_dump(CONFIG))
    cycle = {"class_path": "OneCycleLR", "init_args": {"max_lr": 0.1, "total_steps": 10}}
    Path("cycle.yaml").write_text(yaml.safe_dump(CONFIG | {"lr_scheduler": cycle}))
    assert said in refused(capsys, "plan", *words)


@pytest.mark.parametrize("lr", [1e-4, 1e-2])
@pytest.mark.parametrize("decay", [1e-5, 0.01, 2.0])
@pytest.mark.parametrize("family, settings", [(FAMILIES[key], UNITS[key][1]) for key in UNITS])
def test_suggested_decay_is_the_inverse(family: Any, settings: dict[str, Any], decay: float, lr: float) -> None:
    """Over the range of recipes."""
    found = suggest_projection(family, lr=lr, weight_decay=decay, **settings)
    back = suggest_decay(family, radius=found.radius, lr=lr, **settings)
    # The norm goes with λ^(-1/2) at least to λ^(-1/4), so four roundings of the norm.
    assert back == pytest.approx(decay, rel=ROUNDING)


def test_suggested_decay_out_of_range() -> None:
    """Norms that no decay leads to."""
    with pytest.raises(ValueError, match=r"`radius` must be positive, got 0"):
        suggest_decay("adam_decoupled", radius=0.0, lr=1e-3, entries=9)
    for radius in (1e-6, 1e9):
        with pytest.raises(ValueError, match=r"`radius` must be a norm that a decay with"):
            suggest_decay("adam_decoupled", radius=radius, lr=1e-3, entries=9)
    with pytest.raises(ValueError, match=r"turns by its learning rate at any radius"):
        suggest_decay("lamb", radius=1.0, lr=1e-3, entries=9)
