"""Leaving no trace: random states, autocast, compilation and warnings put back as they were."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterable, Iterator

import torch

from lightning_normreg._symmetries._random import global_generators, own_generator


@contextlib.contextmanager
def quiet(devices: Iterable[torch.device], generator: torch.Generator) -> Iterator[None]:
    """Seed everything, and compute without autocast, compilation or warnings; afterwards nothing has changed.

    Args:
        devices: Devices other than the CPU that draw random numbers.
        generator: Takes the place of torch's generator of the CPU, for this thread; its seed is that of all others.
    """
    devices = list(devices)
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(global_generators(generator.initial_seed(), devices))
        stack.enter_context(own_generator(generator))
        for kind in {"cpu", *(d.type for d in devices)}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.enable_grad())
        yield
