"""The one table of curves: every key that a monitor can log, with its symbol, unit and formula."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Curve:
    """One logged quantity; its tag is ``weights/key/<parameter>``."""

    key: str  # middle part of the tag
    symbol: str  # what the formula calls it
    unit: str  # of the values; "w" stands for the unit of the weight
    formula: str  # how it is computed, with w_u a unit before the step, U the number of units, Δ = after − before
    summary: str = ""  # name of the summary over layers, or "" where there is none
    of: str = "parameter"  # what it is of, which is the last part of the tag; "layers": only the summary is logged


WEIGHT_NORM = Curve(
    "weight_norm", "‖w‖", "w", "√Σ w², of the tensor of that name alone, without a bias that belongs to its units"
)
UNIT_NORM_RMS = Curve(
    "unit_norm_rms",
    "n",
    "w",
    "√(mean_u ‖w_u‖²); ‖w‖ / √U where the units cover the tensor and no bias belongs to them",
    summary="unit_norm_rms",
)
UNIT_NORM_MIN = Curve("unit_norm_min", "min ‖w_u‖", "w", "min_u ‖w_u‖")
UNIT_NORM_MAX = Curve("unit_norm_max", "max ‖w_u‖", "w", "max_u ‖w_u‖")
EFFECTIVE_LR = Curve("effective_lr", "η / n^p", "lr / w^p", "lr / unit_norm_rms^p", summary="effective_lr_ratio")
EFFECTIVE_LR_NOT_INVARIANT = Curve(
    "effective_lr_not_invariant", "η / n^p", "lr / w^p", "as effective_lr, of weights that are not scale-invariant"
)
ROTATION = Curve("rotation", "θ", "rad", "√(mean_u atan2(‖Δ_u⊥‖, ‖w_u‖ + ⟨w_u, Δ_u⟩/‖w_u‖)²)", summary="rotation")
ROTATION_NEVER, ROTATION_SELDOM, ROTATION_OFTEN = (
    Curve(f"rotation_{word}", "θ", "rad", f"as rotation, of the rows that were looked up {what} since", of="embedding")
    for word, what in (
        ("never", "never"),
        ("seldom", "at most as often as the median row of all that were"),
        ("often", "more often than that"),
    )
)
ROTATION_UNROUNDED = Curve(
    "rotation_unrounded", "θ", "rad", "as rotation, of the same step on copies in float32 of weights of a narrower type"
)
ROTATION_FACTOR = Curve(
    "rotation_factor",
    "c",
    "1",
    "rotation / √(mean_u (‖Δ_u⊥‖/‖w_u‖)²) with the optimizer's own Δ: by what RotationControl has multiplied it",
)
SET_SHARE = Curve("set_share", "‖w‖²/‖w_S‖²", "1", "of a weight in a set S, its share of the square of the set's norm")
RELATIVE_UPDATE = Curve("relative_update", "‖Δ‖/‖w‖", "1", "√(mean_u (‖Δ_u‖ / ‖w_u‖)²)")
RADIAL_SHARE = Curve("radial_share", "Δ∥/‖Δ‖", "1", "mean_u ⟨w_u, Δ_u⟩/(‖w_u‖‖Δ_u‖), positive where weights grow")
RADIAL_SHARE_DECAY = Curve(
    "radial_share_decay", "−ηλ‖w‖/‖Δ‖", "1", "mean_u −lr·decay·‖w_u‖/‖Δ_u‖: of radial_share, what decoupled decay did"
)
RADIAL_SHARE_GRADIENT = Curve(
    "radial_share_gradient", "", "1", "radial_share − radial_share_decay: what the gradients did"
)
ROTATION_SPIKE = Curve(
    "rotation_spike",
    "",
    "1",
    "rotation / effective learning rate, over its median at the last 20 logged steps",
    summary="rotation_spike",
    of="layers",
)
GRADIENT_NORM = Curve("gradient_norm", "‖g‖", "loss / w", "‖g‖ of the tensor of that name alone, before clipping")
GRADIENT_ALIGNMENT = Curve("gradient_alignment", "|cos(w, g)|", "1", "√(mean_u (⟨w_u, g_u⟩ / (‖w_u‖ ‖g_u‖))²)")

SCALE_EXPONENT = Curve(
    "scale_exponent", "p̂", "1", "1 − d log‖Δ‖ / d log‖w‖ of the step, which absolute constants such as eps move from p"
)
EQUILIBRIUM_ROTATION = Curve(
    "equilibrium_rotation", "θ*", "rad", "functional.equilibrium_rotation at the present learning rate and decay"
)
EQUILIBRIUM_NORM = Curve("equilibrium_norm", "n*", "w", "functional.equilibrium_norm, to compare unit_norm_rms with")
EQUILIBRIUM_HALF_LIFE = Curve(
    "equilibrium_half_life", "t½", "steps", "functional.equilibrium_half_life, in which the way to n* halves"
)
EQUILIBRIUM_RATIO = Curve(
    "equilibrium_ratio",
    "θ / θ̂",
    "1",
    "rotation / functional.predicted_rotation, at the norm that functional.predicted_norm gives for the schedule "
    "run so far",
    summary="equilibrium_ratio",
)

PLANNED_NORM = Curve("planned_norm", "n̂", "w", "what a plan has for unit_norm_rms at this step")
PLANNED_ROTATION = Curve("planned_rotation", "θ̂", "rad", "what a plan has for rotation at this step")

BALANCE = Curve("balance", "ln(‖A‖/‖B‖)", "1", "of two tensors A, B of which only the product counts", of="pair")
PRODUCT = Curve(
    "product",
    "‖Aγ‖·‖Bγ‖",
    "w²",
    "√(Σ_b ‖(Aγ)_b‖²‖(Bγ)_b‖²) over blocks b, as heads, γ the gain that both read; no scaling symmetry changes it",
    of="pair",
)
TIMESCALE = Curve(
    "timescale",
    "1/(ηλT)",
    "1",
    "1/(lr·decay) steps, over which decay acts, as a share of the T optimizer steps that are planned",
    of="group",
)

CURVES = tuple(value for value in list(globals().values()) if isinstance(value, Curve))
"""All of them, in this order."""

PREFIX = "weights"
"""First part of every tag, unless a callback is given another: one group in TensorBoard, below train, val and test."""

SUMMARY_GROUP = "layers"
"""Takes the place of the key in tags of summaries over layers, ``weights/layers/<summary>_<statistic>``."""

OLD_KEYS = {"angular_update": "rotation"}
"""Keys of logs and checkpoints from before the first release; their tags had no prefix."""

STATISTICS = ("min", "median", "max")

EQUILIBRIUM_TOLERANCE = 0.15
"""Relative distance from the prediction within which norm and rotation count as being at equilibrium."""


def tag(curve: Curve, parameter: str, prefix: str = PREFIX) -> str:
    return joined(prefix, curve.key, parameter)


def summary_tag(curve: Curve, statistic: str, prefix: str = PREFIX) -> str:
    return joined(prefix, SUMMARY_GROUP, f"{curve.summary}_{statistic}")


def updates_tag(index: int, prefix: str = PREFIX) -> str:
    """How many updates of an optimizer there were in a batch, whose last one is logged."""
    return joined(prefix, "updates", str(index))


def joined(prefix: str, *parts: str) -> str:
    """Parts of a tag, behind a prefix that may be empty."""
    return "/".join([prefix, *parts] if prefix else parts)


def retagged(logged: str, prefix: str) -> str:
    """A tag of this or an older version, as it is with a prefix."""
    found = split_tag(logged)
    return joined(prefix, found[1]) if found else logged


def split_tag(logged: str) -> tuple[str, str] | None:
    """What stands in front of a tag, the default prefix aside, and the tag without any; None for what is not ours.

    >>> split_tag("my-run-weights/effective_lr/conv.weight"), split_tag("generator/effective_lr/conv.weight")
    (('my-run', 'effective_lr/conv.weight'), ('generator', 'effective_lr/conv.weight'))
    >>> split_tag("angular_update/conv.weight"), split_tag("train_loss")
    (('', 'rotation/conv.weight'), None)
    """
    found = _TAG.fullmatch(logged)
    if found is None:
        return None
    before = re.sub(rf"(^|[-/]){PREFIX}$", "", found["before"] or "")
    return before, (found["group"] or "") + OLD_KEYS.get(found["key"], found["key"]) + found["rest"]


def markdown_table() -> str:
    """The table as the documentation shows it."""
    lines = ["| tag | symbol | unit | formula |", "| --- | --- | --- | --- |"]
    for c in (c for c in CURVES if c.of != "layers"):
        cells = [f"`{tag(c, f'<{c.of}>')}`", c.symbol, c.unit, c.formula]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    for curve in CURVES:
        if curve.summary:
            what = "effective_lr / its first logged value" if curve is EFFECTIVE_LR else curve.key
            unit = "1" if curve is EFFECTIVE_LR else curve.unit
            name = summary_tag(curve, f"<{'|'.join(STATISTICS)}>").replace("|", "\\|")
            lines.append(f"| `{name}` | | {unit} | {', '.join(STATISTICS)} over layers of {what} |")
    return "\n".join(lines) + "\n"


_TAG = re.compile(
    rf"(?:(?P<before>.*?)[-/])?(?P<group>{SUMMARY_GROUP}/)?"
    rf"(?P<key>{'|'.join({*OLD_KEYS, *(c.key for c in CURVES), *(c.summary for c in CURVES if c.summary)})})"
    rf"(?P<rest>(?(group)_(?:{'|'.join(STATISTICS)})|/.+))"
)
