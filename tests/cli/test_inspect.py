"""``inspect`` on checkpoints of runs that never heard of the package: every number against float64 from the file."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn

from lightning_normreg import (
    EffectiveLRMonitor,
    NormProjection,
    ScaleInvariance,
    cli,
    find_scale_invariance,
    load_verdict,
    save_verdict,
)
from tests.harness import Net, RecordingLogger, images, loader, trainer

FLOAT32 = 1e-6
"""Norms in float32 are off by 2.5e-7 at most, and enter in their square."""
CONV_ENTRIES = 2 * 9


def inspected(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[dict[str, dict[str, Any]], str]:
    """Rows by parameter, and the notes."""
    capsys.readouterr()
    cli.main(["inspect", *words, "--json"])
    found = json.loads(capsys.readouterr().out)
    return {row["parameter"]: row for row in found["parameters"]}, " ".join(found["notes"])


def oracle(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """All weights in float64."""
    state = torch.load(path, weights_only=True)["state_dict"]
    return {name: value.numpy().astype(np.float64) for name, value in state.items()}


def trained(folder: Path, net: LightningModule, *callbacks: Any, **options: Any) -> Path:
    """The checkpoint of a short run."""
    path = folder / "run.ckpt"
    done = trainer(*callbacks, **options)
    done.fit(net, loader())
    done.save_checkpoint(path)
    return path


def make(name: str, **options: Any) -> Any:
    """What a module's configure_optimizers calls."""
    return lambda groups: getattr(torch.optim, name)(groups, **options)


@pytest.mark.parametrize(
    "name, options, exponent",
    [("SGD", {"momentum": 0.9, "weight_decay": 0.01}, 2), ("AdamW", {"weight_decay": 0.05}, 1),
     ("Adam", {"weight_decay": 0.05}, 1), ("Adafactor", {"weight_decay": 0.05}, 0)],
)  # fmt: skip
def test_numbers_of_a_plain_run(
    name: str, options: dict[str, Any], exponent: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Norms, unit norms, learning rate after the scheduler, effective rate, decay."""
    path = trained(tmp_path, Net(make(name, **options)))
    rows, notes = inspected(capsys, str(path))
    weights = oracle(path)
    assert set(rows) == {n for n, _ in Net(make(name)).named_parameters()}
    assert f"Assumed: the optimizer is torch.optim.{name}" in notes
    lrs = {n: (1e-3 if n.startswith(("conv1", "norm1")) else 3e-3) * 0.9**6 for n in rows}
    for key, row in rows.items():
        norms = np.linalg.norm(weights[key].reshape(len(weights[key]), -1), axis=1)
        units = norms if weights[key].ndim > 1 else np.array([np.linalg.norm(weights[key])])
        assert row["norm"] == pytest.approx(np.linalg.norm(weights[key]), rel=FLOAT32)
        found = [row[f"unit_norm_{which}"] for which in ("min", "median", "max", "rms")]
        expected = [units.min(), np.median(units), units.max(), math.sqrt((units**2).mean())]
        assert found == pytest.approx(expected, rel=FLOAT32)
        assert row["lr"] == pytest.approx(lrs[key], rel=1e-12)
        assert row["weight_decay"] == options.get("weight_decay", 0.0)
        if weights[key].ndim > 1 and exponent:
            assert row["effective_lr"] == pytest.approx(lrs[key] / expected[3] ** exponent, rel=2 * FLOAT32)
        else:
            assert row["effective_lr"] is None
        assert row["units"] == "unknown"
    assert "Which weights are scale-invariant is not known" in notes


def test_equilibrium_of_adamw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The closed form for white gradients: N = ηU √((1 + aβ)/((1 − a²)(1 − aβ))), a = 1 − ηλ, U² = C(1 − β)/(1 + β)."""
    path = trained(tmp_path, Net(make("AdamW", weight_decay=0.05, betas=(0.8, 0.95))))
    row = inspected(capsys, str(path))[0]["conv1.weight"]
    a, beta, lr = 1 - row["lr"] * 0.05, 0.8, row["lr"]
    update = math.sqrt(CONV_ENTRIES * (1 - beta) / (1 + beta))
    assert row["equilibrium_norm"] == pytest.approx(
        lr * update * math.sqrt((1 + a * beta) / ((1 - a**2) * (1 - a * beta))), rel=1e-9
    )
    chord = math.sqrt((1 - a**2) * (1 - beta**2)) / (1 + a * beta)
    # The chord between directions at one norm is θ to second order: θ²/24 of it, and the norms' own drift, ηλ.
    assert row["equilibrium_rotation"] == pytest.approx(chord, rel=lr * 0.05)


def test_equilibrium_of_sgd(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """1 − cos θ = η(1 − τ)λ/(1 + β); the norm depends on the gradients, and is left blank with this reason."""
    path = trained(tmp_path, Net(make("SGD", momentum=0.9, dampening=0.5, weight_decay=0.01)))
    rows, notes = inspected(capsys, str(path))
    row = rows["up.weight"]
    # 1 − cos θ is 8e-6, which float64 has to 1e-11.
    assert 1 - math.cos(row["equilibrium_rotation"]) == pytest.approx(row["lr"] * 0.5 * 0.01 / 1.9, rel=1e-9)
    assert row["equilibrium_norm"] is None
    assert "the equilibrium norm of SGD depends on the size of gradients" in notes
    assert rows["norm1.weight"]["equilibrium_rotation"] is None


class Gan(LightningModule):
    """Two halves, each with an optimizer of its own class, that a manual loop steps in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        self.critic = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Both step."""
        noise = torch.randn(len(batch[0]), 3)
        for optimizer, sign in zip(self.optimizers(), (1, -1), strict=True):  # type: ignore[arg-type]
            optimizer.zero_grad()
            self.manual_backward(sign * self.critic(self.generator(noise)).mean())
            optimizer.step()

    def configure_optimizers(self) -> Any:
        """Of two classes."""
        return [
            torch.optim.AdamW(self.generator.parameters(), lr=2e-3, weight_decay=0.1),
            torch.optim.SGD(self.critic.parameters(), lr=5e-2, momentum=0.5, weight_decay=0.2),
        ]


def test_two_optimizers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each half by the shapes of its state; the exponent is that of its own optimizer."""
    path = trained(tmp_path, Gan())
    rows, notes = inspected(capsys, str(path))
    weights = oracle(path)
    for key, row in rows.items():
        mine, lr, decay, p = ("AdamW", 2e-3, 0.1, 1) if key.startswith("gen") else ("SGD", 5e-2, 0.2, 2)
        assert (row["optimizer"], row["lr"], row["weight_decay"]) == (mine, lr, decay)
        assert row["group"] == ("0:0" if mine == "AdamW" else "1:0")
        if weights[key].ndim > 1:
            mean_square = (np.linalg.norm(weights[key], axis=1) ** 2).mean()
            assert row["effective_lr"] == pytest.approx(lr / mean_square ** (p / 2), rel=2 * FLOAT32)
    assert "optimizer 0 is torch.optim.AdamW" in notes
    assert "optimizer 1 is torch.optim.SGD" in notes


class Scheduled(Net):
    """SGD or AdamW with a scheduler, from the first step on."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Without the recording of the harness."""
        return torch.as_tensor(super().training_step(batch, batch_idx))


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.parametrize("observed", [True, False])
def test_agrees_with_what_the_monitor_logs_next(
    name: str, observed: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first update after a resume has the effective rates that the checkpoint had told.

    With the verdict that a monitor has left in it, and without one by --invariance.
    """
    options = {"weight_decay": 0.05} | ({"momentum": 0.9} if name == "SGD" else {})
    callbacks = [EffectiveLRMonitor(equilibrium=False)] if observed else []
    path = trained(tmp_path, Scheduled(make(name, **options)), *callbacks)
    words = [str(path)]
    if not observed:
        x, y = images()[:4]
        save_verdict(find_scale_invariance(Net(make(name)), (x, y)), tmp_path / "verdict.json")
        words += ["--invariance", str(tmp_path / "verdict.json")]
    rows, _ = inspected(capsys, *words)
    logger = RecordingLogger()
    again = trainer(EffectiveLRMonitor(), logger=logger, max_epochs=2)
    again.fit(Scheduled(make(name, **options)), loader(), ckpt_path=path)
    _, first = next((step, row) for step, row in logger.rows if any(key.startswith("weights/effective") for key in row))
    logged = {
        key: value for key, value in first.items() if key.startswith("weights/effective_lr") and "layers" not in key
    }
    assert set(logged) == {
        f"weights/{k}/{n}" for n, row in rows.items() for k in row if k.startswith("effective") and row[k]
    }
    for key, value in logged.items():
        _, kind, parameter = key.split("/")
        assert rows[parameter][kind] == pytest.approx(value, rel=2 * FLOAT32)
    for curve in ("equilibrium_rotation", *(["equilibrium_norm"] if name == "AdamW" else [])):
        assert rows["conv1.weight"][curve] == pytest.approx(first[f"weights/{curve}/conv1.weight"], rel=1e-9)
    assert rows["up.weight"]["units"] == "each neuron"
    assert rows["head.weight"]["equilibrium_rotation"] is None


def test_csv_and_table_say_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All digits in CSV as in JSON; four in the table, whose blanks are blank."""
    path = str(trained(tmp_path, Net(make("AdamW"))))
    rows, notes = inspected(capsys, path)
    cli.main(["inspect", path, "--csv"])
    out, err = capsys.readouterr()
    for line in csv.DictReader(io.StringIO(out)):
        row = rows[line["parameter"]]
        assert line["shape"] == "x".join(map(str, row["shape"]))
        for key in ("norm", "effective_lr", "equilibrium_norm"):
            assert line[key] == ("" if row[key] is None else repr(row[key]))
    assert " ".join(err.split()) == " ".join(notes.split())
    cli.main(["inspect", path])
    table = capsys.readouterr().out
    assert f"{rows['conv1.weight']['effective_lr']:.4g}" in table
    assert "Assumed: the optimizer is torch.optim.AdamW" in table


def test_the_class_may_be_said_or_stay_open(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint of torch before it kept whether Adam's decay is decoupled, and one of a class nobody knows."""
    path = trained(tmp_path, Net(make("AdamW", weight_decay=0.05)))
    content = torch.load(path, weights_only=True)
    for group in content["optimizer_states"][0]["param_groups"]:
        del group["decoupled_weight_decay"]
    torch.save(content, path)
    rows, notes = inspected(capsys, str(path))
    row = rows["conv1.weight"]
    assert row["effective_lr"] == pytest.approx(row["lr"] / row["unit_norm_rms"], rel=1e-12)  # p = 1 either way
    assert (row["optimizer"], row["equilibrium_norm"], row["equilibrium_rotation"]) == ("Adam or AdamW", None, None)
    assert "do not say whether decay is decoupled" in notes
    given, notes = inspected(capsys, str(path), "--optimizer", "AdamW")
    assert given["conv1.weight"]["equilibrium_norm"] > 0
    assert "is AdamW, as you say" in notes
    for group in content["optimizer_states"][0]["param_groups"]:
        group["lr_scale"] = 0.5
    torch.save(content, path)
    rows, notes = inspected(capsys, str(path))
    row = rows["conv1.weight"]
    assert (row["effective_lr"], row["exponent"], row["optimizer"]) == (None, None, None)
    assert (row["lr"], row["weight_decay"]) == (pytest.approx(1e-3 * 0.9**6), 0.05)
    assert "lr_scale" in notes


@pytest.mark.parametrize(
    "name, reason", [("LBFGS", "takes steps of the size that its closure"), ("Rprop", "uses its learning rate only to")]
)
def test_optimizers_without_effective_rate(
    name: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Blank, with the reason."""
    net = nn.Linear(4, 3)
    optimizer = getattr(torch.optim, name)(net.parameters())
    torch.save({"state_dict": net.state_dict(), "optimizer_states": [optimizer.state_dict()]}, tmp_path / "a.ckpt")
    rows, notes = inspected(capsys, str(tmp_path / "a.ckpt"))
    assert (rows["weight"]["optimizer"], rows["weight"]["effective_lr"]) == (name, None)
    assert f"weight: {name} {reason}" in notes


def test_averaged_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where Lightning keeps averages in the place of the weights, the weights are what the next step starts from."""
    average = EMAWeightAveraging(decay=0.99, update_every_n_steps=1)
    saved = ModelCheckpoint(dirpath=tmp_path, filename="run")
    trainer(average, saved, enable_checkpointing=True).fit(Net(make("SGD", weight_decay=50.0)), loader())
    content = torch.load(tmp_path / "run.ckpt", weights_only=True)
    rows, _ = inspected(capsys, str(tmp_path / "run.ckpt"))
    norms = {key: content[key]["conv1.weight"].double().norm().item() for key in ("state_dict", "current_model_state")}
    assert norms["state_dict"] != pytest.approx(norms["current_model_state"], rel=0.05)
    assert rows["conv1.weight"]["norm"] == pytest.approx(norms["current_model_state"], rel=FLOAT32)


def test_a_verdict_of_another_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What it does not speak of is said to be unknown."""
    path = trained(tmp_path, Net(make("AdamW")))
    save_verdict({"conv1.weight": ScaleInvariance("neuron", dim=0)}, tmp_path / "verdict.json")
    rows, notes = inspected(capsys, str(path), "--invariance", str(tmp_path / "verdict.json"))
    assert (rows["conv1.weight"]["units"], rows["up.weight"]["units"]) == ("each neuron", "unknown")
    assert "It says nothing of norm1.weight, norm1.bias, up.weight, norm2.weight and 3 more" in notes


@pytest.mark.parametrize("form", ["plain", "script"])
def test_state_dicts(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A module's own, and what torch's tutorial saves; tied weights are shown once, infinite norms in words."""
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    net[2].weight = net[0].weight
    with torch.no_grad():
        net[0].bias[0] = math.inf
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    content = {"model_state_dict": net.state_dict(), "optimizer_state_dict": optimizer.state_dict(), "epoch": 3}
    torch.save(net.state_dict() if form == "plain" else content, tmp_path / "net.pt")
    rows, notes = inspected(capsys, str(tmp_path / "net.pt"))
    assert list(rows) == ["0.weight", "0.bias", "1.weight", "1.bias", "2.bias"]
    assert "Tied, and shown once: 0.weight = 2.weight" in notes
    assert rows["0.bias"]["norm"] == "inf"
    assert {row["lr"] for row in rows.values()} == ({None} if form == "plain" else {0.1})


MODEL = ["--model=users_module.OwnOptimizer", "--data=users_module.Data", "--seed_everything=0"]


def test_a_model_before_training(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """NormSummary's table and sentences; nothing is trained or written but the verdict, which callbacks take."""
    cli.main(["inspect", *MODEL, "--save=verdict.json", "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=."])
    out = " ".join(capsys.readouterr().out.split())
    for said in ("Before training", "each neuron (float64)", "1/(lr·decay) = 16 steps, 2.67 epochs"):
        assert said in out
    assert {path.name for path in folder.iterdir()} - {"__pycache__"} == {
        "users_module.py",
        "users_other_module.py",
        "verdict.json",
    }
    verdict = load_verdict("verdict.json")
    assert {name for name, v in verdict.items() if v.is_invariant} == {"hidden.weight", "scale"}
    assert NormProjection(invariance="verdict.json").invariance == "verdict.json"


@pytest.mark.parametrize("module", ["users_module", "users_other_module"])
def test_a_model_from_a_checkpoint(module: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the config.yaml of a run, with another Trainer than that asked for: the same numbers as without the model."""
    words = [*MODEL, "--trainer.max_epochs=2", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    words = [word.replace("users_module", module) for word in words]
    cli.main(["fit", *words, "--monitor=false", "--trainer.log_every_n_steps=1"])
    (path,) = folder.glob("lightning_logs/version_0/checkpoints/*.ckpt")
    inspected(capsys, str(path))
    alone, _ = inspected(capsys, str(path))
    config = "lightning_logs/version_0/config.yaml"
    rows, notes = inspected(
        capsys, "--config", config, "--ckpt_path", str(path), "--trainer.devices=8", "--trainer.precision=16-mixed"
    )
    assert "97% of what you decay" not in notes
    hidden = rows["hidden.weight"]
    assert (hidden["role"], hidden["evidence"], hidden["optimizer"]) == ("weight", "float64", "SGD")
    assert hidden["effective_lr"] == pytest.approx(0.125 / hidden["unit_norm_rms"] ** 2, rel=1e-6)
    assert hidden["effective_lr"] == alone["hidden.weight"]["effective_lr"]
    head = rows["head.weight"]
    assert head["effective_lr"] is None
    assert head["effective_lr_not_invariant"] == pytest.approx(0.125 / head["norm"] ** 2, rel=1e-6)
    assert [row["norm"] for row in rows.values()] == [alone[name]["norm"] for name in rows]


def test_a_model_under_projection(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What it holds has a radius and no equilibrium of decay."""
    rows, _ = inspected(capsys, *MODEL, "--projection.radius=2.0")
    hidden = rows["hidden.weight"]
    assert (hidden["radius"], hidden["equilibrium_rotation"]) == (2.0, None)
    assert hidden["unit_norm_rms"] == pytest.approx(2.0, rel=FLOAT32)
