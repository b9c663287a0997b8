"""Watches the gradients of real steps: to find scale-invariant units where no probe can, and to notice lost ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.parameter import Parameter
from torch.optim import Optimizer

from lightning_normreg._symmetries import (
    Axis,
    Observed,
    ObserverThresholds,
    bias_candidates,
    observed_axes,
    observed_verdict,
    unit_statistic,
)
from lightning_normreg._weights import (
    ParameterRole,
    ScaleInvariance,
    Verdict,
    gradient_of,
    is_flat,
    local,
    spread_shards,
    whole_shape,
)
from lightning_normreg.steps._step_hooks import Phase, of_mine

Named = Sequence[tuple[str, Parameter, ParameterRole]]
"""All parameters, as :func:`named_roles` gives them."""


class GradientWatch(ABC):
    """Sums ``w·g`` of some parameters in the steps that are due, at the weights that the gradients are of.

    Gradients are complete only after an optimizer's closure and before its step, so whoever knows that moment calls
    :meth:`gradients_ready`. Where nobody does (an optimizer stepped by hand), the pre-hook has them.
    """

    phase = Phase.MEASURE

    def __init__(self, looked_at: Mapping[Parameter, tuple[str, list[Axis]]]) -> None:
        self._shards = spread_shards((name, p) for p, (name, _) in looked_at.items())
        self._looked_at = looked_at
        self._seen: dict[str, list[Observed]] = {}
        self._steps: dict[int, int] = {}
        self._ready: set[int] = set()
        self._by_hand: set[int] = set()

    @property
    def steps(self) -> int:
        """Steps of the optimizer that made the most."""
        return max(self._steps.values(), default=0)

    @abstractmethod
    def is_due(self, step: int) -> bool:
        """Whether a step, counted from 0, is looked at."""

    @torch.no_grad()
    def gradients_ready(self, index: int, optimizer: Optimizer) -> None:
        """Look at the gradients, once a step; does nothing in steps that are not due, and never reads the device."""
        if index in self._ready:
            return  # a closure that is evaluated again, or another callback that says so
        self._ready.add(index)
        if not self.is_due(self._steps.get(index, 0)):
            return
        mine = {p: (p, *looked_at) for p, looked_at in self._looked_at.items()}
        for (parameter, name, axes), _, _ in of_mine([optimizer], mine):
            # A flat piece that is empty has no gradient, where another process has one.
            if parameter.grad is not None or is_flat(parameter):
                seen = Observed.of(local(parameter), gradient_of(parameter), axes, self._shards.get(name))
                self._seen.setdefault(name, []).append(seen)

    def before_step(self, index: int, optimizer: Optimizer) -> None:
        """Look now where nobody else says when."""
        if index in self._by_hand:
            self.gradients_ready(index, optimizer)

    def after_step(self, index: int, optimizer: Optimizer, skipped: Tensor | None) -> None:
        """Count the step."""
        if index not in self._ready:
            self._by_hand.add(index)
        self._ready.discard(index)
        self._steps[index] = self._steps.get(index, 0) + 1

    def _all_seen(self) -> dict[str, Observed]:
        """The steps of each parameter, in one; every process must ask."""
        stacked = {name: Observed.stack(steps) for name, steps in self._seen.items()}
        return stacked | Observed.summed({n: (stacked[n], self._shards[n]) for n in stacked if n in self._shards})


class GradientObserver(GradientWatch):
    """Finds scale-invariant units from the gradients of the first steps: weaker evidence, without a private copy.

    The steps lie further and further apart, because at the first ones many weights look scale-invariant that are not:
    those in front of a gain or behind a bias that starts at zero.
    """

    STEPS: ClassVar[tuple[int, ...]] = (0, 1, 2, 4, 8, 16, 24, 32)

    def __init__(self, named: Named, limits: ObserverThresholds) -> None:
        trained = {name: (p, role) for name, p, role in named if p.requires_grad}
        shapes = {name: whole_shape(p) for name, (p, _) in trained.items()}
        self._names = [name for name, _, _ in named]
        self._biases = bias_candidates({name: role for name, (_, role) in trained.items()}, shapes)
        self._limits = limits
        self._matrices = [name for name, shape in shapes.items() if len(shape) > 1]
        super().__init__({p: (name, observed_axes(shapes[name], role)) for name, (p, role) in trained.items()})

    def is_due(self, step: int) -> bool:
        """The first steps."""
        return step in self.STEPS

    @property
    def is_done(self) -> bool:
        """Whether an optimizer has made all of the steps."""
        return self.steps > self.STEPS[-1]

    def verdict(self) -> dict[str, ScaleInvariance]:
        """What was seen, for every parameter; reads the device."""
        seen, nothing = self._all_seen(), Observed.stack([])
        found = {}
        for name in self._names:
            if name not in self._matrices:
                reason = "It is no matrix, or frozen: the observer of gradients does not look at these."
                found[name] = ScaleInvariance("none", evidence="observer", reason=reason)
                continue
            biases = {bias: seen.get(bias, nothing) for bias in self._biases[name]}
            found[name] = observed_verdict(seen.get(name, nothing), biases, self._limits)
        return found


class InvarianceWatchdog(GradientWatch):
    """Notices units that have been found scale-invariant and are so no longer, a few steps every few hundred."""

    EVERY, TOGETHER = 200, 4

    def __init__(self, named: Named, verdict: Verdict, limits: ObserverThresholds) -> None:
        self._verdict = {name: v for name, v in verdict.items() if v.is_invariant}
        self._limits = limits
        wanted = self._verdict.keys() | {v.needs_bias for v in self._verdict.values()}
        looked_at = {}
        for name, parameter, role in named:
            if name in wanted:
                known = self._verdict.get(name)
                axis = None if known is None or known.dim is None else Axis(known.dim, known.groups)
                looked_at[parameter] = (name, [axis or observed_axes(whole_shape(parameter), role)[0]])
        super().__init__(looked_at)
        self._told: set[str] = set()

    def is_due(self, step: int) -> bool:
        """Some neighbouring steps of every few hundred; the first ones are the probe's."""
        return step >= self.EVERY and step % self.EVERY < self.TOGETHER

    def lost(self) -> dict[str, float]:
        """Parameters whose units are no longer scale-invariant, with their T, each of them once; reads the device.

        Empty until a check is complete.
        """
        if not self._seen or any(self.is_due(step) for step in self._steps.values()):
            return {}
        statistics, seen, nothing = {}, self._all_seen(), Observed.stack([])
        for name, verdict in self._verdict.items():
            weight, bias = seen.get(name, nothing), seen.get(verdict.needs_bias or name, nothing)
            if name not in self._told and len(weight.gradient) and bias.gradient.shape == weight.gradient.shape:
                statistics[name] = unit_statistic(verdict, weight, bias if verdict.needs_bias else None)
        self._seen.clear()
        values = torch.stack(list(statistics.values())).tolist() if statistics else []
        found = dict(zip(statistics, values, strict=True))
        lost = {name: statistic for name, statistic in found.items() if statistic > self._limits.lost}
        self._told |= lost.keys()
        return lost
