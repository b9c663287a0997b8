"""What the probe found out about one parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

Kind = Literal["neuron", "block", "column", "dim", "layer", "inert", "none", "unknown"]
Evidence = Literal["float64", "float32", "observer"]
KINDS: tuple[Kind, ...] = get_args(Kind)
EVIDENCE: tuple[Evidence, ...] = get_args(Evidence)
RULED_BY_EPS, SHOWS_EPS = 0.1, 0.01
"""Eps share above which a unit counts as not scale-invariant, everywhere; and above which that is said."""


@dataclass(frozen=True)
class ScaleInvariance:
    """The units of one parameter that may be multiplied by any positive number without changing the loss.

    Attributes:
        kind: ``"neuron"``: each neuron (row, or column of a transposed convolution) is a unit. ``"block"``: runs of
            neighbouring slices are. ``"column"``: each slice along dimension 1 is. ``"dim"``: each slice along another
            dimension is. ``"layer"``: only the whole tensor is. ``"inert"``: the loss does not depend on the
            parameter. ``"none"``: no unit of it is scale-invariant by itself. ``"unknown"``: not found out, because it
            is frozen, no gradient reached it, or too little was seen of it.
        dim: Dimension that the units run along; None for ``"layer"`` and where there are no units.
        groups: Groups that the slices are spread over, for transposed convolutions; else 1.
        block_size: Slices per unit, 1 for single slices; None where units differ in size, or have no dimension.
        slices: Ranges ``(start, stop)`` along ``dim`` that are scale-invariant; None for all. Where ``block_size`` is
            None, each range is one unit.
        needs_bias: Clean name of the bias that must be multiplied along, slice by slice; None for most.
        z: Largest ``|Σ w·g| / √Σ (w·g)²`` of the units over all draws (of the whole tensor for ``"none"``). Zero means
            scale-invariant; without invariance it is about 1. None if it was not tested.
        evidence: ``"float64"``, ``"float32"``, or ``"observer"``, which only ever saw gradients of training.
        rho_median: Median over the units of the eps share eps/(var + eps) of the normalizations behind them, at the
            user's own weights: 0 is exactly scale-invariant, 1 not at all. None if it was not measured.
        rho_worst: The largest of them.
        standardized: Whether each unit is divided by its own standard deviation (weight standardization), so that an
            eps is small against the mean square of its entries, not against what it puts out.
        reason: Why, in one sentence.
        holds: Whether it was still so when gradients of training were last looked at.
        of: Number of slices along ``dim`` of the tensor that was asked; None in verdicts that do not say.
        masked: Share of its entries that a fixed mask keeps from the loss, and that count in its norm all the same; 0
            where that is not known, as in place.
    """

    kind: Kind
    dim: int | None = None
    groups: int = 1
    block_size: int | None = None
    slices: tuple[tuple[int, int], ...] | None = None
    needs_bias: str | None = None
    z: float | None = None
    evidence: Evidence = "float64"
    rho_median: float | None = None
    rho_worst: float | None = None
    standardized: bool = False
    reason: str = ""
    holds: bool = True
    of: int | None = None
    masked: float = 0.0

    @property
    def has_units(self) -> bool:
        """Whether there are units that are scale-invariant but for what eps or training may have done."""
        return self.kind not in ("inert", "none", "unknown")

    @property
    def is_ruled_by_eps(self) -> bool:
        """Whether an eps makes up more than 10 % of the variance behind its units."""
        return (self.rho_median or 0.0) > RULED_BY_EPS

    @property
    def is_invariant(self) -> bool:
        """Whether there is something to project: units that are scale-invariant, also in presence of eps."""
        return self.has_units and self.holds and not self.is_ruled_by_eps

    @property
    def why(self) -> str:
        """Why it is what it is by now, in one sentence."""
        if self.has_units and not self.holds:
            return "It was scale-invariant at first, and by its gradients it is so no longer."
        if self.has_units and self.is_ruled_by_eps:
            return (
                f"The eps of a normalization makes up {self.rho_median:.0%} of the variance behind it, which is more "
                "than 10 %: multiplying it changes the function. Use a smaller eps, or larger weights."
            )
        return self.reason

    @property
    def is_unknown(self) -> bool:
        """Whether it is worth asking again."""
        return self.kind == "unknown"


def fitted(verdict: Mapping[str, ScaleInvariance], slices: Mapping[str, Sequence[int]]) -> dict[str, ScaleInvariance]:
    """A verdict on a small twin as one on the model itself: blocks are kept by their number.

    Args:
        verdict: Of a model with the same names, maybe of other sizes.
        slices: Name → slices along each dimension of the model's own parameters.

    Raises:
        ValueError: If blocks do not fit.

    Examples:
        >>> heads = ScaleInvariance("block", dim=0, block_size=4, slices=((0, 16),), of=24)
        >>> found = fitted({"qkv": heads}, {"qkv": [96, 32]})["qkv"]
        >>> found.block_size, found.slices
        (16, ((0, 64),))
    """
    return {name: v if name not in slices else _fitted(name, v, slices[name]) for name, v in verdict.items()}


def _fitted(name: str, verdict: ScaleInvariance, slices: Sequence[int]) -> ScaleInvariance:
    if verdict.dim is None:
        return verdict
    own = slices[verdict.dim] if verdict.dim < len(slices) else 0
    of = verdict.of or own
    ranges = verdict.slices or ()
    blocks = [] if verdict.kind != "block" or verdict.block_size is None else [verdict.block_size]
    places = [*blocks, *(place for pair in ranges for place in pair)]
    if not own or any(place * own % of or place > of for place in places):
        raise ValueError(
            f"`invariance` must fit the model, but the units of {name!r} end at {places} of {of} slices along "
            f"dimension {verdict.dim}, where the model has {own}. Probe a twin with as many dimensions, and "
            "with as many blocks as the model has, of any size."
        )
    if own == of:
        return verdict
    scaled = tuple((start * own // of, stop * own // of) for start, stop in ranges)
    size = blocks[0] * own // of if blocks else verdict.block_size
    return replace(verdict, block_size=size, slices=scaled or None, of=own)


def strong(verdicts: Mapping[str, ScaleInvariance]) -> dict[str, ScaleInvariance]:
    """Verdicts that training may be changed by: those of a probe, not of the observer of gradients."""
    return {name: verdict for name, verdict in verdicts.items() if verdict.evidence != "observer"}


def about_masks(verdicts: Mapping[str, ScaleInvariance]) -> str:
    """What to know about parameters whose norms count more than the loss sees; "" where there are none.

    >>> about_masks({"weight": ScaleInvariance("neuron", dim=0, masked=0.75)})
    "75% of the entries of 'weight' never reach the loss (a mask), but count in its norm, and in what is made of it. \
Multiply the parameter by its mask once: entries that are 0 stay 0."
    """
    shares = [f"{v.masked:.0%} of the entries of {name!r}" for name, v in verdicts.items() if v.masked]
    if not shares:
        return ""
    more = f" and {len(shares) - 5} more" if len(shares) > 5 else ""
    return (
        f"{', '.join(shares[:5])}{more} never reach the loss (a mask), but count in its norm, and in what is made of "
        "it. Multiply the parameter by its mask once: entries that are 0 stay 0."
    )


def summarize(verdicts: Mapping[str, ScaleInvariance]) -> str:
    """Say in a sentence or two what share of the parameters is scale-invariant.

    >>> summarize({"weight": ScaleInvariance("none"), "bias": ScaleInvariance("inert")})
    'No parameter is scale-invariant by itself (1 is not, 1 does not reach the loss), but several may be together: \
`find_symmetries` finds them, and `reduce_decay` says what weight decay does here.'
    >>> summarize({"conv.weight": ScaleInvariance("neuron", dim=0), "head.weight": ScaleInvariance("none")})
    '1 of 2 parameters has scale-invariant units (0 do not reach the loss).'
    """
    invariant = sum(v.is_invariant for v in verdicts.values())
    inert = sum(v.kind == "inert" for v in verdicts.values())
    unknown = sum(v.is_unknown for v in verdicts.values())
    open_ = f", of {unknown} nothing is known yet" if unknown else ""
    if not invariant:
        rest = len(verdicts) - inert - unknown
        are = "is" if rest == 1 else "are"
        if unknown:
            return f"No parameter is known to be scale-invariant by itself ({rest} {are} not{open_})."
        return (
            f"No parameter is scale-invariant by itself ({rest} {are} not, {inert} "
            f"{_do(inert)} not reach the loss), but several may be together: `find_symmetries` finds them, and "
            "`reduce_decay` says what weight decay does here."
        )
    return (
        f"{invariant} of {len(verdicts)} parameters {'has' if invariant == 1 else 'have'} scale-invariant units "
        f"({inert} {_do(inert)} not reach the loss{open_})."
    )


def _do(count: int) -> str:
    return "does" if count == 1 else "do"
