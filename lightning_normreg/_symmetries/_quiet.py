"""Leaving no trace: loggers that swallow, and random states, default type, autocast put back as they were."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def quiet(dtype: torch.dtype, devices: Iterable[torch.device], seed: int) -> Iterator[None]:
    """Seed everything and compute in ``dtype``, without autocast or compilation; afterwards nothing has changed.

    Args:
        dtype: Default type inside.
        devices: Devices other than the CPU that draw random numbers.
        seed: For torch, NumPy and Python, ``≥ 0``.
    """
    devices = list(devices)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_python_and_numpy_random_states(seed))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        # torch.manual_seed would also seed devices whose state is not put back.
        torch.default_generator.manual_seed(seed)
        for device in devices:
            stack.enter_context(_device_random_state(device, seed))
        for kind in {"cpu", *(d.type for d in devices)}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.enable_grad())
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(dtype)
        yield


@contextlib.contextmanager
def _python_and_numpy_random_states(seed: int) -> Iterator[None]:
    numpy = sys.modules.get("numpy")
    state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    random.seed(seed)
    if numpy:
        numpy.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(state)
        if numpy:
            numpy.random.set_state(numpy_state)


@contextlib.contextmanager
def _device_random_state(device: torch.device, seed: int) -> Iterator[None]:
    backend = torch.get_device_module(device)
    guard = backend.device(device) if hasattr(backend, "device") else contextlib.nullcontext()
    with guard:
        state = backend.get_rng_state()
        backend.manual_seed(seed)
    try:
        yield
    finally:
        with guard:
            backend.set_rng_state(state)


def silence(twin: nn.Module, module: nn.Module) -> None:
    """Make the copy ``twin`` log nowhere, and let it see the Trainer of ``module``, which copying drops."""
    for part in twin.modules():
        if all(hasattr(part, name) for name in ("training_step", "log", "log_dict")):
            part.log = part.log_dict = lambda *_args, **_kwargs: None  # type: ignore[assignment]
    try:
        trainer = getattr(module, "trainer", None)
    except RuntimeError:  # Lightning's way to say that there is none
        return
    if trainer is not None:
        twin.trainer = _ReadOnlyTrainer(trainer)  # type: ignore[assignment]


class _ReadOnlyTrainer:
    """A Trainer that can be asked anything, but whose loggers swallow what they are told."""

    def __init__(self, trainer: Any) -> None:
        self.__dict__.update(_trainer=trainer, logger=_Nothing(), loggers=[])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)


class _Nothing:
    """Whatever is asked of it, it answers with itself."""

    def __getattr__(self, name: str) -> _Nothing:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> _Nothing:
        return self
