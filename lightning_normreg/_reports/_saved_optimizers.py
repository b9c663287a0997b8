"""What the saved state of an optimizer says of its class, which it does not name, and of which parameters it has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_normreg._optimizers import Group, NoRule, UpdateRule, named_rules
from lightning_normreg._reports._checkpoint import CheckpointError
from lightning_normreg._weights import clean_name, listed

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
Shape = tuple[int, ...]


@dataclass(frozen=True)
class SavedGroup:
    label: str  # its name or number, with that of the optimizer where there are several
    settings: Group  # what it says beside its parameters
    rules: tuple[UpdateRule | NoRule, ...]  # how its optimizer may step; empty where nobody knows
    optimizer: str = ""  # class of the optimizer, as far as it is known
    params: tuple[Any, ...] = ()  # numbers of its parameters, or their names
    names: tuple[str, ...] | None = None  # of its parameters, None where it has none
    shapes: tuple[Shape | None, ...] = ()  # of each parameter as its state has it, None for one without


Places = dict[int, int]
"""By entry of a group, the place of its parameter in the module."""


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


def match_parameters(
    groups: Sequence[SavedGroup], tensors: Mapping[str, Tensor], aliases: Mapping[str, Sequence[str]]
) -> tuple[dict[str, SavedGroup], list[str]]:
    """Find the group of each parameter, by name where groups have names, else by order and shape.

    A group without names is taken to list its parameters in the order of the module, as ``module.parameters()`` does.
    A parameter has an owner only if there is no other way to fit all groups to the module.

    Returned are name → group, and in sentences what was done and what is left open. ``aliases`` are the other names of
    tied tensors.
    """
    known = {n: name for name in tensors for n in (name, *aliases.get(name, ()))}
    owners: dict[str, SavedGroup] = {}
    said = []
    for group in groups:
        if group.names is not None:
            found = _by_name(group.names, known)
            shapes = {name: group.shapes[group.names.index(name)] for name in found}  # the first of one that is twice
            wrong = [name for name, at in found.items() if shapes[name] not in (None, tuple(tensors[at].shape))]
            missing = [name for name in group.names if name not in found]
            owners |= {at: group for name, at in found.items() if name not in wrong}
            if missing or wrong:
                said.append(
                    f"Group {group.label} names parameters that the weights do not have in that shape: "
                    f"{listed([repr(name) for name in (*missing, *wrong)])}. They are left out."
                )
    unnamed = [group for group in groups if group.names is None and group.params]
    if unnamed:
        free = [name for name in tensors if name not in owners]
        fixed, misfits = _fit(unnamed, [tuple(tensors[name].shape) for name in free])
        owners |= {free[at]: group for group, places in zip(unnamed, fixed, strict=True) for at in places.values()}
        said += _about_order(unnamed, fixed, misfits)
    return owners, said


def _by_name(names: Sequence[str], known: Mapping[str, str]) -> dict[str, str]:
    """Where the names of a group are in the module; they may lack the first part, as those of one submodule do."""
    clean = [clean_name(name) for name in names]
    first = clean[0] if clean else ""
    prefixes = [n.removesuffix(first) for n in known if n == first or n.endswith(f".{first}")]
    whole = [prefix for prefix in prefixes if all(prefix + name in known for name in clean)]
    prefix = whole[0] if len(whole) == 1 else ""
    return {raw: known[prefix + name] for raw, name in zip(names, clean, strict=True) if prefix + name in known}


def _fit(groups: Sequence[SavedGroup], shapes: Sequence[Shape]) -> tuple[list[Places], set[int]]:
    """Certain places of groups that lie over a list of shapes, each in order and none over another, and the misfits.

    An entry is certain if the first and the last place that it can have are the same. What is certain of one group is
    taken from the others, until nothing changes.
    """
    fixed: list[Places] = [{} for _ in groups]
    misfits = {number for number, group in enumerate(groups) if _certain(group, shapes, {}, set()) is None}
    before = None
    while before != fixed:
        before = list(fixed)
        for number in set(range(len(groups))) - misfits:
            taken = {at for n, places in enumerate(fixed) if n != number for at in places.values()}
            certain = _certain(groups[number], shapes, fixed[number], taken)
            if certain is None:  # each fits alone, but not all of them: there is no telling which is the odd one
                return [{} for _ in groups], set(range(len(groups)))
            fixed[number] = certain
    return fixed, misfits


def _certain(group: SavedGroup, shapes: Sequence[Shape], fixed: Places, taken: set[int]) -> Places | None:
    first, last = (_places(group, shapes, fixed, taken, step) for step in (1, -1))
    if first is None or last is None:
        return None
    return {k: at for k, at in first.items() if last[k] == at}


def _places(group: SavedGroup, shapes: Sequence[Shape], fixed: Places, taken: set[int], step: int) -> Places | None:
    """The first place of each entry, given that the others have a place too; the last one with a step of −1."""
    places = iter([at for at in range(len(shapes)) if at not in taken][::step])
    found: Places = {}
    for k, shape in list(enumerate(group.shapes))[::step]:
        at = next((p for p in places if fixed.get(k, p) == p and shape in (None, shapes[p])), None)
        if at is None:
            return None
        found[k] = at
    return found


def _about_order(groups: Sequence[SavedGroup], fixed: Sequence[Places], misfits: set[int]) -> list[str]:
    shaped = any(shape is not None for group in groups for shape in group.shapes)
    said = [
        "The optimizer numbers its parameters and does not name them: they were matched by the module's order"
        + (" and the shapes of their state." if shaped else " alone, since they have no state.")
    ]
    for number, group in enumerate(groups):
        if number in misfits:
            said.append(
                f"Group {group.label} does not fit the weights in the module's order, so which parameters it has is "
                "not known, and what depends on it is left blank."
            )
        elif still_open := len(group.params) - len(fixed[number]):
            said.append(
                f"{still_open} of the {len(group.params)} parameters of group {group.label} could be "
                "several of the weights, so what depends on them is left blank there. Name the model by --model, or "
                "give the optimizer module.named_parameters()."
            )
    return said
