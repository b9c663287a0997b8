"""What the saved state of an optimizer says of its class, which it does not name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_normreg._optimizers import Group, NoRule, UpdateRule, named_rules
from lightning_normreg._reports._checkpoint import CheckpointError

# Settings and state of torch's optimizers, besides those that all of them have.
_SIGNATURES: Mapping[str, tuple[str, str]] = {
    "SGD": ("momentum dampening nesterov", "momentum_buffer"),
    "Adam": ("betas eps amsgrad", "step exp_avg exp_avg_sq max_exp_avg_sq"),
    "AdamW": ("betas eps amsgrad", "step exp_avg exp_avg_sq max_exp_avg_sq"),
    "NAdam": ("betas eps momentum_decay decoupled_weight_decay", "step mu_product exp_avg exp_avg_sq"),
    "RAdam": ("betas eps decoupled_weight_decay", "step exp_avg exp_avg_sq"),
    "Adamax": ("betas eps", "step exp_avg exp_inf"),
    "RMSprop": ("alpha eps momentum centered", "step square_avg momentum_buffer grad_avg"),
    "Adagrad": ("lr_decay eps initial_accumulator_value", "step sum"),
    "Adadelta": ("rho eps", "step square_avg acc_delta"),
    "ASGD": ("lambd alpha t0", "step eta mu ax"),
    "Rprop": ("etas step_sizes", "step prev step_size"),
    "Adafactor": ("beta2_decay eps d", "step row_var col_var variance"),
    "Muon": ("momentum nesterov ns_coefficients eps ns_steps adjust_lr_fn", "momentum_buffer"),
    "LBFGS": (
        "max_iter max_eval tolerance_grad tolerance_change history_size line_search_fn",
        "func_evals n_iter al d t old_dirs old_stps ro H_diag prev_flat_grad prev_loss",
    ),
}
_UNMARKED = {"Muon", "LBFGS"}  # torch writes no `foreach` for these
_COMMON = {"params", "name", "param_names", "lr", "weight_decay", "foreach", "maximize"}
_COMMON |= {"capturable", "differentiable", "fused"}
_OF_SCHEDULERS = {"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr"}
_SHAPED = {"momentum_buffer", "exp_avg", "exp_avg_sq", "exp_inf", "max_exp_avg_sq", "square_avg", "sum"}
_SHAPED |= {"acc_delta", "ax", "prev", "step_size", "z", "variance"}
"""Entries of a state that are shaped like the parameter."""


@dataclass(frozen=True)
class SavedGroup:
    label: str  # its name or number, with that of the optimizer where there are several
    settings: Group  # what it says beside its parameters
    rules: tuple[UpdateRule | NoRule, ...]  # how its optimizer may step; empty where nobody knows
    optimizer: str = ""  # class of the optimizer, as far as it is known
    params: tuple[Any, ...] = ()  # numbers of its parameters, or their names
    names: tuple[str, ...] | None = None  # of its parameters, None where it has none
    shapes: tuple[tuple[int, ...] | None, ...] = ()  # of each parameter as its state has it, None for one without


def saved_groups(states: Sequence[Mapping[str, Any]], given: Sequence[str] = ()) -> tuple[list[SavedGroup], list[str]]:
    """The groups of all optimizers of a checkpoint, and what is assumed of them, in sentences.

    The user may have named their classes: one for all, or one for each.
    """
    if len(given) not in (0, 1, len(states)):
        raise CheckpointError(f"the checkpoint has {len(states)} optimizers, got {len(given)} classes. Name one each.")
    groups, said = [], []
    for number, state in enumerate(states):
        label = f"optimizer {number}" if len(states) > 1 else "the optimizer"
        name = given[number if len(given) > 1 else 0] if given else ""
        candidates = [_checked(name, state, label)] if name else _candidates(state)
        said.append(_words(label, name, candidates, state))
        for index, group in enumerate(state["param_groups"]):
            own = str(group.get("name", index))
            params = tuple(group["params"])
            named = params and all(isinstance(p, str) for p in params)  # sharded runs number nothing
            names = params if named else group.get("param_names")
            groups.append(
                SavedGroup(
                    label=f"{number}:{own}" if len(states) > 1 else own,
                    settings={key: value for key, value in group.items() if key not in ("params", "param_names")},
                    rules=tuple(rule for c in candidates for rule in named_rules(c, group)),
                    optimizer=" or ".join(candidates),
                    params=params,
                    names=tuple(names) if names is not None and len(names) == len(params) else None,
                    shapes=tuple(_shape(state["state"].get(p, {})) for p in params),
                )
            )
    return groups, said


def _candidates(state: Mapping[str, Any]) -> list[str]:
    """Classes of torch.optim that have just these settings, and no other state."""
    groups = state["param_groups"]
    found = []
    for name, (settings, entries) in _SIGNATURES.items():
        own = {key for group in groups for key in group} - _COMMON - _OF_SCHEDULERS
        if name in ("Adam", "AdamW"):
            decoupled = {bool(group["decoupled_weight_decay"]) for group in groups if "decoupled_weight_decay" in group}
            own.discard("decoupled_weight_decay")
            if decoupled and decoupled != {name == "AdamW"}:
                continue
        marked = name in _UNMARKED or all({"foreach", "maximize"} <= set(group) for group in groups)
        if groups and marked and own == set(settings.split()) and _entries(state) <= set(entries.split()):
            found.append(name)
    return found


def _checked(name: str, state: Mapping[str, Any], label: str) -> str:
    """A class that the user has named, unless the state says otherwise."""
    for group in state["param_groups"]:
        if not named_rules(name, group):
            raise CheckpointError(
                f"no rule is known for {name!r}. Name a class of torch.optim, or another as package.Class, such as "
                "lion_pytorch.Lion; or leave it out, and get the norms alone."
            )
        known = _SIGNATURES.get(name.removeprefix("torch.optim."))
        if known is None:
            continue
        missing = set(known[0].split()) - set(group) - {"decoupled_weight_decay"}  # older ones lack it
        other = _entries(state) - set(known[1].split())
        coupled = name.endswith("AdamW") and group.get("decoupled_weight_decay") is False
        if missing or other or coupled:
            why = f"it keeps {', '.join(sorted(other))}" if other else "its decay is not decoupled"
            why = f"its groups have no {', '.join(sorted(missing))}" if missing else why
            raise CheckpointError(f"{label} cannot be {name}: {why}. Name another class, or leave it out.")
    return name


def _words(label: str, given: str, candidates: list[str], state: Mapping[str, Any]) -> str:
    if given:
        return f"{label.capitalize()} is {given}, as you say."
    if len(candidates) == 1:
        return (
            f"Assumed: {label} is torch.optim.{candidates[0]}, whose settings and state these are. A checkpoint does "
            "not name the class; if it is another, say so by --optimizer."
        )
    if candidates:
        return (
            f"{label.capitalize()} is {' or '.join(candidates)} of torch.optim: its groups do not say whether decay is "
            "decoupled, and what differs between them is left blank. Say which by --optimizer."
        )
    keys = sorted({key for group in state["param_groups"] for key in group} - {"params", "param_names"})
    return (
        f"The class of {label} is not known: no optimizer of torch (1.12 or later) has just the settings "
        f"{', '.join(keys)}. What depends on it is left blank. Say it by --optimizer."
    )


def _entries(state: Mapping[str, Any]) -> set[str]:
    return {key for entries in state["state"].values() if isinstance(entries, Mapping) for key in entries}


def _shape(entries: Mapping[str, Any]) -> tuple[int, ...] | None:
    found = {tuple(v.shape) for key, v in entries.items() if key in _SHAPED and isinstance(v, Tensor)}
    if {"row_var", "col_var"} <= set(entries):  # Adafactor's, each without one dimension
        row, column = entries["row_var"].shape, entries["col_var"].shape
        found.add(tuple(map(max, row, column)))
    return found.pop() if len(found) == 1 else None
