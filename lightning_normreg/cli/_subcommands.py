"""The subcommands: what each does, in a line, and commands to start from."""

from __future__ import annotations

import textwrap

PROGRAM = "lightning-normreg"

COMMANDS = {"demo": "_demo", "inspect": "_inspect", "plot": "_plot", "plan": "_plan"}
"""Those that are not LightningCLI's, and the file of each: a function of that name takes the arguments. None of them is
imported to show the list."""

SUMMARIES = {
    "fit": "Train any LightningModule, with curves of what weight decay does to it.",
    "validate": "Run one evaluation epoch over the validation set.",
    "test": "Run one evaluation epoch over the test set.",
    "predict": "Run inference on your data.",
    "demo": "Train a small network on embedded data and show what happened to its layers.",
    "inspect": "Show the norms and effective learning rates of a model or a checkpoint, without training.",
    "plot": "Draw the curves of one run, or of several side by side, on one page.",
    "plan": "Predict norms and rotations of a run before it starts, or rewrite its recipe.",
}
"""What each subcommand does, in a line."""

_DEMO = "--model DemoConvNet --data DigitsDataModule --trainer.max_epochs 2"
_PLANNED = _DEMO.replace("epochs 2", "epochs 20") + (
    " --optimizer AdamW --optimizer.betas [0.9,0.95] --optimizer.weight_decay 1"
)
_RUN = "lightning_logs/version_0"
_TRAINED = f"--config {_RUN}/config.yaml --ckpt_path {_RUN}/checkpoints/epoch=1-step=40.ckpt"
EXAMPLES = {
    "fit": [
        _DEMO,
        f"{_DEMO} --optimizer AdamW --optimizer.weight_decay 0.05 --decay.bias 0.01 "
        "--lr_scheduler OneCycleLR --lr_scheduler.max_lr 0.01 --lr_scheduler.total_steps 40",
        f"{_DEMO} --projection.radius 1.0 --monitor.every_n_steps 5 --monitor.progress_bar true",
        f"{_DEMO} --optimizer AdamW --optimizer.weight_decay 0.1 --rotation.angle equilibrium --rotation.hold mean",
    ],
    "validate": [_TRAINED],
    "test": [_TRAINED],
    "predict": [_TRAINED],
    "demo": [
        "",
        "--projection true --model.weight_decay 0 --trainer.max_epochs 2",
        "--model transformer --trainer.max_epochs 1",
    ],
    "plot": [_RUN, "lightning_logs --layers 'block*' --output curves.svg"],
    "inspect": [
        f"{_RUN}/checkpoints/epoch=1-step=40.ckpt",
        f"{_RUN}/checkpoints/epoch=1-step=40.ckpt --optimizer SGD --json",
        "--model DemoConvNet --data DigitsDataModule --save verdict.json",
        _TRAINED,
    ],
    "plan": [
        f"{_PLANNED} --output plan.png",
        f"{_PLANNED} --for timescale=2 --save plan.json",
        f"{_RUN}/checkpoints/epoch=1-step=40.ckpt --optimizer AdamW --betas [0.9,0.95] --lr 0.01 --weight_decay 1 "
        "--steps 400",
        "--as projection --optimizer AdamW --lr 1e-3 --weight_decay 0.1 --entries 576",
        "--as decay --optimizer AdamW --lr 1e-3 --radius 1.0 --entries 576",
        "--as schedule --optimizer SGD --lr 0.1 --weight_decay 5e-4 --momentum 0.9 --steps 1000",
        "--as angle --optimizer AdamW --lr 1e-3 --weight_decay 0.1",
    ],
}
"""Arguments by subcommand. Those with a checkpoint need the first command of ``fit`` to have been run."""


def epilog(subcommand: str) -> str:
    """The examples as they stand at the end of a help, to be pasted into a shell."""
    lines = ["examples:"]
    for arguments in EXAMPLES[subcommand]:
        words = f"{PROGRAM} {subcommand} {arguments}".strip().replace(" --", "\0--")  # an option stays with its value
        folded = textwrap.wrap(words.replace(" ", "\1").replace("\0", " "), 88, break_on_hyphens=False)
        lines.append("  " + " \\\n      ".join(folded).replace("\1", " "))
    return "\n".join(lines)


def overview() -> str:
    """What ``lightning-normreg --help`` shows."""
    listed = "\n".join(f"  {name:<10}{summary}" for name, summary in SUMMARIES.items())
    return (
        f"usage: {PROGRAM} SUBCOMMAND [options]\n\n"
        "See and control what weight decay does to normalized networks.\n\n"
        f"subcommands:\n{listed}\n\n"
        "Each has a --help with examples; --version says what is installed.\n"
        f"For a first run on embedded data: {PROGRAM} demo"
    )
