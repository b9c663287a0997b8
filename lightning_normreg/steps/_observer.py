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
    local,
    spread_shards,
    whole_shape,
)
from lightning_normreg.steps._step_hooks import has_gradient, of_mine
from lightning_normreg.steps._subscriber import StepSubscriber

Named = Sequence[tuple[str, Parameter, ParameterRole]]
"""All parameters, as :func:`named_roles` gives them."""


class GradientWatch(StepSubscriber, ABC):
    """Sums ``w·g`` of some parameters in the steps that are due, at the weights that the gradients are of."""

    def __init__(self, looked_at: Mapping[Parameter, tuple[str, list[Axis]]]) -> None:
        super().__init__()
        self._shards = spread_shards((name, p) for p, (name, _) in looked_at.items())
        self._looked_at = looked_at
        self._seen: dict[str, list[Observed]] = {}
        self._noted: dict[int, dict[str, Observed]] = {}
        self._steps: dict[int, int] = {}

    @property
    def steps(self) -> int:
        """Steps of the optimizer that made the most."""
        return max(self._steps.values(), default=0)

    @abstractmethod
    def is_due(self, index: int) -> bool:
        """Whether the coming step of an optimizer is looked at."""

    def gradients_ready(self, index: int, optimizer: Optimizer, scale: float | None) -> None:
        """Look at the gradients; does nothing in steps that are not due, and never reads the device."""
        if not self.is_due(index):
            return
        self._noted[index] = {}
        for parameter, _, _ in of_mine([optimizer], {p: [p] for p in self._looked_at}):
            name, axes = self._looked_at[parameter]
            if has_gradient(parameter):
                seen = Observed.of(local(parameter), gradient_of(parameter), axes, self._shards.get(name))
                self._noted[index][name] = seen

    def after_step(self, index: int, optimizer: Optimizer, skipped: Tensor | None) -> None:
        """Count the step, and what was seen of it."""
        for name, seen in self._noted.pop(index, {}).items():
            self._seen.setdefault(name, []).append(seen)
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

    def is_due(self, index: int) -> bool:
        """The first steps."""
        return self._steps.get(index, 0) in self.STEPS

    @property
    def done(self) -> int:
        """How many optimizers have made all of the steps; of what the others have too little has been seen."""
        return sum(steps > self.STEPS[-1] for steps in self._steps.values())

    def verdict(self) -> dict[str, ScaleInvariance]:
        """What was seen, for every parameter; reads the device."""
        seen, nothing = self._all_seen(), Observed.stack([])
        found = {}
        for name in self._names:
            if name not in self._matrices:
                reason = "It is no matrix, or frozen: the observer of gradients does not look at these."
                found[name] = ScaleInvariance("unknown", evidence="observer", reason=reason)
                continue
            biases = {bias: seen.get(bias, nothing) for bias in self._biases[name]}
            found[name] = observed_verdict(seen.get(name, nothing), biases, self._limits)
        return found


class InvarianceWatchdog(GradientWatch):
    """Notices units that have been found scale-invariant and are so no longer.

    It looks at a few neighbouring steps from the 20th on, at steps that double, and then every few hundred: terms of a
    loss are often warmed up. It looks at once where other parameters than before have gradients.
    """

    FIRST, EVERY, TOGETHER = 20, 200, 4

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
        self._trained: dict[int, int] = {}
        self._until: dict[int, int] = {}

    def gradients_ready(self, index: int, optimizer: Optimizer, scale: float | None) -> None:
        """Look, also in a few steps from where a loss has begun to depend on more or on less."""
        trained = sum(has_gradient(p) for group in optimizer.param_groups for p in group["params"])
        if self._trained.setdefault(index, trained) != trained:
            self._trained[index], self._until[index] = trained, self._steps.get(index, 0) + self.TOGETHER
        super().gradients_ready(index, optimizer, scale)

    def is_due(self, index: int) -> bool:
        """Some neighbouring steps, further and further apart; the first ones are the probe's."""
        step = self._steps.get(index, 0)
        doublings = max(0, (step // self.FIRST).bit_length() - 1)
        since = step % self.EVERY if step >= self.EVERY else step - (self.FIRST << doublings)
        return 0 <= since < self.TOGETHER or step < self._until.get(index, 0)

    def lost(self) -> dict[str, float]:
        """Parameters whose units are no longer scale-invariant, with their T, each of them once; reads the device.

        Empty until a check is complete.
        """
        if not self._seen or any(map(self.is_due, self._steps)):
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
