"""Calling the real module's loss, sharded or too large to be copied, so that nothing is left of it afterwards."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_normreg._compat import is_named
from lightning_normreg._symmetries._call import Call, Loss
from lightning_normreg._symmetries._copies import copied
from lightning_normreg._symmetries._dispatch import ProbeMode
from lightning_normreg._symmetries._generic_point import generic_point
from lightning_normreg._symmetries._losses import InPlaceLoss, Losses, ProbeError
from lightning_normreg._symmetries._quiet import quiet
from lightning_normreg._symmetries._random import seed_all
from lightning_normreg._symmetries._slices import Table, Tables
from lightning_normreg._symmetries._stand_ins import attach
from lightning_normreg._weights import (
    find_flat_pieces,
    in_type_of_weights,
    local,
    reshard,
    same_memory,
    spread_shards,
    summed,
    whole_shape,
)

T = TypeVar("T")
_NOT_COPIED = {*vars(nn.Module()), "_trainer", "_fabric", "_device_mesh"}


class InPlaceCall(Call):
    """The loss of the real module, at points that are written into what each process holds of its weights.

    A context, in which the weights move; afterwards they are what they were, bit for bit. Every process must do the
    same things, and one that raises takes the others with it.

    Args:
        module: Is called.
        loss: As for :class:`Call`.
        batch: As for :class:`Call`.
        outer: What wraps the module, such as FSDP's first version, or the module.

    Raises:
        ProbeError: If the module cannot be asked in place.
    """

    in_place = True
    _where = "in place"

    def __init__(self, module: nn.Module, loss: Loss | None, batch: Any, outer: nn.Module) -> None:
        find_flat_pieces(outer)
        reshard(outer)
        self._outer = outer
        self._tied: dict[nn.Parameter, list[nn.Parameter]] = {}  # each to all that are the same memory
        for p, first in same_memory(module).items():
            self._tied.setdefault(first, []).append(p)
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad and p in self._tied}
        super().__init__(module, loss, batch, _common_type(self._parameters))
        if self._is_manual:
            raise ProbeError("A training_step under manual optimization can only be asked on a copy, not in place.")
        self.shards = spread_shards(self._parameters.items())
        self._shapes = {name: whole_shape(p) for name, p in self._parameters.items()}
        self._stack = contextlib.ExitStack()
        self._kept: dict[str, Tensor] = {}
        self._gradients: list[tuple[nn.Parameter, Tensor | None]] = []

    def __enter__(self) -> InPlaceCall:
        self._stack.enter_context(in_type_of_weights(self._outer))
        self._kept = {name: local(p).to("cpu", copy=True) for name, p in self._parameters.items()}
        self._gradients = [(p, p.grad) for p in self._outer.parameters()]
        return self

    def __exit__(self, *error: object) -> None:
        reshard(self._outer, aborted=error[0] is not None)
        self._write(self._kept)
        self._stack.close()
        for p, gradient in self._gradients:
            p.grad = gradient

    def own_point(self) -> dict[str, Tensor]:
        """See :class:`Call`; of the trained parameters."""
        return {name: self._kept[name].to(local(p).device) for name, p in self._parameters.items()}

    def generic_point(self, magnitude: Mapping[str, float], *, seed: int, amount: float) -> dict[str, Tensor]:
        """See :class:`Call`; copies of a part draw the same numbers, different parts different ones."""
        point: dict[str, Tensor] = {}
        for name, p in self._parameters.items():
            own = self._kept[name].to(local(p).device)  # one by one, to save memory
            place = self.shards[name].place() if name in self.shards else 0
            own_seed = random.Random(f"{seed} {name} {place}").getrandbits(60)
            point |= generic_point(
                {name: own}, magnitude, self.dtype, seed=own_seed, amount=amount, shapes={name: self._shapes[name]}
            )
        return point

    def largest(self, value: float) -> float:
        """See :class:`Call`; every process must ask."""
        if not is_distributed():
            return value
        device = next((local(p).device for p in self._parameters.values()), torch.device("cpu"))
        found = torch.tensor([value], device=device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return float(found)

    @contextlib.contextmanager
    def watched(self, names: dict[int, str]) -> Iterator[None]:
        """See :class:`Call`; weights are gathered on the way, so modules are looked at when they are called."""

        def look(prefix: str, module: nn.Module) -> None:
            names.update({id(p): prefix + name for name, p in module.named_parameters()})

        hooks = [
            m.register_forward_pre_hook(lambda m, args, name=name: look(f"{name}." if name else "", m))
            for name, m in self._real.named_modules()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def summed(self, found: Mapping[str, Tables]) -> dict[str, Tables]:
        """See :class:`Call`; all processes get the very same numbers, so that they go on alike."""
        parts = [
            (values, self.shards[name].groups if name in self.shards else ())
            for name, tables in found.items()
            for table in tables.values()
            for values in table
        ]
        if not is_distributed() or not parts:
            return super().summed(found)
        sums = summed(parts)
        flat = torch.cat(sums)
        dist.broadcast(flat, src=0)
        wholes = iter(torch.split(flat.cpu(), [len(values) for values in sums]))
        return {n: {axis: Table(next(wholes), next(wholes)) for axis in tables} for n, tables in found.items()}

    def _run(self, point: Mapping[str, Tensor], then: Callable[[Losses], T], seed: int, shrink: float) -> T:
        self._write(point)
        for p in self._outer.parameters():
            p.grad = None
        constants = [b for b in self._real.buffers() if b.ndim == 0 and b.is_floating_point()]
        devices = {t.device for t in point.values() if t.device.type != "cpu"}
        generator = torch.Generator().manual_seed(seed)
        weights = {id(t): self._tied[self._parameters[name]] for name, t in point.items()}
        with self._state(seed), quiet(devices, generator), ProbeMode(self.dtype, shrink, constants, generator):
            attach(self._real, self._trainer(), {}, self._real, None)
            loss = self._together(lambda: self._scalar_loss(self._real, copied(self._batch, self.dtype, {})))
            return self._together(lambda: then(InPlaceLoss(loss, weights)))

    def _together(self, work: Callable[[], T]) -> T:
        """Do what may raise; all processes raise where one does, so that none waits for the others."""
        done: list[T] = []
        why: Exception = ProbeError(f"{self._what} must be callable in place, but it raised in another process.")
        try:
            done.append(work())
        except Exception as error:  # whatever the user's code raises
            why = error
        if self.largest(float(not done)):
            raise why
        return done[0]

    @torch.no_grad()
    def _write(self, point: Mapping[str, Tensor]) -> None:
        for name, part in point.items():
            local(self._parameters[name]).copy_(part)

    @contextlib.contextmanager
    def _state(self, seed: int) -> Iterator[None]:
        """Give the modules copies of their attributes; then let them have their own back, with buffers as they were."""
        modules = [m for m in self._real.modules() if not is_named(m, "FullyShardedDataParallel")]
        before = [(vars(m), dict(vars(m)), m._buffers, dict(m._buffers)) for m in modules]
        buffers = [(b, b.detach().clone()) for b in self._outer.buffers()]
        shared = [*self._outer.modules(), *self._outer.parameters(), *self._outer.buffers(), self._trainer()]
        memo = {id(each): each for each in shared}
        aborted = True
        try:
            for own, attributes, _, _ in before:
                for name in attributes.keys() - _NOT_COPIED:
                    with contextlib.suppress(Exception):  # what cannot be copied is shared
                        own[name] = copied(attributes[name], None, memo)
            seed_all(memo.values(), seed)
            yield
            aborted = False
        finally:
            reshard(self._outer, aborted=aborted)
            for own, attributes, named, contents in before:
                own.clear()
                own.update(attributes)
                named.clear()
                named.update(contents)
            with torch.no_grad():
                for buffer, bits in buffers:
                    buffer.copy_(bits)


def is_distributed() -> bool:
    """Whether there are other processes to talk to."""
    return dist.is_available() and dist.is_initialized()


def _common_type(parameters: Mapping[str, nn.Parameter]) -> torch.dtype:
    """Type of all weights, in which they are asked."""
    types = {p.dtype.to_real() for p in parameters.values()}
    if types <= {torch.float32} or types == {torch.float64}:
        return next(iter(types), torch.float32)
    raise ProbeError(
        f"Weights must be float32, or all float64, to be asked in place, but they are {sorted(map(str, types))}: "
        "roundoff of narrower types hides what is asked. Probe a small copy of the model in float64, and pass it as "
        "invariance=."
    )
