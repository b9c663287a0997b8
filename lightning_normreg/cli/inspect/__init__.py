"""``lightning-normreg inspect``."""

from lightning_normreg.cli.inspect._command import inspect as inspect
