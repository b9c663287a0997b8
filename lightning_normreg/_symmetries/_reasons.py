"""One plain sentence for each verdict."""

from __future__ import annotations

from dataclasses import replace

from lightning_normreg._weights import ScaleInvariance

INERT = ScaleInvariance("inert", reason="The loss does not depend on it, as on a bias in front of BatchNorm.")
FROZEN = ScaleInvariance("unknown", reason="It is frozen (requires_grad=False), so it was not tested.")
UNREACHED = ScaleInvariance(
    "unknown",
    reason="No gradient reached it: the loss of these samples does not use it, or its optimizer did not step.",
)
VANISHED = ScaleInvariance(
    "unknown",
    reason="Its gradient, and what the loss changes with it, drown in the roundoff of the others.",
)

UNSTEADY = (
    "This rests on Euler's relation alone: two calls of the loss at the same weights differ, so rescaling them proves "
    "nothing."
)

KEEPS_STATE = ScaleInvariance(
    "unknown",
    reason="Two calls of the loss at the same weights differ. A module that is asked in place cannot be copied, so a "
    "step that keeps state outside of it has no verdict: probe a small, unsharded copy of the model, and pass it as "
    "invariance=.",
)


def explain(verdict: ScaleInvariance) -> ScaleInvariance:
    """Add the sentence to a verdict with units.

    >>> explain(ScaleInvariance("neuron", dim=0, block_size=1, z=1e-15)).reason
    'Each neuron can be multiplied by its own positive number without changing the loss.'
    """
    along = f", together with {verdict.needs_bias}," if verdict.needs_bias else ""
    number = "a" if verdict.kind == "layer" or _is_one_run(verdict) else "its own"
    what = f"{_unit(verdict)}{_where(verdict)}{along}"
    sentence = f"{what} can be multiplied by {number} positive number without changing the loss."
    return replace(verdict, reason=f"{sentence} {verdict.reason}".rstrip())


def _unit(verdict: ScaleInvariance) -> str:
    if verdict.kind == "layer":
        return "The whole tensor"
    if verdict.kind == "block" and _is_one_run(verdict):
        return f"The block of slices along dimension {verdict.dim}"
    if verdict.kind == "block":
        size = f"{verdict.block_size} " if verdict.block_size else ""
        return f"Each block of {size}neighbouring slices along dimension {verdict.dim}"
    if verdict.kind == "dim":
        return f"Each slice along dimension {verdict.dim}"
    return f"Each {verdict.kind}"


def _is_one_run(verdict: ScaleInvariance) -> bool:
    runs = verdict.slices or ()
    return len(runs) == 1 and verdict.block_size in (None, runs[0][1] - runs[0][0])


def _where(verdict: ScaleInvariance) -> str:
    if verdict.slices is None:
        return ""
    shown = [f"{start}:{stop}" for start, stop in verdict.slices[:4]]
    return f" in {', '.join(shown)}{', …' if len(verdict.slices) > 4 else ''}"


def demoted(verdict: ScaleInvariance, change: float) -> ScaleInvariance:
    """Verdict for a parameter that passed Euler's relation, but whose rescaling did change the loss."""
    return ScaleInvariance(
        "none",
        z=verdict.z,
        reason=f"Its gradient is at a right angle to it, but rescaling its units by powers of two changed the loss by "
        f"{change:.1e} of itself.",
    )
