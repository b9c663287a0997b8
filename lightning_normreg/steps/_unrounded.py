"""How far a step would turn weights of a narrow type, if nothing were rounded."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import Parameter
from torch.optim import Optimizer

from lightning_normreg import _metrics
from lightning_normreg._metrics import Curve
from lightning_normreg._optimizers import acting, update_rule
from lightning_normreg._weights import Table, Watched, is_flat, is_sharded
from lightning_normreg.functional._device import accumulator
from lightning_normreg.steps._step_hooks import by_parameter, of_mine
from lightning_normreg.steps._subscriber import Phase, StepSubscriber


class Unrounded(StepSubscriber):
    """Rotations of a step that the same optimizer makes on copies in float32, of weights, gradients and its own state.

    Of weights in bfloat16 or float16 that are not sharded, under optimizers whose rule is known: of another one it is
    not known what its step touches besides. What earlier steps have rounded is not undone.

    Args:
        watched: The weights.
        is_due: Whether the coming update of an optimizer is measured.
    """

    phase = Phase.PROJECT  # told last: what corrects decay has split the groups by then

    def __init__(self, watched: Sequence[Watched], is_due: Callable[[int], bool]) -> None:
        super().__init__()
        self._is_due = is_due
        self._by_parameter = by_parameter(w for w in watched if not w.members and not any(map(_is_wide, w.tensors())))
        self._found: dict[str, Tensor] = {}

    @torch.no_grad()
    def change_groups(self, index: int, optimizer: Optimizer) -> None:
        """Gradients are what the optimizer is going to use: let it use them on copies."""
        if acting(optimizer) is not optimizer or not self._is_due(index):
            return  # a wrapper's step would be one of the optimizer inside of it, on the weights themselves
        entries = of_mine([optimizer], self._by_parameter, ready=True)
        mine = [w for w, group, _ in entries if update_rule(optimizer, group) is not None]
        if not mine:
            return
        copies = {p: _copy(p) for w in mine for p in w.tensors() if p.grad is not None}
        starts = {copied: p.detach().float() for p, copied in copies.items()}
        twin: Any = object.__new__(type(optimizer))
        twin.__dict__.update(optimizer.__dict__)
        twin.param_groups = [
            {
                **deepcopy({key: value for key, value in group.items() if key != "params"}),
                "params": [copies[p] for p in group["params"] if p in copies],
            }
            for group in optimizer.param_groups
        ]
        twin.state = defaultdict(dict, {c: _wide(optimizer.state.get(p, {})) for p, c in copies.items()})
        inspect.unwrap(type(optimizer).step)(twin)  # without its hooks, which are ours as well
        seen = [
            replace(w, parameter=copies[w.parameter], joined=tuple(copies[p] for p in w.joined))
            for w in mine
            if all(p in copies for p in w.tensors())
        ]
        table = Table(seen)
        rotations = table.root_mean_squares(table.lengths(starts.__getitem__).rotation())
        self._found |= dict(zip([w.name for w in seen], rotations, strict=True))

    def collect(self) -> dict[str, dict[Curve, float]]:
        """Read them back, and forget them."""
        names, values = [*self._found], [*self._found.values()]
        self._found = {}
        numbers = torch.stack(values).tolist() if values else []
        return {name: {_metrics.ROTATION_UNROUNDED: number} for name, number in zip(names, numbers, strict=True)}


def _is_wide(parameter: Parameter) -> bool:
    return accumulator(parameter.dtype) == parameter.dtype or is_sharded(parameter) or is_flat(parameter)


def _copy(parameter: Parameter) -> Parameter:
    copied = Parameter(parameter.detach().float())
    assert parameter.grad is not None
    copied.grad = parameter.grad.float()
    return copied


def _wide(state: dict[str, Any]) -> dict[str, Any]:
    """The same in float32, where it is in a narrower type."""
    return {
        key: value.to(torch.float32 if value.is_floating_point() else value.dtype, copy=True)
        if isinstance(value, Tensor)
        else deepcopy(value)
        for key, value in state.items()
    }
