"""Weight decay in proportion to the learning rate, on some weights of an optimizer and for the length of its step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer

from lightning_normreg._optimizers import Group, acting, update_rule
from lightning_normreg._weights import Watched
from lightning_normreg.steps._subscriber import Phase, StepSubscriber

PeakLR = float | Literal["auto"]

_OWN = ("params", "param_names", "weight_decay")


class DecayCorrector(StepSubscriber):
    """Splits each group for the length of a step: its targets have the corrected decay, the others that of the group.

    Outside of the step the groups are the user's own, so schedulers and checkpoints see nothing of it.
    """

    phase = Phase.RESTORE

    def __init__(self, targets: Sequence[Watched], peak_lr: PeakLR) -> None:
        super().__init__()
        self._argument = peak_lr
        self._groups: dict[int, tuple[Optimizer, list[Group]]] = {}
        self.aim(targets)

    def aim(self, targets: Sequence[Watched]) -> None:
        """Correct the decay of these from the next step on."""
        self._parameters = {p for target in targets for p in target.tensors()}

    def check(self, optimizer: Optimizer) -> None:
        """Refuse an optimizer whose decay is not understood.

        Raises:
            ValueError: If its rule is not known, or it keeps or reads numbers across its groups.
        """
        for group in optimizer.param_groups:
            rule = None if acting(optimizer) is not optimizer else update_rule(optimizer, group)
            if self._split(group)[0] and (rule is None or rule.lr_factor_keys or rule.used_lr_key):
                raise ValueError(
                    f"CorrectedDecay must know how the optimizer decays, but {type(optimizer).__name__} is not known, "
                    "or sets its own learning rate. Describe yours by register_update_rule, or leave the callback out."
                )

    def before_step(self, index: int, optimizer: Optimizer) -> None:
        """Put the split groups in place."""
        self.restore(index)  # a step that raised has had no post-hook
        self._groups[index] = (optimizer, optimizer.param_groups)
        split: list[Group] = []
        for group in optimizer.param_groups:
            targets, others = self._split(group)
            decay = group.get("weight_decay", 0.0)
            parts = [(targets, decay * self._share(group)), (others, decay)]
            split += [{**group, "params": params, "weight_decay": d} for params, d in parts if params]
        optimizer.param_groups = split

    def after_step(self, index: int, optimizer: Optimizer, skipped: Tensor | None) -> None:
        """Put the user's groups back."""
        self.restore(index)

    def restore(self, index: int | None = None) -> None:
        """Put the groups of one optimizer, or of all, back as they were."""
        for number in [index] if index is not None else list(self._groups):
            optimizer, groups = self._groups.pop(number, (None, []))
            if optimizer is None:
                continue
            split = iter(optimizer.param_groups)
            for group in groups:
                for part in [next(split) for params in self._split(group) if params]:
                    # What an optimizer counts or keeps in its groups is the same in both parts.
                    group.update({key: value for key, value in part.items() if key not in _OWN})
            optimizer.param_groups = groups

    def _share(self, group: Group) -> float:
        peak: Any = self._argument
        if peak == "auto":
            peak = next(group[key] for key in ("max_lr", "initial_lr", "lr") if key in group)
        return float(group["lr"]) / float(peak) if peak > 0 else 1.0

    def _split(self, group: Group) -> tuple[list[Tensor], list[Tensor]]:
        mine = [p in self._parameters for p in group["params"]]
        targets = [p for p, is_mine in zip(group["params"], mine, strict=True) if is_mine]
        return targets, [p for p, is_mine in zip(group["params"], mine, strict=True) if not is_mine]
