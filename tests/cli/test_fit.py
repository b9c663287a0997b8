"""From YAML alone: decay groups, schedules, monitors and projection for a module that knows nothing of the package."""

from __future__ import annotations

import copy
import math
import pickle
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.optim.lr_scheduler import OneCycleLR, StepLR

from lightning_normreg import (
    DecayFreeLR,
    EffectiveLRMonitor,
    NormProjection,
    NormRegCLI,
    RotationControl,
    WeightNormMonitor,
    cli,
)
from lightning_normreg.cli import SchedulerChain, SchedulerSequence
from lightning_normreg.cli._schedulers import natural_interval
from tests.cli.conftest import BATCHES
from tests.cli.harness import fit, groups, logged

BASE = 0.1
OPTIMIZER = {"class_path": "AdamW", "init_args": {"lr": BASE, "weight_decay": 0.05}}
LR_MONITOR = {"class_path": "LearningRateMonitor", "init_args": {"logging_interval": "step"}}
STEPS = 2 * BATCHES
SPLIT = [
    ("weight", 0.05, ["hidden.weight", "head.weight"]),
    ("gamma", 0.0, ["norm.weight"]),
    ("beta", 0.0, ["norm.bias"]),
    ("bias", 0.0, ["hidden.bias", "head.bias"]),
    ("other_wd_0", 0.0, ["scale"]),
]


@pytest.fixture(autouse=True)
def _seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning warns where no test of this process has set a seed before."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")


def named(found: list[dict[str, Any]]) -> list[tuple[str, float, list[str]]]:
    """What decides about decay."""
    return [(group["name"], group["weight_decay"], group["param_names"]) for group in found]


def cosine(fraction: float) -> float:
    """From 1 to 0."""
    return (1 + math.cos(math.pi * fraction)) / 2


def one_cycle(t: int) -> float:
    """OneCycleLR's default: 30 % up from 1/25, then down to 1/25/1e4, of the maximum."""
    top = 0.3 * STEPS - 1
    if t <= top:
        return 1 + (1 / 25 - 1) * cosine(t / top)
    end = 1 / 25 / 1e4
    return end + (1 - end) * cosine((t - top) / (STEPS - 1 - top))


def linear(factor: float, steps: int) -> dict[str, Any]:
    """A warm-up."""
    return {"class_path": "LinearLR", "init_args": {"start_factor": factor, "total_iters": steps}}


# What is asked for, its interval where it is not the default, and the learning rate over the base at time t.
SCHEDULES: dict[str, tuple[dict[str, Any], str | None, Any]] = {
    "warm restarts": (
        {"class_path": "CosineAnnealingWarmRestarts", "init_args": {"T_0": 3, "T_mult": 2}},
        "step",
        lambda t: cosine(t / 3) if t < 3 else cosine((t - 3) / 6) if t < 9 else cosine((t - 9) / 12),
    ),
    "warm-up and cosine": (
        {
            "class_path": "SchedulerSequence",
            "init_args": {
                "schedulers": [linear(0.1, 5), {"class_path": "CosineAnnealingLR", "init_args": {"T_max": 10}}],
                "milestones": [5],
            },
        },
        "step",
        lambda t: 0.1 + 0.9 * t / 5 if t < 5 else cosine((t - 5) / 10),
    ),
    "one cycle": (
        {"class_path": "OneCycleLR", "init_args": {"max_lr": BASE, "total_steps": STEPS}},
        None,
        one_cycle,
    ),
    "cyclic": (
        {"class_path": "CyclicLR", "init_args": {"base_lr": BASE / 10, "max_lr": BASE, "step_size_up": 4}},
        None,
        lambda t: 0.1 + 0.9 * (1 - abs(t % 8 - 4) / 4),
    ),
    "chain": (
        {
            "class_path": "SchedulerChain",
            "init_args": {
                "schedulers": [linear(0.5, 4), {"class_path": "ExponentialLR", "init_args": {"gamma": 0.9}}]
            },
        },
        "step",
        lambda t: min(1.0, 0.5 + 0.5 * t / 4) * 0.9**t,
    ),
    "a function": ({"class_path": "LambdaLR", "init_args": {"lr_lambda": "users_module.halved"}}, None,
                   lambda t: 0.5 ** (t // BATCHES)),
    "plateau": (
        {"class_path": "ReduceLROnPlateau", "init_args": {"monitor": "flat", "patience": 0, "factor": 0.25}},
        "step",
        lambda t: 0.25 ** max(t - 1, 0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_schedule_is_the_one_asked_for(name: str, folder: Path) -> None:
    """LearningRateMonitor logs, in every group, the closed form of the schedule in the YAML."""
    scheduler, interval, expected = SCHEDULES[name]
    run = fit(
        {
            "optimizer": OPTIMIZER,
            "decay": {"gamma": 0},
            "lr_scheduler": scheduler,
            "lr_interval": interval,
            "monitor": False,
            "trainer": {"callbacks": [LR_MONITOR]},
        }
    )
    assert named(groups(run)) == SPLIT
    for group, _, _ in SPLIT:
        # torch goes from value to value: some 12 roundings of float64, relative to the base.
        assert logged(run, f"lr-AdamW/{group}") == pytest.approx(
            [BASE * expected(t) for t in range(STEPS)], rel=1e-12, abs=1e-13
        )


def test_the_interval_where_none_is_given() -> None:
    """Batches where the documents say that the scheduler is called after each; parts decide for a whole."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2, 2))], lr=BASE)
    assert natural_interval(StepLR(optimizer, 3)) == "epoch"
    assert natural_interval(DecayFreeLR(optimizer)) == "step"
    parts = [partial(StepLR, step_size=3), partial(OneCycleLR, max_lr=BASE, total_steps=9)]
    assert natural_interval(SchedulerSequence(optimizer, parts, [3])) == "step"
    assert natural_interval(SchedulerChain(optimizer, parts[:1])) == "epoch"


@pytest.mark.pitfall(17)
def test_flags_alone(folder: Path) -> None:
    """The first example of the issue, on the command line; the scheduler steps after each epoch by default."""
    run = fit(
        {"trainer": {"callbacks": LR_MONITOR}},
        *["--optimizer", "AdamW", "--optimizer.weight_decay", "0.05", "--decay.gamma", "0"],
        *["--lr_scheduler", "CosineAnnealingWarmRestarts", "--lr_scheduler.T_0", "2"],
    )
    assert named(groups(run)) == SPLIT
    assert logged(run, "lr-AdamW/weight") == pytest.approx([1e-3] * BATCHES + [0.5e-3] * BATCHES, rel=1e-12)
    rates = logged(run, "weights/effective_lr/hidden.weight")
    assert len(rates) == len(logged(run, "weights/unit_norm_rms/hidden.weight")) == STEPS


@pytest.mark.parametrize(
    "decay, expected",
    [
        (False, [(None, 0.05, None)]),
        (
            {"gamma": None, "bias": 0.01, "overrides": {"head.*": 0.2}},
            [
                ("weight", 0.05, ["hidden.weight"]),
                ("weight_wd_0.2", 0.2, ["head.weight"]),
                ("gamma", 0.05, ["norm.weight"]),
                ("beta", 0.0, ["norm.bias"]),
                ("bias", 0.01, ["hidden.bias"]),
                ("bias_wd_0.2", 0.2, ["head.bias"]),
                ("other_wd_0", 0.0, ["scale"]),
            ],
        ),
    ],
)
def test_decay(decay: Any, expected: list[Any], folder: Path) -> None:
    """One group on request, or the decay of each role."""
    made = fit({"optimizer": OPTIMIZER, "decay": decay, "monitor": False})
    assert [(g.get("name"), g["weight_decay"], g.get("param_names")) for g in groups(made)] == expected


@pytest.mark.pitfall(29)
def test_another_optimizer_takes_over_what_was_written_and_no_default(folder: Path) -> None:
    """AdamW decays by 0.01 if nothing is said, SGD does not, whichever was named before it."""
    args = ["--optimizer=AdamW", "--optimizer=SGD", "--optimizer.lr=0.25"]
    assert [(g["lr"], g["weight_decay"]) for g in groups(fit({"monitor": False}, *args))] == [(0.25, 0.0)] * 5
    weights, *_ = groups(fit({"monitor": False, "optimizer": OPTIMIZER}, "--optimizer=SGD"))
    assert (weights["lr"], weights["weight_decay"]) == (BASE, 0.05)


def test_without_an_optimizer_the_models_own_is_used(folder: Path) -> None:
    """Its configure_optimizers stays as it is."""
    (group,) = groups(fit({"model": "users_module.OwnOptimizer", "monitor": False}))
    assert (group["lr"], group["weight_decay"]) == (0.125, 0.5)


def test_the_other_namespace(folder: Path) -> None:
    """A module of ``lightning.pytorch`` gets that Trainer, from the same YAML."""
    run = fit(
        {
            "optimizer": OPTIMIZER,
            "lr_scheduler": SCHEDULES["plateau"][0],
            "projection": {"radius": 2.0},
            "trainer": {"callbacks": [LR_MONITOR]},
        },
        module="users_other_module",
    )
    assert named(groups(run)) == SPLIT
    assert logged(run, "weights/unit_norm_rms/hidden.weight") == pytest.approx([2.0] * STEPS, rel=1e-6)  # float32
    made = NormRegCLI(args=["--config=config.yaml"], run=False)
    assert type(made.trainer).__module__.startswith("lightning.pytorch")

    class Derived(NormRegCLI):
        pass

    with pytest.raises(TypeError, match=r"Derive it from NormRegCLI\.of\('lightning\.pytorch'\)"):
        Derived(args=["--config=config.yaml"], run=False)

    class Other(NormRegCLI.of("lightning.pytorch")):  # type: ignore[misc]
        pass

    assert type(Other(args=["--config=config.yaml"], run=False).trainer) is type(made.trainer)


ARGS = ["--model=users_module.Net", "--data=users_module.Data", "--trainer.logger=false", "--trainer.accelerator=cpu"]


@pytest.mark.parametrize(
    "args, expected",
    [
        ([], [(WeightNormMonitor, None), (EffectiveLRMonitor, None)]),
        (["--monitor=false"], []),
        (["--monitor.every_n_steps=7"], [(WeightNormMonitor, 7), (EffectiveLRMonitor, 7)]),
        (
            ["--trainer.callbacks+=EffectiveLRMonitor", "--trainer.callbacks.every_n_steps=3"],
            [(EffectiveLRMonitor, 3), (WeightNormMonitor, None)],
        ),
        (
            ["--trainer.callbacks+=EffectiveLRMonitor", "--trainer.callbacks.every_n_steps=3",
             "--trainer.callbacks.exclude=[head.weight]",
             "--trainer.callbacks+=EffectiveLRMonitor", "--trainer.callbacks.every_n_steps=4", "--monitor=true"],
            [(EffectiveLRMonitor, 3), (EffectiveLRMonitor, 4), (WeightNormMonitor, None)],
        ),
        (["--monitor=false", "--projection=true"], [(NormProjection, None)]),
        (["--monitor=false", "--projection.radius=1.0", "--trainer.callbacks=NormProjection"],
         [(NormProjection, None)]),
        (["--monitor=false", "--rotation.angle=0.02"], [(RotationControl, None)]),
    ],
)  # fmt: skip
def test_callbacks_that_are_named_replace_those_of_the_groups(
    args: list[str], expected: list[Any], folder: Path
) -> None:
    """None is there twice, unless it was named twice; defaults of a script are replaced likewise."""
    made = NormRegCLI(args=ARGS + args, run=False)
    ours = (WeightNormMonitor, EffectiveLRMonitor, NormProjection, RotationControl)
    found = [(type(c), getattr(c, "every_n_steps", None)) for c in made.trainer.callbacks if isinstance(c, ours)]
    assert found == expected


def test_defaults_of_a_script_are_replaced(folder: Path) -> None:
    """Unlike in LightningCLI, ``trainer_defaults`` do not come on top of what the YAML names."""
    defaults = {"callbacks": [EffectiveLRMonitor(5), NormProjection(3.0)]}
    args = [*ARGS, "--monitor=false", "--trainer.callbacks=EffectiveLRMonitor"]
    for _ in range(2):  # the script's own mapping stays as it is
        made = NormRegCLI(args=args, run=False, trainer_defaults=defaults)
    (monitor,) = [c for c in made.trainer.callbacks if isinstance(c, EffectiveLRMonitor)]
    (projection,) = [c for c in made.trainer.callbacks if isinstance(c, NormProjection)]
    assert (monitor.every_n_steps, projection.radius) == (None, 3.0)


def test_the_model_can_still_be_copied_and_sent(folder: Path) -> None:
    """The probe copies it, a spawned process gets it by pickle: neither takes the command line along."""
    args = [*ARGS, "--optimizer=SGD", "--lr_scheduler=StepLR", "--lr_scheduler.step_size=2"]
    model = NormRegCLI(args=args, run=False).model
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        made: Any = twin.configure_optimizers()
        (weights, *_) = made["optimizer"].param_groups
        assert weights["params"][0] is twin.hidden.weight
        assert isinstance(made["lr_scheduler"]["scheduler"], StepLR)
    assert len(pickle.dumps(model)) < 20_000


@pytest.mark.parametrize("subcommand", ["fit", "validate", "test", "predict"])
def test_print_config_round_trips(subcommand: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is printed, read again, prints itself."""
    args = [
        *ARGS, "--optimizer=AdamW", "--decay.gamma=null", "--decay.overrides={head.*: 0.1}", "--projection.radius=1.0",
        "--monitor.gradient=true", "--lr_interval=step", "--lr_scheduler=SchedulerSequence",
        "--lr_scheduler.schedulers=[{class_path: LinearLR}, {class_path: StepLR, init_args: {step_size: 3}}]",
        "--lr_scheduler.milestones=[4]", "--trainer.callbacks+=NormSummary",
    ]  # fmt: skip

    def printed(*words: str) -> str:
        with pytest.raises(SystemExit, match=r"^0$"):
            cli.main([subcommand, *words, "--print_config"])
        return capsys.readouterr().out

    sys.path.remove(str(folder))  # a console script has not got it: main() adds the present folder
    first = printed(*args)
    Path("again.yaml").write_text(first)
    assert printed("--config=again.yaml") == first
    config = yaml.safe_load(first)
    assert config["decay"]["gamma"] is None
    assert config["lr_scheduler"]["class_path"] == "lightning_normreg.cli.SchedulerSequence"
    assert config["lr_scheduler"]["init_args"]["schedulers"][1]["init_args"]["step_size"] == 3
    assert config["trainer"]["callbacks"][0]["class_path"] == "lightning_normreg.NormSummary"


@pytest.mark.parametrize("module", ["users_module", pytest.param("users_other_module", marks=pytest.mark.slow)])
def test_a_run_is_repeated_from_what_it_saved_or_printed(
    module: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights are the same bit by bit, and other ones without clipping, although a help was shown before."""
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.main(["fit", "--help"])
    quiet = ["progress_bar", "model_summary"]
    args = [f"--model={module}.Net", f"--data={module}.Data", "--optimizer=SGD", "--optimizer.lr=0.1",
            "--monitor=false", "--trainer.accelerator=cpu", "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=.",
            "--trainer.max_epochs=2", *(f"--trainer.enable_{name}=false" for name in quiet)]  # fmt: skip
    clip = "--trainer.gradient_clip_val=0.125"
    capsys.readouterr()
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.main(["fit", *args, clip, "--seed_everything=17", "--print_config"])
    Path("printed.yaml").write_text(capsys.readouterr().out)
    monkeypatch.setenv("PL_GLOBAL_SEED", "17")
    cli.main(["fit", *args, clip])
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")  # not that of the first run: the file says which
    logs = Path("lightning_logs")
    for words in (["--config=lightning_logs/version_0/config.yaml"], ["--config=printed.yaml"],
                  [*args, "--seed_everything=17"]):  # fmt: skip
        cli.main(["fit", *words])
    paths = [next((logs / f"version_{number}/checkpoints").iterdir()) for number in range(4)]
    first, *others = (torch.load(path, weights_only=True) for path in paths)
    assert [saved["global_step"] for saved in others] == [STEPS] * 3
    same = [all(torch.equal(w, saved["state_dict"][k]) for k, w in first["state_dict"].items()) for saved in others]
    assert same == [True, True, False]
    for file in (logs / "version_0/config.yaml", "printed.yaml"):
        trainer = yaml.safe_load(Path(file).read_text())["trainer"]
        assert (trainer["max_epochs"], trainer["gradient_clip_val"]) == (2, 0.125)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_sequence_resumes(folder: Path) -> None:
    """A run of 4 epochs in two parts logs the schedule of one."""
    config: dict[str, Any] = {"optimizer": OPTIMIZER, "monitor": False, "lr_interval": "step"}
    config["lr_scheduler"] = SCHEDULES["warm-up and cosine"][0]
    config["trainer"] = {"callbacks": [LR_MONITOR]}
    first = fit(config | {"trainer": config["trainer"] | {"max_epochs": 1}})
    (checkpoint,) = (first / "checkpoints").iterdir()
    second = fit(config, "--ckpt_path", str(checkpoint))
    rates = logged(first, "lr-AdamW/weight") + logged(second, "lr-AdamW/weight")
    expected = SCHEDULES["warm-up and cosine"][2]
    assert rates == pytest.approx([BASE * expected(t) for t in range(STEPS)], rel=1e-12, abs=1e-13)
