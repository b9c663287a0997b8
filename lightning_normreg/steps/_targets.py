"""Which weights are acted on, given what is known of their scale invariance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_normreg._weights import SHOWS_EPS, Verdict, Watched, listed

OnNotInvariant = Literal["raise", "skip", "allow"]

_CORRECT = (
    "To let the decay of all weights follow the learning rate, as AdamC does with language models: "
    "CorrectedDecay(exclude=[…the head…], on_not_invariant='allow')."
)


def choose_targets(
    watched: Sequence[Watched],
    verdict: Verdict,
    *,
    named: bool,
    otherwise: OnNotInvariant,
    callback: str = "NormProjection",
) -> list[Watched]:
    """Weights to act on.

    Args:
        watched: What is selected.
        verdict: What is known, empty for nothing.
        named: Whether the user has named them; otherwise exactly those found scale-invariant are meant.
        otherwise: What to do with named ones that are not known to be scale-invariant.
        callback: Name of the callback that asks.

    Raises:
        ValueError: If that is to raise, or nothing is left.
    """
    good = [w for w in watched if w.invariant]
    bad = [w for w in watched if not w.invariant]
    if not named:
        ruled = [w.name for w in watched if w.name in verdict and verdict[w.name].is_ruled_by_eps]
        if not good and not ruled:
            raise ValueError(_nothing(verdict, callback))
        if not good:
            raise ValueError(f"There must be something to act on, but of {ruled[0]!r}: {verdict[ruled[0]].why}")
        if ruled:
            rank_zero_warn(f"{callback} leaves {listed(ruled, 5)} alone. {verdict[ruled[0]].why}")
        return good
    if bad and otherwise == "raise":
        reasons = "; ".join(f"{w.name!r}: {_why(w, verdict)}" for w in bad[:4])
        raise ValueError(
            f"`include` must name scale-invariant weights, but {reasons}. Leave it out by "
            f"`exclude`, or say on_not_invariant='skip' or 'allow' ({_consequence(callback)})."
        )
    if bad and otherwise == "skip":
        rank_zero_info(f"{callback} leaves out what is not scale-invariant: {listed([w.name for w in bad], 5)}.")
        return good
    # A bias that belongs to the units of a weight is held with them, and cannot have a radius of its own as well.
    joined = {p for w in watched for p in w.joined}
    return [w for w in watched if w.parameter not in joined]


def note_eps_shares(targets: Sequence[Watched], verdict: Verdict) -> None:
    """Warn of weights where the eps of a normalization shows.

    With the eps share ρ, moving a unit from norm n to R changes the output by about ρ/2·|1 − n²/R²|.
    """
    shares = {t.name: verdict[t.name].rho_median or 0.0 for t in targets if t.name in verdict and t.invariant}
    shown = ", ".join(f"{name!r} ({share:.0%})" for name, share in shares.items() if share > SHOWS_EPS)
    if shown:
        rank_zero_warn(
            f"The eps of a normalization shows behind {shown}: projecting changes outputs by about half that."
        )


def _why(watched: Watched, verdict: Verdict) -> str:
    if watched.name in verdict:
        return verdict[watched.name].why.rstrip(".") or verdict[watched.name].kind
    return "nobody knows whether it is"


def _consequence(callback: str) -> str:
    if callback == "CorrectedDecay":
        return "then its decay follows the learning rate all the same"
    return "then projecting changes the function"


def _nothing(verdict: Verdict, callback: str) -> str:
    corrects = callback == "CorrectedDecay"
    if not verdict:
        named = f"To project all the same, name the weights: {callback}(include=[…], on_not_invariant='allow')."
        return (
            "It must be known which weights are scale-invariant, but that could not be found out. Give the callback "
            "`invariance`, a verdict from find_scale_invariance(module, forward=…) saved by save_verdict. "
            f"{_CORRECT if corrects else named}"
        )
    hold = (
        "To hold norms all the same, as Hyperball optimizers do: "
        f"{callback}(include=['*.weight'], unit='layer', radius='initial', on_not_invariant='allow')."
    )
    return (
        "There must be something to act on, but no selected weight is scale-invariant by itself, as in most "
        f"transformers. What several are together: {callback}(unit='set'). {_CORRECT if corrects else hold}"
    )
