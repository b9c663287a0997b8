"""Weight decay in proportion to the learning rate, on some weights of an optimizer and while it computes its step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_normreg._optimizers import Group, acting, update_rule
from lightning_normreg._weights import Watched
from lightning_normreg.steps._subscriber import StepSubscriber

_OWN = ("params", "param_names", "weight_decay")
_ROUNDOFF = 1e-6
"""Learning rates that differ by less are the same: those of a schedule may be kept in float32 tensors."""


class DecayCorrector(StepSubscriber):
    """Splits each group while the optimizer computes: its targets have the corrected decay, the others the group's.

    The corrected decay is λη/η_max.

    Args:
        targets: The weights.
        peak_lr: η_max; None: for each group the highest learning rate so far, or that :meth:`expect` has told of.
    """

    def __init__(self, targets: Sequence[Watched], peak_lr: float | None = None) -> None:
        super().__init__()
        self._peak = peak_lr
        self._highest: dict[int, list[float]] = {}
        self._told: set[int] = set()
        self._groups: dict[int, list[Group]] = {}
        self._parts: dict[int, list[tuple[Group, Group]]] = {}
        self.aim(targets)

    def aim(self, targets: Sequence[Watched]) -> None:
        """Correct the decay of these from the next step on."""
        self._parameters = {p for target in targets for p in target.tensors()}

    def expect(self, index: int, rates: Sequence[float]) -> None:
        """The learning rate of each group of an optimizer is going to reach these, by its schedule."""
        self._told.add(index)
        self._raise_to(index, rates)

    def check(self, optimizer: Optimizer) -> None:
        """Refuse an optimizer whose decay is not understood.

        Raises:
            ValueError: If it has no decay, its rule is not known, or it keeps or reads numbers across its groups.
        """
        for group in optimizer.param_groups:
            rule = None if acting(optimizer) is not optimizer else update_rule(optimizer, group)
            if self._split(group)[0] and "weight_decay" not in group:
                raise ValueError(
                    f"CorrectedDecay must have a decay to correct, but {type(optimizer).__name__} has no "
                    "`weight_decay`. Leave its weights out by `exclude`."
                )
            if self._split(group)[0] and (rule is None or rule.lr_factor_keys or rule.used_lr_key):
                raise ValueError(
                    f"CorrectedDecay must know how the optimizer decays, but {type(optimizer).__name__} is not known, "
                    "or sets its own learning rate. Describe yours by register_update_rule, or leave the callback out."
                )

    def change_groups(self, index: int, optimizer: Optimizer) -> None:
        """Put the split groups in place."""
        groups = self._groups[index] = optimizer.param_groups
        parts = self._parts[index] = []
        for group, share in zip(groups, self._shares(index, groups), strict=True):
            decay = group.get("weight_decay", 0.0)
            for params, its in zip(self._split(group), (decay * share, decay), strict=True):
                if params:
                    parts.append((group, {**group, "params": params, "weight_decay": its}))
        optimizer.param_groups = [part for _, part in parts]

    def restore_groups(self, index: int, optimizer: Optimizer) -> None:
        """Put the user's groups back, with what the optimizer counts or keeps in them, the same in both parts."""
        for group, part in self._parts.pop(index, []):
            group.update({key: value for key, value in part.items() if key not in _OWN})
        optimizer.param_groups = self._groups.pop(index, optimizer.param_groups)

    def state_dict(self) -> dict[str, Any]:
        """The highest learning rates of each optimizer's groups, which a run that is resumed cannot see again."""
        return {"highest_lr": {index: list(rates) for index, rates in self._highest.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from these."""
        for index, rates in state.get("highest_lr", {}).items():
            self._raise_to(index, rates)

    def _shares(self, index: int, groups: Sequence[Group]) -> list[float]:
        """For each group η/η_max."""
        rates = [float(group["lr"]) for group in groups]
        if self._peak is not None:
            return [rate / self._peak for rate in rates]
        before = self._raise_to(index, rates)
        above = [pair for pair in zip(rates, before, strict=False) if pair[0] > pair[1] * (1 + _ROUNDOFF)]
        if above and index in self._told:
            self._told.discard(index)
            rank_zero_warn(
                f"CorrectedDecay: the learning rate {above[0][0]:.3g} is above {above[0][1]:.3g}, the highest that the "
                "schedule was to reach. From here on decay is proportional to lr/(highest lr so far). Give `peak_lr`."
            )
        peaks = self._highest[index]
        return [rate / peak if peak > 0 else 1.0 for rate, peak in zip(rates, peaks, strict=False)]

    def _raise_to(self, index: int, rates: Sequence[float]) -> list[float]:
        before = self._highest.get(index, [])
        self._highest[index] = [max(pair) for pair in zip_longest(before, rates, fillvalue=0.0)]
        return before

    def _split(self, group: Group) -> tuple[list[Tensor], list[Tensor]]:
        mine = [p in self._parameters for p in group["params"]]
        targets = [p for p, is_mine in zip(group["params"], mine, strict=True) if is_mine]
        return targets, [p for p, is_mine in zip(group["params"], mine, strict=True) if not is_mine]
