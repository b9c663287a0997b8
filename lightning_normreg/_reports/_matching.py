"""Which parameter a number in the saved state of an optimizer stands for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from lightning_normreg._reports._saved_optimizers import SavedGroup
from lightning_normreg._weights import clean_name, listed

Owners = dict[str, SavedGroup]


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
        places = _Fit(unnamed, [tuple(tensors[name].shape) for name in free])
        owners |= {free[at]: group for group, at in places.certain()}
        said += _about_order(unnamed, places, free)
    return owners, said


def _by_name(names: Sequence[str], known: Mapping[str, str]) -> dict[str, str]:
    """Where the names of a group are in the module; they may lack the first part, as those of one submodule do."""
    clean = [clean_name(name) for name in names]
    first = clean[0] if clean else ""
    prefixes = [n.removesuffix(first) for n in known if n == first or n.endswith(f".{first}")]
    whole = [prefix for prefix in prefixes if all(prefix + name in known for name in clean)]
    prefix = whole[0] if len(whole) == 1 else ""
    return {raw: known[prefix + name] for raw, name in zip(names, clean, strict=True) if prefix + name in known}


class _Fit:
    """All ways to lay groups over a list of shapes, each in order and none over another.

    An entry is certain if the first and the last place that it can have are the same. What is certain of one group is
    taken from the others, until nothing changes.
    """

    def __init__(self, groups: Sequence[SavedGroup], shapes: Sequence[tuple[int, ...]]) -> None:
        self.groups = groups
        self._shapes = shapes
        self._fixed: list[dict[int, int]] = [{} for _ in groups]
        self.misfits = {n for n in range(len(groups)) if self._certain(n, set()) is None}
        while self._narrow():
            pass

    def certain(self) -> Iterable[tuple[SavedGroup, int]]:
        """Groups with the places of theirs that are certain."""
        for group, fixed in zip(self.groups, self._fixed, strict=True):
            yield from ((group, at) for at in fixed.values())

    def open(self, number: int) -> list[int]:
        """Entries of a group whose place is not certain."""
        return [k for k in range(len(self.groups[number].params)) if k not in self._fixed[number]]

    def _narrow(self) -> bool:
        before = list(self._fixed)
        for number in set(range(len(self.groups))) - self.misfits:
            others = [fixed for n, fixed in enumerate(self._fixed) if n != number]
            certain = self._certain(number, {at for fixed in others for at in fixed.values()})
            if certain is None:  # each fits alone, but not all of them: there is no telling which is the odd one
                self.misfits = set(range(len(self.groups)))
                self._fixed = [{} for _ in self.groups]
                return False
            self._fixed[number] = certain
        return before != self._fixed

    def _certain(self, number: int, taken: set[int]) -> dict[int, int] | None:
        first, last = (self._places(number, taken, step) for step in (1, -1))
        if first is None or last is None:
            return None
        return {k: at for k, at in first.items() if last[k] == at}

    def _places(self, number: int, taken: set[int], step: int) -> dict[int, int] | None:
        """The first place of each entry, given that the others have a place too; the last one with a step of −1."""
        fixed = self._fixed[number]
        places = iter([at for at in range(len(self._shapes)) if at not in taken][::step])
        found: dict[int, int] = {}
        for k, shape in list(enumerate(self.groups[number].shapes))[::step]:
            at = next((p for p in places if fixed.get(k, p) == p and shape in (None, self._shapes[p])), None)
            if at is None:
                return None
            found[k] = at
        return found


def _about_order(groups: Sequence[SavedGroup], fit: _Fit, free: Sequence[str]) -> list[str]:
    shaped = any(shape is not None for group in groups for shape in group.shapes)
    said = [
        "The optimizer numbers its parameters and does not name them: they were matched by the module's order"
        + (" and the shapes of their state." if shaped else " alone, since they have no state.")
    ]
    for number, group in enumerate(groups):
        if number in fit.misfits:
            said.append(
                f"Group {group.label} does not fit the weights in the module's order, so which parameters it has is "
                "not known, and what depends on it is left blank."
            )
        elif fit.open(number):
            said.append(
                f"{len(fit.open(number))} of the {len(group.params)} parameters of group {group.label} could be "
                "several of the weights, so what depends on them is left blank there. Name the model by --model, or "
                "give the optimizer module.named_parameters()."
            )
    return said
