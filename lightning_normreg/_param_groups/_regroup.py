"""Loading the state of an optimizer that had other parameter groups: by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_normreg._param_groups._scheduler_rates import Scheduler, select_groups
from lightning_normreg._weights import clean_name

State = dict[str, Any]

_OWN = ("params", "name", "param_names", "weight_decay")
"""What a group keeps of its own configuration; all else, the learning rate above all, goes on as it was saved."""


def load_by_name(
    optimizers: Iterable[Optimizer], module: nn.Module, schedulers: Sequence[tuple[Scheduler, State]] = ()
) -> list[RemovableHandle]:
    """Let optimizers load a state that was saved with other parameter groups, until the handles are removed.

    A state whose groups are as long as the optimizer's, and have the same names if any, is loaded as it is. Schedulers
    come with the states that they are going to load, which are changed in place.
    """
    hook = _Regroup([(clean_name(name), p) for name, p in module.named_parameters()], schedulers)
    return [optimizer.register_load_state_dict_pre_hook(hook) for optimizer in optimizers]


@dataclass
class _Regroup:
    named: Sequence[tuple[str, nn.Parameter]]
    schedulers: Sequence[tuple[Scheduler, State]]

    def __call__(self, optimizer: Optimizer, state: State) -> State | None:
        names_of = {p: name for name, p in self.named}
        wanted = [[names_of.get(p, "") for p in group["params"]] for group in optimizer.param_groups]
        groups = state["param_groups"]
        saved = None
        if all(len(g.get("param_names") or ()) == len(g["params"]) for g in groups):
            saved = [[clean_name(name) for name in g["param_names"]] for g in groups]
        same_lengths = [len(g["params"]) for g in groups] == [len(names) for names in wanted]
        if saved == wanted or (same_lengths and saved is None):
            return None
        if saved is None:
            saved = [self._in_order(optimizer, state)]
        elif not {n for names in saved for n in names} & {n for names in wanted for n in names}:
            return None  # the state of another module, of which torch has its own opinion
        return self._regrouped(optimizer, state, wanted, saved)

    def _in_order(self, optimizer: Optimizer, state: State) -> list[str]:
        """Names of the parameters in the one group of a state without names, as ``module.parameters()`` has them."""
        groups = state["param_groups"]
        numbers = groups[0]["params"]
        everything = [name for name, _ in self.named]
        trained = [name for name, p in self.named if p.requires_grad]
        for names in (everything, trained) if len(groups) == 1 else ():
            if len(names) == len(numbers) and self._fits(state, dict(zip(numbers, names, strict=True))):
                return names
        own = [len(g["params"]) for g in optimizer.param_groups]
        raise ValueError(
            f"The checkpoint's {type(optimizer).__name__} has parameter groups of "
            f"{[len(g['params']) for g in groups]} parameters and this run's of {own}; they can be mapped by name "
            "where the checkpoint has names (those of decay_groups, or parameters that the optimizer was given as "
            "module.named_parameters()) or one group with all parameters of the module, which it has not. Configure "
            "the groups of the run that wrote it, or load the weights alone, for example by "
            "load_from_checkpoint(path), and start the optimizer afresh."
        )

    def _fits(self, state: State, names: Mapping[int, str]) -> bool:
        """Whether entries of the state have shapes that go with the parameters."""
        shapes = {name: p.shape for name, p in self.named}
        return all(
            len(entry.shape) != len(shapes[names[index]])
            or all(size in (1, other) for size, other in zip(entry.shape, shapes[names[index]], strict=True))
            for index, entries in state["state"].items()
            for entry in entries.values()
            if isinstance(entry, Tensor)
        )

    def _regrouped(self, optimizer: Optimizer, state: State, wanted: list[list[str]], saved: list[list[str]]) -> State:
        old = state["param_groups"]
        place = {
            name: (g, index)
            for g, names in enumerate(saved)
            for name, index in zip(names, old[g]["params"], strict=True)
        }
        sources = [_source(optimizer, old, [place[n][0] for n in names if n in place], names) for names in wanted]
        groups, states, done = [], {}, 0
        for group, source, names in zip(optimizer.param_groups, sources, wanted, strict=True):
            own = {key: group[key] for key in _OWN if key in group}
            kept = {key: value for key, value in old[source].items() if key not in _OWN}
            groups.append(kept | own | {"params": list(range(done, done + len(names)))})
            for new, name in enumerate(names, done):
                if name in place and place[name][1] in state["state"]:
                    states[new] = state["state"][place[name][1]]
            done += len(names)
        for scheduler, its_state in self.schedulers:
            if scheduler.optimizer is optimizer:
                select_groups(its_state, sources, len(old))
        _say(optimizer, saved, wanted)
        return {**state, "param_groups": groups, "state": states}


def _source(optimizer: Optimizer, old: list[State], candidates: list[int], names: list[str]) -> int:
    """The saved group that a group takes its settings from."""
    settings = [{k: v for k, v in old[g].items() if k not in _OWN} for g in candidates]
    if any(other != settings[0] for other in settings[1:]):
        raise ValueError(
            f"A parameter group of {type(optimizer).__name__} must come from saved groups with the same settings, but "
            f"{', '.join(map(repr, names[:3]))} … come from groups that differ, for example in their learning rate. "
            "Configure groups that divide those of the checkpoint, or load the weights alone."
        )
    return candidates[0] if candidates else 0


def _say(optimizer: Optimizer, saved: list[list[str]], wanted: list[list[str]]) -> None:
    before, now = {n for names in saved for n in names}, {n for names in wanted for n in names}
    fresh = f" Without a saved state: {', '.join(sorted(now - before))}." if now - before else ""
    dropped = f" No longer optimized: {', '.join(sorted(before - now))}." if before - now else ""
    rank_zero_info(
        f"The checkpoint's {type(optimizer).__name__} has {len(saved)} parameter groups, this run's has {len(wanted)}: "
        f"its state was loaded by name, and decay is as configured now.{fresh}{dropped}"
    )
