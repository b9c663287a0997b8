"""``plan``: schedules as a real fit follows them, checkpoints, goals that a real run reaches, errors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml

from lightning_normreg import Plan, cli, find_scale_invariance, plan
from lightning_normreg.demos import DemoConvNet, DigitsDataModule
from tests.cli.test_errors import refused

ADAMW = ["--optimizer=AdamW", "--optimizer.lr=0.004", "--optimizer.betas=[0.9, 0.95]", "--optimizer.weight_decay=1"]
MODEL = ["--model=users_module.Net", "--data=users_module.Data", "--model.width=6"]
LOUD = pytest.mark.filterwarnings("ignore:No seed found")
pytestmark = LOUD


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """What ``--json`` gives."""
    capsys.readouterr()
    cli.main(["plan", *words, "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


SCHEDULES: dict[str, tuple[list[str], list[float]]] = {
    # Six batches in each of ten epochs.
    "by epochs": (["--lr_scheduler=ExponentialLR", "--lr_scheduler.gamma=0.5"], [0.5 ** (s // 6) for s in range(60)]),
    "by steps": (
        ["--lr_scheduler=CosineAnnealingLR", "--lr_scheduler.T_max=60", "--lr_interval=step"],
        [(1 + math.cos(math.pi * s / 60)) / 2 for s in range(60)],
    ),
    "accumulated": (
        ["--lr_scheduler=ExponentialLR", "--lr_scheduler.gamma=0.9", "--trainer.accumulate_grad_batches=4"],
        [0.9 ** (s // 2) for s in range(60)],
    ),
}


@pytest.mark.parametrize(
    "key", ["by steps", *(pytest.param(key, marks=pytest.mark.slow) for key in SCHEDULES if key != "by steps")]
)
def test_the_schedule_is_followed(key: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As written by hand, and as LearningRateMonitor logs it in the run itself; norms start where the model does."""
    words, factors = SCHEDULES[key]
    epochs = 30 if key == "accumulated" else 10
    given = [*MODEL, *ADAMW, *words, f"--trainer.max_epochs={epochs}", "--seed_everything=1"]
    found = planned(capsys, *given)
    assert not (folder / "lightning_logs").exists()
    unit = found["units"]["hidden.weight"]
    assert found["steps"] == len(factors)
    rates = [e * n for e, n in zip(unit["effective_lr"], unit["norm"], strict=True)]
    assert rates == pytest.approx([0.004 * factors[step] for step in found["at"]], rel=1e-6)
    assert unit["timescale"] == pytest.approx(1 / sum(0.004 * f for f in factors), rel=1e-8)
    fit = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=.", "--monitor.every_n_steps=1"]
    cli.main(["fit", *given, *fit, "--trainer.enable_progress_bar=false"])
    log = pd.read_csv("lightning_logs/version_0/metrics.csv").groupby("step").first()
    measured = (log["weights/effective_lr/hidden.weight"] * log["weights/unit_norm_rms/hidden.weight"]).dropna()
    assert measured.to_numpy() == pytest.approx([0.004 * f for f in factors], rel=1e-5)
    assert log["weights/unit_norm_rms/hidden.weight"].iloc[0] == pytest.approx(unit["norm"][0], rel=1e-6)


def test_from_a_checkpoint(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Norms and verdict of the file, a recipe by arguments or by fit's YAML; the same plan as from the module."""
    cli.main(["fit", *MODEL, *ADAMW, "--trainer.max_epochs=1", "--trainer.enable_progress_bar=false"])
    (path,) = folder.glob("lightning_logs/version_0/checkpoints/*.ckpt")
    recipe = ["--optimizer=AdamW", "--lr=0.004", "--betas=[0.9, 0.95]", "--weight_decay=1", "--steps=300"]
    found = planned(capsys, str(path), *recipe, "--save=plan.json")
    weight = torch.load(path, weights_only=True)["state_dict"]["hidden.weight"].double()
    norm = float(weight.square().sum(1).mean().sqrt())
    direct = plan(
        {"w": (norm, 4)}, {"optimizer": "AdamW", "lr": 0.004, "weight_decay": 1, "betas": (0.9, 0.95)}, [1.0] * 300
    )
    assert found["units"]["hidden.weight"]["rotation"] == pytest.approx(direct.units["w"].rotation, rel=1e-6)
    assert Plan.load("plan.json").steps == 300
    Path("fit.yaml").write_text(
        yaml.safe_dump(
            {
                "optimizer": {
                    "class_path": "AdamW",
                    "init_args": {"lr": 0.004, "weight_decay": 1.0, "betas": [0.9, 0.95]},
                }
            }
        )
    )
    again = planned(capsys, str(path), "--recipe=fit.yaml", "--steps=300")
    assert again["units"] == found["units"]
    assert "steps: it is needed" in refused(capsys, "plan", str(path), *recipe[:-1])
    assert "optimizer: `recipe` must name an optimizer" in refused(
        capsys, "plan", str(path), "--optimizer=AdmW", *recipe[1:]
    )
    torch.save({"state_dict": {"a.weight": torch.ones(2, 2)}}, "bare.ckpt")
    assert "Give a file of inspect --save" in refused(capsys, "plan", "bare.ckpt", *recipe)
    assert "ckpt_path: there is no file" in refused(capsys, "plan", "none.ckpt", *recipe)


@pytest.mark.slow
def test_words_and_pictures(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The page, a picture, a file that the monitor and ``plot`` read, and where the run parts; gains."""
    given = [*MODEL, *ADAMW, "--trainer.max_epochs=60", "--seed_everything=1"]
    cli.main(["plan", *given, "--save=plan.json", "--output=plan.svg", "--for=timescale=2"])
    out = " ".join(capsys.readouterr().out.split())
    assert "Plan of 360 steps" in out
    assert "Planned: scale, hidden.weight, which are 2 of 3 tensors." in out
    assert "For timescale 2 at the same lr: weight_decay 0.3472." in out  # 1/(0.004·360·2)
    assert "For timescale 2 at the same weight_decay: lr 0.001389." in out
    assert Path("plan.svg").read_text().startswith("<?xml")
    cli.main(["fit", *given, "--monitor.plan=plan.json", "--trainer.enable_progress_bar=false"])
    cli.main(["plot", "lightning_logs/version_0", "--plan=plan.json", "--output=both.svg"])
    assert "hidden.weight " in capsys.readouterr().out
    assert "planned" in Path("both.svg").read_text()
    other = json.loads(Path("plan.json").read_text())
    Path("other.json").write_text(json.dumps(other | {"units": {"other.weight": other["units"]["hidden.weight"]}}))
    assert "`plan` must be one of this model, but is of other.weight" in refused(
        capsys, "fit", *given, "--monitor.plan=other.json"
    )
    assert "--plan: `plan` must be one of the model of" in refused(
        capsys, "plot", "lightning_logs/version_0", "--plan=other.json"
    )
    assert "--plan: `plan`: there is no file" in refused(capsys, "plot", "lightning_logs/version_0", "--plan=no.json")
    cli.main(["plan", *given, "--as=gains"])
    printed = capsys.readouterr().out.partition("optimizer:")
    config = yaml.safe_load("".join(printed[1:]))
    assert config["optimizer"]["init_args"]["weight_decay"] == 0.0
    assert config["decay"]["overrides"].keys() == {"norm.weight", "norm.bias"}


@pytest.mark.parametrize(
    "words, said",
    [
        (["--for=speed=3"], "for: it must be timescale=NUMBER or rotation=NUMBER"),
        (["--for=rotation=-1"], "for: it must be timescale=NUMBER"),
        (["--trainer.max_epochs=-1"], "trainer.max_steps: how long the run is must be known"),
        (["--save=nowhere/plan.json"], "save: "),
        (["--output=plan.txt"], "output: it must end in"),
        (["--lr_scheduler=ReduceLROnPlateau", "--lr_scheduler.monitor=x"], "ReduceLROnPlateau follows a metric"),
        (["--lr_scheduler=DecayFreeLR"], "DecayFreeLR stands for decay"),
        (["--as=angle", "--steps=4"], "optimizer: it is needed"),
    ],
)
def test_errors(words: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The key and the remedy, exit 2."""
    given = [*MODEL, *ADAMW, "--trainer.max_epochs=60"] if "--as=angle" not in words else []
    assert said in refused(capsys, "plan", *given, *words)


def test_what_a_plan_does_not_know(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A scheduled momentum, and callbacks that change the recipe; what is projected has its radius."""
    given = [*MODEL, *ADAMW, "--trainer.max_epochs=60"]
    cycle = ["--lr_scheduler=OneCycleLR", "--lr_scheduler.max_lr=0.01", "--lr_scheduler.total_steps=400"]
    assert "momentum is scheduled" in planned(capsys, *given, *cycle)["refused"]["hidden.weight"]
    assert "RotationControl" in planned(capsys, *given, "--rotation=true")["refused"]["hidden.weight"]
    held = planned(capsys, *given, "--projection.radius=2.0")["units"]["hidden.weight"]
    assert held["norm"] == pytest.approx([2.0] * len(held["norm"]))
    # 4 entries: lr·√(4·(1 − β)/(1 + β)) to first order, over the norm.
    assert held["rotation"][0] == pytest.approx(0.004 * math.sqrt(4 * 0.1 / 1.9) / 2, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("goal, value", [("timescale", 0.3), ("rotation", 0.02)])
def test_the_decay_that_is_found_does_it_in_a_real_run(
    goal: str, value: float, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Within 15 %: the timescale from logged rates, the median rotation of all planned layers from logged rotations."""
    base = ["--model=DemoConvNet", "--data=DigitsDataModule", "--data.label_noise=0.2", "--seed_everything=0"]
    schedule = ["--lr_scheduler=CosineAnnealingLR", "--lr_scheduler.T_max=600", "--lr_interval=step"]
    base += [*ADAMW[:-1], *schedule, "--trainer.max_epochs=30"]
    said = planned(capsys, *base, "--optimizer.weight_decay=1", f"--for={goal}={value}")["notes"]
    (decay,) = [float(words.split()[-1].rstrip(".")) for words in said if "at the same lr" in words]
    quiet = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=.", "--monitor.every_n_steps=1"]
    quiet += ["--trainer.enable_progress_bar=false", f"--optimizer.weight_decay={decay}"]
    cli.main(["fit", *base, *quiet])
    log = pd.read_csv("lightning_logs/version_0/metrics.csv").groupby("step").first()
    names = [f"block{i}.conv.weight" for i in range(1, 5)]
    if goal == "timescale":
        rates = log[f"weights/effective_lr/{names[0]}"] * log[f"weights/unit_norm_rms/{names[0]}"]
        measured = 1 / (rates.sum() * decay)
    else:
        measured = float(log[[f"weights/rotation/{name}" for name in names]].median().median())
    assert measured == pytest.approx(value, rel=0.15)


def test_the_probe_is_the_one_of_the_module(folder: Path) -> None:
    """What ``plan`` asks and what the function takes agree on the demo network."""
    torch.manual_seed(0)
    net, data = DemoConvNet(), DigitsDataModule()
    data.setup("fit")
    verdict = find_scale_invariance(net, next(iter(data.train_dataloader())), progress=False)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, betas=(0.9, 0.95))
    found = plan(net, optimizer, [1.0] * 200, invariance=verdict)
    assert list(found.units) == [f"block{i}.conv.weight" for i in range(1, 5)]
