"""The optimizers of ``timm.optim``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lightning_normreg._optimizers._kinds import (
    ADAFACTOR,
    ADAFACTOR_RELATIVE,
    ADAM_LIKE,
    ADAMP,
    ADOPT,
    CLIPPED_TRUST,
    LAMB,
    LAMB_DECOUPLED,
    LARS,
    SECOND,
    SGDP,
    SGDW,
    unpredicted_if,
)
from lightning_normreg._optimizers._rule import NoRule, UpdateRule
from lightning_normreg._optimizers._torch import ADAMW, EPS, LION, RADAMW, SGD


def _corrected(rule: UpdateRule) -> UpdateRule:
    """A rule with switches for caution, and for a decay that goes with the square of the learning rate."""
    odd = replace(rule, family="")
    squared = replace(odd, decay_degree=-2 * rule.exponent)
    return rule.given(corrected_weight_decay=squared, caution=odd)


_LAPROP = UpdateRule(
    1,
    "decoupled",
    state_degrees=SECOND,
    rate_degrees={"exp_avg": 1, "exp_avg_lr_1": 1},
    group_degrees=EPS,
)
_RMSPROP = UpdateRule(
    1,
    "coupled",
    momentum_key="momentum",
    state_degrees={"square_avg": -2, "grad_avg": -1},
    group_degrees={"eps": -2},
    note="starts from a variance of 1, and goes with lr/‖w‖² until that is forgotten",
)
_RMSPROP_LR = replace(_RMSPROP, rate_degrees={"momentum_buffer": 1})
_BIG_VISION = UpdateRule(
    1,
    "decoupled",
    state_degrees={"exp_avg_sq_r": -2, "exp_avg_sq_c": -2, **SECOND},
    group_degrees={"eps": -2},
)
_LAMB = LAMB.given(caution=replace(LAMB, family=""))

RULES: Mapping[str, UpdateRule | NoRule] = {
    "AdamWLegacy": _corrected(ADAMW),
    # The learning rate in its group is its own, with the weight's part in it, unless one was given.
    "Adafactor": replace(ADAFACTOR, group_degrees={"eps": -2}).given(
        relative_step=replace(ADAFACTOR, state_degrees=None).given(
            scale_parameter=replace(ADAFACTOR_RELATIVE, local="unknown", group_degrees={"eps": -2, "eps_scale": 1})
        )
    ),
    "AdafactorBigVision": _BIG_VISION.given(unscaled_wd=replace(_BIG_VISION, decay_degree=0)),
    "AdamP": unpredicted_if(ADAMP, "nesterov", "caution"),
    "Adopt": replace(ADOPT, decay="coupled").given(decoupled=_corrected(ADOPT)),
    "LaProp": _corrected(_LAPROP),
    # Without decay a weight's steps are those of Adam, or of SGD, unless they are always adapted.
    "Lamb": replace(ADAMW, decay="none", family="", local="unknown").given(
        trust_clip=CLIPPED_TRUST,
        weight_decay=_LAMB.given(decoupled_decay=_corrected(LAMB_DECOUPLED)),
        always_adapt=_LAMB,
    ),
    "Lars": replace(SGD, family="").given(trust_clip=CLIPPED_TRUST, weight_decay=LARS, always_adapt=LARS),
    "Lion": unpredicted_if(LION, "caution"),
    "Muon": ADAM_LIKE,
    "NAdamW": _corrected(replace(ADAMW, family="", local="unknown")),
    "RAdamLegacy": RADAMW,
    "RMSpropTF": _RMSPROP.given(
        lr_in_momentum=_RMSPROP_LR.given(decoupled_decay=replace(_RMSPROP_LR, decay="decoupled")),
        decoupled_decay=replace(_RMSPROP, decay="decoupled"),
    ),
    "SGDP": unpredicted_if(SGDP, "nesterov", "caution"),
    "SGDW": _corrected(SGDW),
}
