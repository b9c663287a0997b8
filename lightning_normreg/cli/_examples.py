"""What the subcommands of :class:`NormRegCLI` do, in a line each, and commands to start from."""

from __future__ import annotations

PROGRAM = "lightning-normreg"

SUMMARIES = {
    "fit": "Train any LightningModule, with curves of what weight decay does to it.",
    "validate": "Run one evaluation epoch over the validation set.",
    "test": "Run one evaluation epoch over the test set.",
    "predict": "Run inference on your data.",
}

_CHECKPOINT = "--config lightning_logs/version_0/config.yaml --ckpt_path {0}".format(
    "lightning_logs/version_0/checkpoints/epoch=1-step=40.ckpt"
)
EXAMPLES = {
    "fit": [
        "--model DemoConvNet --data DigitsDataModule --trainer.max_epochs 2",
        "--model DemoConvNet --data DigitsDataModule --trainer.max_epochs 2 --optimizer AdamW "
        "--optimizer.weight_decay 0.05 --decay.gamma 0 --lr_scheduler CosineAnnealingWarmRestarts --lr_scheduler.T_0 1",
        "--model DemoConvNet --data DigitsDataModule --trainer.max_epochs 2 --projection true "
        "--monitor.every_n_steps 5 --monitor.progress_bar true",
    ],
    "validate": [_CHECKPOINT],
    "test": [_CHECKPOINT],
    "predict": [_CHECKPOINT],
    "demo": ["", "--projection true --model.weight_decay 0"],
}
"""Arguments by subcommand. Those with a checkpoint need the first command of ``fit`` to have been run."""


def epilog(subcommand: str) -> str:
    """The examples as they stand at the end of a help."""
    return "\n".join(["examples:", *(f"  {PROGRAM} {subcommand} {a}".rstrip() for a in EXAMPLES[subcommand])])
