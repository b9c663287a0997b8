"""What is left of a recipe's weight decay, in words and labels for users."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from lightning_normreg._symmetries._reduce_decay import ReducedDecay, reduce_decay
from lightning_normreg._symmetries._symmetry import Symmetries, whole_name
from lightning_normreg._weights import listed

_SMALL = 1e-6
"""Largest rate that a recipe is scaled to: what follows from rates is linear then, as it is for any schedule of lr."""


class Audit(NamedTuple):
    """What decay does."""

    labels: dict[str, str]  # parameter → what its decay does, as in ReducedDecay
    removable: dict[str, bool]  # of the decayed: whether the penalty is removable in the limit
    sentences: list[str]
    unequal: dict[str, tuple[str, ...]]  # of sets that are decayed unequally: sentence → their parameters
    left: dict[str, float]  # tensor → decay of the recipe with as little of it as possible


def audit_decay(symmetries: Symmetries, rates: Mapping[str, float], lrs: Mapping[str, float]) -> Audit:
    """Say what decay does to the function.

    Args:
        symmetries: Of the loss.
        rates: Parameter → lr·decay, of those that are decayed.
        lrs: Parameter → learning rate, to write what is left as decay again.
    """
    known = {whole_name(name) for name in symmetries.tensors}
    inert = {whole_name(name) for name in symmetries.inert}
    unknown = [name for name, rate in rates.items() if rate > 0 and name not in known | inert]
    about = [f"Of {listed(unknown, 4)} it is not known: the symmetries were asked without."] if unknown else []
    rates = {name: rate for name, rate in rates.items() if name in known and rate > 0}
    if not rates:
        return Audit({}, {}, about, {}, {})
    scale = _SMALL / max(rates.values())
    reduced = reduce_decay(symmetries, {name: rate * scale for name, rate in rates.items()})
    left = _left(reduced, scale, lrs)
    said = [_sentence(symmetries, len(rates), rates, lrs, left), *about]
    gains = {whole_name(name) for name in left if symmetries.roles[name] == "gamma"} - rates.keys()
    if gains:
        lr = max(lrs.get(name, 0.0) for name in gains)
        usual = max(rate / lrs[name] for name, rate in rates.items() if lrs.get(name))
        more = {**rates, **dict.fromkeys(gains, usual * lr)}
        again = _left(reduce_decay(symmetries, {n: r * scale for n, r in more.items()}), scale, lrs)
        factors = {round(again.get(name, 0.0) / left[name], 2) for name in left if whole_name(name) in gains}
        if len(factors) == 1:
            said.append(f"With these gains decayed by {usual:.3g} as well it would be {factors.pop():g} times as much.")
    return Audit(_whole_labels(reduced), _whole_removable(reduced, rates), said, _unequal(symmetries, rates), left)


def _left(reduced: ReducedDecay, scale: float, lrs: Mapping[str, float]) -> dict[str, float]:
    """Decay that is left, in the optimizer's unit."""
    return {
        name: rate / scale / lrs[whole_name(name)]
        for name, rate in reduced.rates.items()
        if abs(rate) > 1e-6 * _SMALL and lrs.get(whole_name(name))
    }


def _sentence(
    symmetries: Symmetries,
    count: int,
    rates: Mapping[str, float],
    lrs: Mapping[str, float],
    left: Mapping[str, float],
) -> str:
    decays = sorted({f"{rate / lrs[name]:.3g}" for name, rate in rates.items() if lrs.get(name)})
    given = f"Decay of {listed(decays, 3)} on {count} tensors"
    if not left:
        return f"{given} is a learning-rate schedule on this network and nothing else: another one does without decay."
    amounts: dict[str, list[str]] = {}
    for name, decay in left.items():
        amounts.setdefault(f"{decay:.3g}", []).append(name)
    parts = []
    for amount, names in amounts.items():
        gains = sum(symmetries.roles[name] == "gamma" for name in names)
        what = "gain" if gains == len(names) else "tensor"
        parts.append(f"decay of {amount} on {len(names)} {what}{'s' * (len(names) > 1)} ({listed(names, 3)})")
    grows = " (negative: these tensors grow beside the rest of a set)" if min(left.values()) < 0 else ""
    return f"{given} trains this network like {' and '.join(parts)}{grows}; the rest of it is a learning-rate schedule."


def _unequal(symmetries: Symmetries, rates: Mapping[str, float]) -> dict[str, tuple[str, ...]]:
    """Sets whose members are decayed by different rates."""
    found = {}
    for symmetry in symmetries.basis:
        own = {name: rates.get(whole_name(name), 0.0) for name in symmetry.exponents}
        if symmetry.kind == "set" and set(symmetry.exponents.values()) == {1} and any(own.values()):
            least = [name for name, rate in own.items() if rate < 0.999 * max(own.values())]
            if least:
                sentence = (
                    f"{listed([*own], 3)} are scale-invariant together, but {listed(least, 3)} of them "
                    f"{'is' if len(least) == 1 else 'are'} decayed less or not at all: only decay that is equal on all "
                    "of a set is a learning-rate schedule."
                )
                found[sentence] = tuple(dict.fromkeys(map(whole_name, own)))
    return found


def _whole_labels(reduced: ReducedDecay) -> dict[str, str]:
    """Labels of parameters; of fused ones those of their parts, where they differ."""
    parts: dict[str, dict[str, str]] = {}
    for name, label in reduced.labels.items():
        parts.setdefault(whole_name(name), {})[name] = label
    return {
        name: next(iter(labels.values()))
        if len(set(labels.values())) == 1
        else "; ".join(f"{part.removeprefix(name)} {label}" for part, label in labels.items())
        for name, labels in parts.items()
    }


def _whole_removable(reduced: ReducedDecay, rates: Mapping[str, float]) -> dict[str, bool]:
    parts: dict[str, list[bool]] = {}
    for name in reduced.labels:
        parts.setdefault(whole_name(name), []).append(name in reduced.removable)
    return {name: all(found) for name, found in parts.items() if name in rates}
