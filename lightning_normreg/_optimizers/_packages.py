"""Optimizers of other packages, by top-level package and name of the class; the packages are not imported.

The same name means different things in different packages, and a package that is not here has no rule. Where classes of
one package share a name, the key says the module too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lightning_normreg._optimizers import _torch
from lightning_normreg._optimizers._kinds import (
    ADAFACTOR,
    ADAFACTOR_RELATIVE,
    ADAM_LIKE,
    ADAMP,
    ADOPT,
    CLAMPED,
    CLIPPED_TRUST,
    LAMB,
    LAMB_DECOUPLED,
    LARS,
    MIXING,
    OWN_RATE,
    PRODIGY,
    SCHEDULE_FREE_ADAMW,
    SCHEDULE_FREE_SGD,
    SECOND,
    SGDP,
    SGDW,
    SHAMPOO,
    WARMS_UP,
    either,
    unpredicted_if,
)
from lightning_normreg._optimizers._rule import NoRule, UpdateRule
from lightning_normreg._optimizers._torch import ADAM, ADAMW, EPS, LION, MUON, RADAMW, SGD


def _corrected(rule: UpdateRule) -> UpdateRule:
    """A rule with switches for caution, and for a decay that goes with the square of the learning rate."""
    odd = replace(rule, family="")
    squared = replace(odd, decay_degree=-2 * rule.exponent)
    return rule.given(corrected_weight_decay=squared, caution=odd)


_LAPROP = UpdateRule(
    1, "decoupled", state_degrees=SECOND, rate_degrees={"exp_avg": 1, "exp_avg_lr_1": 1}, group_degrees=EPS
)
_TF_RMSPROP = UpdateRule(
    1,
    "coupled",
    momentum_key="momentum",
    state_degrees={"square_avg": -2, "grad_avg": -1},
    group_degrees={"eps": -2},
    note="starts from a variance of 1, and goes with lr/‖w‖² until that is forgotten",
)
_TF_RMSPROP_LR = replace(_TF_RMSPROP, rate_degrees={"momentum_buffer": 1})
_BIG_VISION = UpdateRule(
    1, "decoupled", state_degrees={"exp_avg_sq_r": -2, "exp_avg_sq_c": -2, **SECOND}, group_degrees={"eps": -2}
)
_LAMB = LAMB.given(caution=replace(LAMB, family=""))

_TIMM: Mapping[str, UpdateRule | NoRule] = {
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
    "RMSpropTF": _TF_RMSPROP.given(
        lr_in_momentum=_TF_RMSPROP_LR.given(decoupled_decay=replace(_TF_RMSPROP_LR, decay="decoupled")),
        decoupled_decay=replace(_TF_RMSPROP, decay="decoupled"),
    ),
    "SGDP": unpredicted_if(SGDP, "nesterov", "caution"),
    "SGDW": _corrected(SGDW),
}

_MUON = replace(MUON, group_degrees={})  # its eps is no setting
_UNPREDICTED = replace(ADAMW, family="", local="unknown")

_PO_ADAM = either(_UNPREDICTED)
_PO_LAMB = replace(LAMB, note=CLAMPED)

RULES: Mapping[str, Mapping[str, UpdateRule | NoRule]] = {
    "torch": _torch.RULES,
    "timm": _TIMM,
    "adamp": {"AdamP": unpredicted_if(ADAMP, "nesterov"), "SGDP": unpredicted_if(SGDP, "nesterov")},
    "apex": {
        "FusedAdam": replace(_UNPREDICTED, decay="coupled", family="adam_l2").given(
            use_master=replace(ADAM_LIKE, decay="coupled").given(adam_w_mode=ADAM_LIKE),
            adam_w_mode=replace(_UNPREDICTED, family="adam_decoupled"),
        ),
    },
    # Adam and AdamW are one algorithm there, with decoupled decay; the state is in bytes where it is large.
    "bitsandbytes": {
        f"{paged}{name}{bits}": replace(ADAM_LIKE, family="adam_decoupled")
        for paged in ("", "Paged")
        for name in ("Adam", "AdamW")
        for bits in ("", "8bit", "32bit")
    },
    "dadaptation": {
        "DAdaptAdam": either(replace(PRODIGY, lr_factor_keys=("d", "layer_scale")), key="decouple"),
        "DAdaptLion": PRODIGY,
    },
    "dion": {"Muon": ADAM_LIKE},
    # With `decoupled_weight_decay` the decay is in units of the first learning rate.
    "lion_pytorch": {"Lion": unpredicted_if(LION, "decoupled_wd"), "cautious_lion.Lion": replace(LION, family="")},
    "muon": {
        "Muon": _MUON,
        "SingleDeviceMuon": _MUON,
        "MuonWithAuxAdam": ADAMW.given(use_muon=_MUON),
        "SingleDeviceMuonWithAuxAdam": ADAMW.given(use_muon=_MUON),
    },
    "prodigyopt": {"Prodigy": either(PRODIGY, key="decouple")},
    "pytorch_optimizer": {
        "ADOPT": either(ADOPT),
        "AdEMAMix": either(ADAM_LIKE),
        "AdaFactor": either(ADAM_LIKE).given(
            scale_parameter=replace(ADAFACTOR_RELATIVE, local="unknown", state_degrees=None), relative_step=OWN_RATE
        ),
        "AdamP": either(unpredicted_if(ADAMP, "nesterov")),
        "Adan": either(ADAM_LIKE),
        "DAdaptAdam": either(PRODIGY),
        "DAdaptLion": either(PRODIGY),
        "LARS": replace(LARS, note="goes with lr/‖w‖² where the weight has one dimension"),
        "Lamb": _PO_LAMB.given(
            rectify=NoRule("takes steps of two kinds, the one before and the other after it rectifies"),
            adam=ADAM_LIKE,
            weight_decouple=replace(LAMB_DECOUPLED, note=CLAMPED),
        ),
        "Lion": either(unpredicted_if(LION, "cautious")),
        "Muon": _PO_ADAM.given(use_muon=either(replace(_MUON, family=""))),
        "Prodigy": either(PRODIGY),
        "RAdam": either(replace(RADAMW, family="", local="unknown")),
        "SGDP": either(unpredicted_if(SGDP, "nesterov")),
        "SGDW": SGD.given(weight_decouple=SGDW, nesterov=replace(SGD, family="nesterov")),
        "SOAP": UpdateRule(1, "decoupled", state_degrees=ADAM | {"GG": -2}, group_degrees=EPS),
        "ScheduleFreeAdamW": replace(SCHEDULE_FREE_ADAMW, used_lr_key="").given(warmup_steps=WARMS_UP),
        "ScheduleFreeSGD": replace(SCHEDULE_FREE_SGD, used_lr_key="").given(warmup_steps=WARMS_UP),
        "Shampoo": either(SHAMPOO).given(momentum=MIXING),
        "SignSGD": either(ADAM_LIKE),
        "StableAdamW": either(ADAM_LIKE),
        "Tiger": either(ADAM_LIKE),
    },
    "schedulefree": {
        "AdamWScheduleFree": SCHEDULE_FREE_ADAMW,
        "RAdamScheduleFree": replace(SCHEDULE_FREE_ADAMW, note="stands still in its first steps, or goes with lr/‖w‖²"),
        "SGDScheduleFree": SCHEDULE_FREE_SGD,
    },
    "torch_optimizer": {
        "AdamP": unpredicted_if(ADAMP, "nesterov"),
        "LARS": SGD.given(weight_decay=LARS, nesterov=replace(SGD, family="nesterov")),
        "Lamb": _PO_LAMB.given(adam=ADAM_LIKE),
        "SGDP": unpredicted_if(SGDP, "nesterov"),
    },
    "transformers": {
        "Adafactor": replace(ADAFACTOR, decay_degree=-1, group_degrees={"eps": (-2, 0)}).given(
            scale_parameter=replace(ADAFACTOR_RELATIVE, group_degrees={"eps": (-2, 1)}), relative_step=OWN_RATE
        )
    },
}
