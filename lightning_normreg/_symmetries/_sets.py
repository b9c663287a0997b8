"""Sets, which are scale-invariant together, as units of the weights in them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch.nn.parameter import Parameter

from lightning_normreg._symmetries._layers import in_all_layers
from lightning_normreg._symmetries._symmetry import Symmetries, Symmetry, whole_name
from lightning_normreg._weights import RULED_BY_EPS, ParameterRole, Part, Verdict, Watched, listed, match, watch

_STREAM, _SHOWN = "residual_stream", 6
Named = Sequence[tuple[str, Parameter, ParameterRole]]
_PART = re.compile(r"\[(?P<before>(?::,)*)(?P<start>\d+):(?P<stop>\d+)\]$")


def set_names(symmetries: Symmetries) -> dict[str, Symmetry]:
    """The sets that one factor can multiply, by names to read.

    ``residual_stream`` where a set holds an embedding, or the same tensor of several layers, numbered if there are more
    of them; else the first of its tensors and how many more there are. Sets with unequal exponents are left out, as
    they are no unit with a norm, and those with a gain of the form 1 + γ, which is not multiplied by multiplying γ.
    """
    sets = [
        symmetry
        for symmetry in symmetries.basis
        if symmetry.kind == "set" and {*symmetry.exponents.values()} == {1}
        if not any(name.startswith("1 + ") for name in symmetry.exponents)
    ]
    titles = [_title(symmetry, symmetries.roles) for symmetry in sets]
    numbers = [f"_{titles[: i + 1].count(title)}" if titles.count(title) > 1 else "" for i, title in enumerate(titles)]
    return {title + number: s for title, number, s in zip(titles, numbers, sets, strict=True)}


def _title(symmetry: Symmetry, roles: Mapping[str, str]) -> str:
    first, *others = symmetry.exponents
    return _STREAM if _is_stream(symmetry, roles) else f"{first}_and_{len(others)}_more"


def _is_stream(symmetry: Symmetry, roles: Mapping[str, str]) -> bool:
    kinds = [in_all_layers(name) for name in symmetry.exponents]
    return len(set(kinds)) < len(kinds) or any(roles.get(name) == "embedding" for name in symmetry.exponents)


def sets_and_pairs(symmetries: Symmetries) -> list[str]:
    """Sentences about them; of layers of one kind once."""
    sets = {title: [*symmetry.exponents] for title, symmetry in set_names(symmetries).items()}
    streams = [f"{title} ({listed(sets.pop(title), 3)})" for title in [*sets] if title.startswith(_STREAM)]
    others = [listed([*dict.fromkeys(map(in_all_layers, names))], 3) for names in sets.values()]
    together = [*streams, *dict.fromkeys(others)]
    said = [f"Scale-invariant together: {_few(together)}."] if together else []
    pairs: dict[str, int] = {}
    for symmetry in (s for s in symmetries.basis if s.kind == "pair"):
        sides = [[n for n, power in symmetry.exponents.items() if power == sign] for sign in (1, -1)]
        words = " against ".join(listed([*dict.fromkeys(map(in_all_layers, side))], 3) for side in sides)
        pairs.setdefault(words, symmetry.blocks)
    if pairs:
        found = [words + (f" (each of {blocks} blocks)" if blocks > 1 else "") for words, blocks in pairs.items()]
        said.append(f"Only the product counts of what may grow against what shrinks: {_few(found)}.")
    return said


def _few(found: Sequence[str]) -> str:
    more = len(found) - _SHOWN
    return "; ".join([*found[:_SHOWN], *([f"and {more} more"] if more > 0 else [])])


def watch_sets(
    watched: Sequence[Watched],
    named: Named,
    symmetries: Symmetries,
    verdict: Verdict | None,
    exclude: Sequence[str] = (),
) -> tuple[list[Watched], list[Watched]]:
    """Sets that some of the weights are in, and what else is in these, as weights.

    Args:
        watched: The weights.
        named: All parameters.
        symmetries: Of the same model.
        verdict: Which units are scale-invariant, if that is known.
        exclude: Globs of parameters that are not to be in a set: then the set is left out.
    """
    by_name = {w.name: w for w in watched}
    unwanted = {n for glob in exclude for n in match(glob, {n: role.aliases for n, _, role in named}, "exclude")}
    joined = {p for w in watched for p in w.joined}
    parameters = {name: (p, role) for name, p, role in named}
    sets, others = [], []
    for title, symmetry in set_names(symmetries).items():
        whole = {whole_name(name) for name in symmetry.exponents}
        if not whole & by_name.keys() or whole & unwanted or not whole <= parameters.keys():
            continue
        members = []
        for name in symmetry.exponents:
            parameter, role = parameters[whole_name(name)]
            if (part := _PART.search(name)) is not None:
                dim = part["before"].count(":")
                cut = Part("layer", dim, 1, int(part["start"]), int(part["stop"]))
                members.append(Watched(name, parameter, role, (cut,)))
            elif name in by_name:
                members.append(by_name[name])
            elif parameter not in joined:  # else it is in the units of another one
                members.append(watch(named, [name], (), "auto", verdict)[0])
        others += [m for m in members if m.name not in by_name]
        by_name |= {m.name: m for m in members}
        holds = symmetry.eps_share is None or symmetry.eps_share <= RULED_BY_EPS
        first = members[0]
        if len(members) > 1:
            one = Watched(title, first.parameter, first.role, (Part("layer"),), (), holds, members=tuple(members))
            sets.append(one)
    return sets, others


def units_and_sets(watched: Sequence[Watched], sets: Sequence[Watched]) -> list[Watched]:
    """Weights and sets, without the weights that are in a set and are not scale-invariant by themselves."""
    inside = {p for one in sets for p in one.tensors()}
    return [*(w for w in watched if w.invariant or w.parameter not in inside), *sets]
