"""Which parameter a number in the saved state of an optimizer stands for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from lightning_normreg._reports._saved_optimizers import SavedGroup
from lightning_normreg._weights import clean_name, listed

Owners = dict[str, SavedGroup]
Shape = tuple[int, ...]
Places = dict[int, int]
"""By entry of a group, the place of its parameter in the module."""


def match_parameters(
    groups: Sequence[SavedGroup], tensors: Mapping[str, Tensor], aliases: Mapping[str, Sequence[str]]
) -> tuple[Owners, list[str]]:
    """Find the group of each parameter, by name where groups have names, else by order and shape.

    A group without names is taken to list its parameters in the order of the module, as ``module.parameters()`` does.
    A parameter has an owner only if there is no other way to fit all groups to the module.

    Returned are name → group, and in sentences what was done and what is left open. ``aliases`` are the other names of
    tied tensors.
    """
    known = {n: name for name in tensors for n in (name, *aliases.get(name, ()))}
    owners: Owners = {}
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
