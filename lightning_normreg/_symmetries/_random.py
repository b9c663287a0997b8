"""Random numbers of the private copy: from generators of its own, so that nobody else's stream moves."""

from __future__ import annotations

import contextlib
import random
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

_IN_PLACE = {
    aten.rand_like.default: aten.uniform_.default,
    aten.randn_like.default: aten.normal_.default,
    aten.randint_like.default: aten.random_.to,
    aten.randint_like.low_dtype: getattr(aten.random_, "from"),
}
"""Operators without a generator, and what fills an empty tensor with the same numbers by one."""


def drawn(func: Any, args: Any, kwargs: Mapping[str, Any], generator: torch.Generator) -> Any:
    """What a random operator on the CPU puts out when it draws from ``generator``."""
    if func in _IN_PLACE:
        empty = torch.empty_like(args[0], **kwargs)
        return _IN_PLACE[func](empty, *args[1:], generator=generator)
    if func is aten.native_dropout.default:
        x, p, is_training = args
        if not is_training:
            return func(*args, **kwargs)
        keep = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p, generator=generator)
        return x * keep / max(1 - p, torch.finfo(x.dtype).tiny), keep
    packet = func.overloadpacket
    name = "generator" if func._overloadname == "default" else f"{func._overloadname}_generator"
    if not _takes_generator(func) and hasattr(packet, name):
        func = getattr(packet, name)
    if _takes_generator(func) and kwargs.get("generator") in (None, torch.default_generator):
        kwargs = {**kwargs, "generator": generator}
    return func(*args, **kwargs)


@cache
def is_random(func: Any) -> bool:
    """Whether an operator draws random numbers."""
    return torch.Tag.nondeterministic_seeded in func.tags


def on_cpu(args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether an operator draws on the CPU."""
    device = kwargs.get("device") or next((a.device for a in args if isinstance(a, Tensor)), "cpu")
    return torch.device(device).type == "cpu"


def _takes_generator(func: Any) -> bool:
    return any(a.name == "generator" for a in func._schema.arguments)


class _Redirected:
    """Torch's generator of the CPU, which one thread finds to be another."""

    def __init__(self, real: Any, generator: torch.Generator) -> None:
        self._real, self._generator, self._thread = real, generator, threading.get_ident()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._generator if threading.get_ident() == self._thread else self._real, name)


@contextlib.contextmanager
def own_generator(generator: torch.Generator) -> Iterator[None]:
    """``torch.manual_seed``, ``get_rng_state`` and ``set_rng_state`` of this thread are about ``generator``.

    Activation checkpointing calls them to draw the same numbers twice.
    """
    where = vars(torch.random)
    real = where["default_generator"]
    where["default_generator"] = _Redirected(real, generator)
    try:
        yield
    finally:
        where["default_generator"] = real


@contextlib.contextmanager
def global_generators(seed: int, devices: Iterable[torch.device]) -> Iterator[None]:
    """Seed those of Python, NumPy and other devices than the CPU; put them back afterwards."""
    numpy = sys.modules.get("numpy")
    state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    with contextlib.ExitStack() as stack:
        stack.callback(random.setstate, state)
        random.seed(seed)
        if numpy:
            stack.callback(numpy.random.set_state, numpy_state)
            numpy.random.seed(seed % 2**32)
        for device in devices:
            stack.enter_context(_of_device(device, seed))
        yield


@contextlib.contextmanager
def _of_device(device: torch.device, seed: int) -> Iterator[None]:
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


def seed_all(objects: Iterable[Any], seed: int) -> None:
    """Seed every generator of torch, NumPy and Python among some objects."""
    numpy = sys.modules.get("numpy")
    for each in objects:
        if isinstance(each, torch.Generator):
            each.manual_seed(seed)
        elif isinstance(each, random.Random):
            each.seed(seed)
        elif numpy and isinstance(each, numpy.random.RandomState):
            each.seed(seed % 2**32)
        elif numpy and isinstance(each, numpy.random.Generator):
            bits = each.bit_generator
            bits.state = type(bits)(seed).state
