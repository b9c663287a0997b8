"""Copies of weights that no optimizer updates: averaged teachers, momentum encoders, target networks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch.nn.parameter import Parameter
from torch.optim import Optimizer

from lightning_normreg._weights import ParameterRole, Table, Watched, is_flat, local, share, whole_shape

ALIKE = 0.99
"""Cosine, of every unit, above which a tensor counts as a copy up to noise."""


def find_twins(
    targets: Sequence[Watched], named: Sequence[tuple[str, Parameter, ParameterRole]], optimizers: Iterable[Optimizer]
) -> list[tuple[Watched, Watched]]:
    """Targets with copies of theirs, each seen in the units of its original. Reads the device.

    A copy has the same shape, is updated by no optimizer, and each unit of it points where that of the target does, the
    bias that belongs to it included. Pieces of FSDP's first version are not looked at.
    """
    updated = {p for o in optimizers for group in o.param_groups for p in group["params"] if p.requires_grad}
    tensors = {name: p for name, p, _ in named}
    idle = {name: p for name, p in tensors.items() if p not in updated and not is_flat(p)}
    names = {p: name for name, p in tensors.items()}
    found = []
    for target in (t for t in targets if not t.members):
        for name, parameter in idle.items():
            if _kind(parameter) != _kind(target.parameter) or parameter is target.parameter:
                continue
            beside = [(p, idle.get(_there(names[p], target.name, name))) for p in target.joined]
            joined = tuple(twin for p, twin in beside if twin is not None and _kind(twin) == _kind(p))
            twin = replace(target, name=name, parameter=parameter, joined=joined)
            if len(joined) == len(target.joined) and _alike(target, twin):
                found.append((target, twin))
    return found


def prefix_of(twin: str, target: str) -> str:
    """What is different in front of the name of a copy.

    >>> prefix_of("teacher.net.0.weight", "student.net.0.weight")
    'teacher'
    """
    parts, others = twin.split("."), target.split(".")
    while len(parts) > 1 and others and parts[-1] == others[-1]:
        parts.pop()
        others.pop()
    return ".".join(parts)


def _there(name: str, target: str, twin: str) -> str:
    """The name, beside a copy, of what has a name beside its target."""
    here, there = prefix_of(target, twin), prefix_of(twin, target)
    return there + name.removeprefix(here) if name.startswith(here) else name


def _kind(parameter: Parameter) -> tuple[object, ...]:
    spread = getattr(parameter, "device_mesh", None), getattr(parameter, "placements", None)
    return (whole_shape(parameter), parameter.dtype, parameter.device, *spread)


def _alike(target: Watched, twin: Watched) -> bool:
    table = Table([target])
    copies: Mapping[Parameter, Parameter] = dict(zip(target.tensors(), twin.tensors(), strict=True))
    (sums,) = share([(table, table.gradients(lambda p: local(copies[p])))])
    seen = table.lengths_of(sums)
    return bool((seen.radial >= ALIKE * seen.update()).all() & (seen.update() > 0).any())
