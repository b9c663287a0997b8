"""Weight decay replaced by a learning-rate schedule, step by step and exactly."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_normreg._optimizers import Group, UpdateRule, update_rule
from lightning_normreg._param_groups._rescale import multiply_state
from lightning_normreg.functional._recipes import EXPONENTS, Shrinkage


class DecayFreeLR(LRScheduler):
    r"""Trains scale-invariant weights without weight decay exactly as they would turn with it.

    Takes the decay of every parameter group, sets it to 0 there, and after each step converts the learning rate of a
    schedule by the recipe of :func:`lightning_normreg.functional.without_decay`:
    :math:`\tilde\eta_t=\eta_t/(s_ts_{t+1})` for SGD, with momentum too, and :math:`\eta_t/s_{t+1}` for AdamW, Lion and
    Muon, whose state and eps follow s as well. s, the decayed weight over this one, falls as
    :math:`e^{-\eta\lambda t}`, so without ``project`` the weights grow, and after some 40 e-foldings the squares of
    their gradients no longer fit into float32.

    To be stepped after every optimizer step (in Lightning ``"interval": "step"``). Every weight needs a gradient in
    every step, and those with decay must be scale-invariant: each alone, or all tensors of a set together, with the
    same learning rate times decay (:func:`reduce_decay` then calls each of them ``"schedule"``). For others the
    conversion is another recipe; it is not looked for.

    Args:
        optimizer: torch's SGD without Nesterov, AdamW, Adam or NAdam with decoupled decay, Muon, or Lion.
        schedule: Schedule of the learning rate in the recipe with decay, made for the same optimizer; from now on
            this object steps it. By default the learning rates stay as they are in the groups.
        project: Hold the joint norm of each group's weights, :math:`R=\sqrt{\sum_i\lVert w_i\rVert^2}` over all weights
            of a group with decay, where it is now, by a rescale of all of them after each step: decay becomes
            projection, with the learning rate :math:`\eta_t(R/n_t)^p/(1-\eta_t\lambda)` and n the joint norm under
            decay, which is carried along. As all weights of a group are multiplied by the same factor, this is exact
            for scale-invariant weights and for sets alike, but a set must be in one group then: in two it would be
            held in parts. A norm of their own is held for weights in groups of their own. Sharded tensors are
            refused: their norm is spread over processes.

    Attributes:
        scales: s of every group at this moment: the weight under decay over the weight here.

    Raises:
        ValueError: For an optimizer or a setting whose decay has no exact conversion, a schedule of another optimizer,
            and, with ``project``, groups of sharded tensors or of zeros; during training, where heavy ball's decay
            overshoots 0.
        TypeError: For a schedule that needs a metric.
        RuntimeError: While training, if the optimizer stepped more than once since the last call of ``step``.

    Examples:
        >>> weight = torch.nn.Parameter(torch.ones(2, 2))
        >>> optimizer = torch.optim.SGD([weight], lr=0.1, weight_decay=0.5)
        >>> scheduler = DecayFreeLR(optimizer)
        >>> for _ in range(2):
        ...     weight.grad = torch.zeros(2, 2)
        ...     optimizer.step()
        ...     scheduler.step()
        >>> round(scheduler.get_last_lr()[0], 6), round(scheduler.scales[0], 6)
        (0.129236, 0.9025)

    Reference:
        Li and Arora 2020, https://arxiv.org/abs/1910.07454, theorem 2.7, for SGD at a constant learning rate; the rest
        is derived in :func:`lightning_normreg.functional.without_decay`.
    """

    def __init__(self, optimizer: Optimizer, schedule: LRScheduler | None = None, *, project: bool = False) -> None:
        if isinstance(schedule, ReduceLROnPlateau):
            raise TypeError(
                "`schedule` must not need a metric, got ReduceLROnPlateau. Use one that goes with the steps."
            )
        if schedule is not None and schedule.optimizer is not optimizer:
            raise ValueError("`schedule` must be made for the same `optimizer`, got one of another.")
        groups = optimizer.param_groups
        self.schedule = schedule
        self.project = project
        self._rules = [_convertible(optimizer, group) for group in groups]
        self._decays = [float(group["weight_decay"]) for group in groups]
        self._rates = [float(group["lr"]) for group in groups]
        self._constants = [{key: g[key] for key in r.group_degrees} for r, g in zip(self._rules, groups, strict=True)]
        self._radii = [_radius(group["params"]) if project and group["weight_decay"] else 0.0 for group in groups]
        self._growths = [1.0] * len(groups)
        self._buffers: list[float | None] = [None] * len(groups)
        self._steps_to_follow = 0
        self.scales = [1.0] * len(groups)
        for group in groups:
            group["weight_decay"] = 0.0
        optimizer.register_step_post_hook(self._after_step)
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """Learning rate of the next step of each group, without decay."""
        if self.last_epoch > 0:
            self._follow()
            self._step_schedule()
        return [self._converted(i) for i in range(len(self.scales))]

    def _converted(self, i: int) -> float:
        exponent = EXPONENTS[self._rules[i].family]
        return self._rates[i] / (self.scales[i] ** (exponent - 1) * self._shrunk(i).scale)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs, the inner schedule included: plain numbers."""
        left_out = ("optimizer", "schedule", "_rules")
        state = {key: value for key, value in self.__dict__.items() if key not in left_out}
        state["schedule"] = None if self.schedule is None else self.schedule.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint; the optimizer's own state is to be loaded as well."""
        state = dict(state_dict)
        inner = state.pop("schedule")
        if self.schedule is not None:
            self.schedule.load_state_dict(inner)
        self.__dict__.update(state)

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Count the step; put each group's weights back to their radius."""
        self._steps_to_follow += 1
        for i, radius in enumerate(self._radii):
            if radius:
                weights = optimizer.param_groups[i]["params"]
                self._growths[i] = _joint_norm(weights) / radius
                for weight in weights:
                    weight.detach().div_(self._growths[i])

    def _follow(self) -> None:
        """Let s, the state and the constants follow the step that was made, if one was (a loss scaler may skip it)."""
        if self._steps_to_follow > 1:
            raise RuntimeError(
                f"DecayFreeLR must be stepped after every optimizer step, but there were {self._steps_to_follow} since "
                'the last time. In Lightning return it with {"interval": "step", "frequency": 1}.'
            )
        if self._steps_to_follow:
            for i in range(len(self.scales)):
                self._follow_group(i)
        self._steps_to_follow = 0

    def _follow_group(self, i: int) -> None:
        rule, group = self._rules[i], self.optimizer.param_groups[i]
        before, after = self.scales[i], self._shrunk(i)
        self.scales[i] = after.scale * self._growths[i]
        self._buffers[i] = None if after.buffer is None else after.buffer * self._growths[i]
        # Under coupled decay the momentum is that of a run without decay, and only projection rescales it.
        coupled = rule.decay == "coupled"
        factor = 1 / self._growths[i] if coupled else before / self.scales[i]
        for weight in group["params"] if factor != 1.0 else ():
            multiply_state(self.optimizer, weight, rule, factor)
        for key, degree in rule.group_degrees.items():
            assert isinstance(degree, int)
            group[key] = self._constants[i][key] * self.scales[i] ** -degree

    def _shrunk(self, i: int) -> Shrinkage:
        group = self.optimizer.param_groups[i]
        coupled = self._rules[i].decay == "coupled"
        momentum = {key: group.get(key, 0.0) for key in ("momentum", "dampening")} if coupled else {}
        return Shrinkage(self.scales[i], self._buffers[i]).step(self._rates[i], self._decays[i], **momentum)

    def _step_schedule(self) -> None:
        """Let the inner schedule see its own learning rates, from which many compute the next."""
        if self.schedule is None:
            return
        groups = self.optimizer.param_groups
        for group, rate in zip(groups, self._rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self.schedule.step()
        self._rates = [float(group["lr"]) for group in groups]


def _convertible(optimizer: Optimizer, group: Group) -> UpdateRule:
    """Rule of a group whose decay has an exact conversion."""
    rule = update_rule(optimizer, group)
    name = type(optimizer).__name__
    if rule is None or rule.family not in EXPONENTS or rule.local == "radam" or rule.lr_factor_keys:
        raise ValueError(
            f"`optimizer` must be one whose decay has an exact conversion, got {name} with "
            f"{'Nesterov momentum' if group.get('nesterov') else 'these settings'}. Use SGD with or without plain "
            "momentum, AdamW, NAdam with decoupled decay, Lion or Muon."
        )
    return rule


def _radius(weights: list[Tensor]) -> float:
    others = {type(weight.data).__name__ for weight in weights} - {"Tensor"}
    norm = 0.0 if others else _joint_norm(weights)
    if not norm > 0:
        raise ValueError(
            "`optimizer` must hold ordinary tensors that are not all zero in each group with decay if `project` is "
            f"set, got {', '.join(sorted(others)) or 'zeros'}. Leave `project` out."
        )
    return norm


def _joint_norm(weights: list[Tensor]) -> float:
    """Norm of all of them as one vector."""
    return math.hypot(*(float(torch.linalg.vector_norm(w.detach(), dtype=torch.float64)) for w in weights))
