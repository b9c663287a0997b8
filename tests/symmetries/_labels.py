"""The verdict of the probe in the notation of the hand-made labels."""

from __future__ import annotations

from lightning_normreg._weights import ScaleInvariance


def label(verdict: ScaleInvariance) -> str:
    """``kind[slices]+bias`` of a verdict.

    >>> label(ScaleInvariance("block", dim=0, block_size=4, slices=((0, 16),), needs_bias="b"))
    'block:4[0:16]+bias'
    """
    kind = f"block:{verdict.block_size}" if verdict.kind == "block" else verdict.kind
    where = "" if verdict.slices is None else "[" + ",".join(f"{a}:{b}" for a, b in verdict.slices) + "]"
    return kind + where + ("+bias" if verdict.needs_bias else "")


def differences(verdicts: dict[str, ScaleInvariance], labels: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Name → (expected, actual) wherever the two differ."""
    unknown = set(labels) - set(verdicts)
    assert not unknown, f"labels for parameters that do not exist: {unknown}"
    pairs = {name: (labels.get(name, "none"), label(verdict)) for name, verdict in verdicts.items()}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
