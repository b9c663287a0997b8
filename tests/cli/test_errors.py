"""Wrong YAML and arguments: the key, the remedy, exit code 2, no traceback; bugs keep theirs."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_normreg import cli
from tests.cli.harness import TRAINER, fit

FIT = [
    "fit", "--model=users_module.Net", "--data=users_module.Data", "--seed_everything=0", "--trainer.max_epochs=1",
    "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=.", "--trainer.enable_progress_bar=false",
    "--trainer.accelerator=cpu", "--trainer.enable_checkpointing=false", "--trainer.enable_model_summary=false",
]  # fmt: skip
SGD = "--optimizer=SGD"


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """What is said on the way out, without the usage."""
    with pytest.raises(SystemExit, match=r"^2$"):
        cli.main(args)
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said.partition("\nerror: ")[2]


@pytest.mark.parametrize(
    "args, key, remedy",
    [
        # Words that the parser does not know.
        (["--trainer.epochs=3"], "--trainer.epochs", "Did you mean --trainer."),
        (["--trainer.max_epochs=many"], '"trainer.max_epochs"', "Expected a int"),
        (["--projection.radus=1"], '"projection"', "--projection.help"),
        (["--decay.gamma=small", SGD], '"decay"', "--decay.help"),
        (["--monitor=maybe"], '"monitor"', "--monitor.help"),
        (["--optimizer=AdmW"], '"optimizer"', "No class of this name is known: AdmW"),
        (["--optimizer=AdamW", "--optimizer.wd=1"], '"optimizer"', "Option 'wd' is not accepted"),
        ([SGD, "--lr_scheduler=SequentialLR"], '"lr_scheduler"', "a SchedulerSequence takes the place"),
        ([SGD, "--lr_scheduler=ReduceLROnPlateau"], '"lr_scheduler"', "required: monitor"),
        (["--model=users_module.Nett"], '"model"', "has no attribute 'Nett'"),
        (["--model=no_module.Net"], '"model"', "No module named 'no_module'"),
        (["--config=none.yaml"], '"config"', "does not exist"),
        # Words that are nearly right.
        (["--model=DemoConvNt"], '"model"', "Did you mean DemoConvNet?"),
        (["--model=users_module.Nett"], '"model"', "Did you mean Net?"),
        (["--model=Unheard"], '"model"', "module.Class"),
        (["--optimizer=AdamX"], '"optimizer"', "or Adam?\n  What it takes is shown by --optimizer.help CLASS."),
        (["--optimizer=adamw"], '"optimizer"', "Did you mean AdamW"),
        (["--optimizer={class_path: SGD, init_args: {momentun: 0.9}}"], "'momentun'", "Did you mean momentum?"),
        (["--model.widthh=3"], "'widthh'", "Did you mean width?"),
        (["--monitor.evry_n_steps=3"], "'evry_n_steps'", "Did you mean every_n_steps"),
        (["--trainer.callbacks=NormProjecton"], '"trainer.callbacks"', "Did you mean NormProjection?"),
        (["--rotation.angle=equilibriun"], '"rotation"', "Did you mean equilibrium?"),
        (["--rotation.hold=meen"], "Expected one of 'step', 'mean'", "Did you mean mean?"),
        (["--lr_interval=stp"], '"lr_interval"', "Did you mean step?"),
        (["--monitor.include=[*.weight]"], '"monitor"', """--KEY '["*.weight"]'"""),
        # Values that constructors refuse.
        (["--projection.radius=-1"], "projection: `radius`", "Use 1.0 for unit norm"),
        (["--rotation.angle=4"], "rotation: `angle`", "Angles per step are small"),
        (["--rotation.replay=nowhere"], "rotation: `replay`", "Give the folder that a logger wrote"),
        (["--monitor.every_n_steps=0"], "monitor: `every_n_steps`", "Use None"),
        (["--model.width=0"], "model: width must be positive", "JSONARGPARSE_DEBUG=true"),
        (["--trainer.accelerator=quantum"], "trainer: ", "Available names are"),
        (["--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=flat", "--trainer.callbacks.mode=up"],
         "trainer.callbacks[0]: `mode` can be min, max", "got up"),
        # Values that the model, or the other arguments, do not go with.
        ([SGD, "--monitor.include=[nothing*]"], "monitor: `include`", "Near misses: 'norm.weight'"),
        ([SGD, "--trainer.callbacks+=NormProjection", "--trainer.callbacks.include=[nothing*]"],
         "trainer.callbacks[0]: `include`", "Near misses"),
        ([SGD, "--optimizer.lr=-1"], "optimizer: Invalid learning rate", "-1.0"),
        ([SGD, "--decay.gamma=-1"], "decay: `gamma`", "Use 0.0 for none"),
        ([SGD, "--decay.overrides={nothing: 0.1}"], "decay: `overrides`", "Near misses"),
        ([SGD, "--lr_scheduler=OneCycleLR", "--lr_scheduler.max_lr=1"], "lr_scheduler: ", "define either total_steps"),
        (["--optimizer=torch.optim.Muon"], "optimizer: Muon only supports 2D", "[8]"),
        ([], "optimizer: Net has no configure_optimizers", "Give one, such as AdamW"),
        (["--model=users_module.OwnOptimizer", "--decay.gamma=0"], "decay: ", "Give --optimizer"),
        (["--model=users_module.OwnOptimizer", "--lr_scheduler=StepLR", "--lr_scheduler.step_size=1"],
         "lr_scheduler: ", "it needs --optimizer"),
        (["--ckpt_path=none.ckpt"], "ckpt_path: ", "there is no file 'none.ckpt'"),
        (["--ckpt_path=users_module.py"], "ckpt_path: ", "no checkpoint that can be loaded with weights_only=True"),
    ],
)  # fmt: skip
def test_wrong_arguments(
    args: list[str], key: str, remedy: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each names its key and says what to do, in a few lines."""
    said = refused(capsys, *FIT, *args)
    assert key in said
    assert remedy in said
    assert len(said.splitlines()) <= 9
    for option in re.findall(r"shown by (--\S+.help)", said):
        assert option in known_options()


@cache
def known_options() -> set[str]:
    """Those of ``fit``: what a remedy points to is there."""
    out = io.StringIO()
    for word in ("--help", "--trainer.help"):
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            cli.main(["fit", word])
    return set(re.findall(r"--[\w.]+", out.getvalue()))


@pytest.mark.parametrize(
    "line, remedy",
    [
        ("optimiser: SGD", "Did you mean optimizer?"),
        ("trainer: {max_epoch: 3}", "Did you mean trainer.max_epochs"),
        ("rotation: {angel: 0.1}", "Did you mean angle?"),
        ("rotation: {angle: equilibriun}", "Did you mean equilibrium?"),
        ("optimizer: {class_path: AdmW}", "Did you mean AdamW"),
        ("trainer: {callbacks: [{class_path: NormProjecton}]}", "Did you mean NormProjection?"),
        (
            "lr_scheduler: {class_path: SchedulerSequence, init_args: {schedulers: [LinearLr], milestones: []}}",
            "Did you mean LinearLR?",
        ),
        ("monitor: {include: [*.weight]}", 'quoted in YAML: ["*.weight"]'),
        ("monitor: {include: [*weight]}", 'quoted in YAML: ["*.weight"]'),
    ],
)
def test_a_file_that_is_nearly_right(line: str, remedy: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Keys, class names and choices in YAML get a suggestion, once; a pattern is to be quoted."""
    Path("nearly.yaml").write_text(f"model: users_module.Net\ndata: users_module.Data\n{line}\n")
    said = refused(capsys, "fit", "--config=nearly.yaml")
    assert said.count(remedy) == 1
    assert "--schedulers.help" not in said


@pytest.mark.parametrize(
    "words, said",
    [
        ("ft", "'ft' is no subcommand. Did you mean fit?"),
        ("plot . --layer x", "Did you mean --layers?"),
        ("plan --as projecton", "Did you mean projection?"),
        ("plan --as angle --optimizr SGD", "Did you mean --optimizer?"),
        ("inspect run.yaml", "ckpt_path: 'run.yaml' is a configuration, no checkpoint. Give it by --config.\n"),
    ],
)
def test_other_subcommands(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Suggestions are the same everywhere."""
    assert said in refused(capsys, *words.split())


def test_an_option_that_is_like_no_other(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """There is no suggestion rather than a wild one."""
    assert refused(capsys, *FIT, "--lr.help") == "unrecognized arguments: --lr.help\n"


@pytest.mark.parametrize(
    "words, said", [(["fitt"], "'fitt' is no subcommand"), (["fit"], "required: fit.model"),
                    ([*FIT[:2], *FIT[3:], SGD, "--monitor=false"], "A data module is given by --data")]
)  # fmt: skip
def test_what_is_missing(words: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A subcommand, a model, data."""
    assert said in refused(capsys, *words)


def test_the_demo(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its model refuses an argument when the optimizer is made."""
    assert "model: `weight_decay` must be a decay" in refused(capsys, "demo", "--model.weight_decay=-1")


@pytest.mark.slow
def test_a_callback_in_a_yaml_file(folder: Path) -> None:
    """In a process of its own: the position in the file, the argument, the rule; nothing is trained."""
    callbacks: list[Any] = [{"class_path": "NormSummary"},
                            {"class_path": "EffectiveLRMonitor", "init_args": {"every_n_steps": 0}}]  # fmt: skip
    config = {"model": "users_module.Net", "trainer": TRAINER | {"callbacks": callbacks}}
    Path("wrong.yaml").write_text(yaml.safe_dump(config))
    words = [sys.executable, "-m", "lightning_normreg", "fit", "--config", "wrong.yaml"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "error: trainer.callbacks[1]: `every_n_steps` must be a positive integer or None, got 0." in done.stderr
    assert "Traceback" not in done.stderr
    assert not Path("lightning_logs").exists()


@pytest.mark.parametrize(
    "line, message",
    [
        ("x, y, z = batch", r"not enough values to unpack"),
        ("x, y = batch; import lightning_normreg as n; n.decay_groups(self, -1.0)", r"`weight_decay` must be a decay"),
    ],
)
def test_a_bug_keeps_its_traceback(line: str, message: str, folder: Path) -> None:
    """An error in the user's training_step is none of an argument, even where it calls this package."""
    source = Path("users_module.py")
    source.write_text(source.read_text().replace("x, y = batch", line))
    with pytest.raises(ValueError, match=message):
        fit({"optimizer": "SGD", "monitor": False})


def test_debugging(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With jsonargparse's switch the error of a constructor is raised, with what caused it."""
    monkeypatch.setenv("JSONARGPARSE_DEBUG", "true")
    with pytest.raises(Exception, match=r"model: width must be positive, got 0") as caught:
        cli.main([*FIT, "--model.width=0"])
    assert isinstance(caught.value.__cause__, ValueError)
